"""First and second derivatives of a loss with respect to every weight and every layer's input at once.

An input is no parameter: it is differentiated by an alias of it that its layer alone reads, which is what a
perturbation added in front of the layer would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from ..parts import WHOLE
from .table import KINDS, Kind, tensor_name

__all__ = ["Derivatives", "Loss", "Target", "targets"]

Loss = Callable[[Any, Any], Tensor]
"""Of the network's output and a batch's label: a 0-dim tensor."""


@dataclass(frozen=True)
class Target:
    """One tensor that derivatives are taken of: the weight or the input of a layer."""

    layer: str
    kind: Kind

    def names(self, module: nn.Module) -> list[tuple[str, str]]:
        """Part and tensor's name, for each part of the layer."""
        parts = [part.name for part in getattr(module, "parts", ())] or [WHOLE]
        return [(part, tensor_name(self.layer, part, self.kind)) for part in parts]


def targets(layers: Sequence[str], without: Sequence[str]) -> list[Target]:
    """Weight and input of every layer that no pattern leaves out.

    Raises:
        ValueError: if a pattern matches no layer, or nothing is left.
    """
    for pattern in without:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(f"without: {pattern!r} matches none of the layers {', '.join(layers)}")
    kept = [layer for layer in layers if not any(fnmatchcase(layer, pattern) for pattern in without)]
    if not kept:
        raise ValueError("there is no layer to measure: every one is left out, or none can be quantized")
    return [Target(layer, kind) for layer in kept for kind in KINDS]


class Derivatives:
    """Derivatives of one network's loss; the network is in float and in evaluation mode.

    Args:
        network: its parameters' ``requires_grad`` is as before after every call.
        loss: see ``Loss``.
        wanted: what is differentiated.
    """

    def __init__(self, network: nn.Module, loss: Loss, wanted: Sequence[Target]) -> None:
        self.network = network
        self.loss = loss
        self.wanted = list(wanted)
        self.modules = dict(network.named_modules())

    def squares(self, image: Tensor, label: Any) -> dict[str, float]:
        """Tensor's name → sum of the squared gradients over its values, over all images for an input."""
        with self._graph(image, label) as (value, tensors):
            gradients = self._gradients(value, tensors, graph=False)
        sums = self._no_sums()
        for target, found in gradients.items():
            for gradient in found:
                self._add(sums, target, gradient, gradient)
        return _finite(sums)

    def products(self, image: Tensor, label: Any, seeds: Sequence[int]) -> dict[str, float]:
        """Tensor's name → mean of vᵀHv for its block of the Hessian, one v of random signs for each seed.

        Hutchinson's estimator (1989) with Rademacher probes: unbiased for the block's trace. All blocks go in one
        double backward, since what a probe's other blocks add has mean 0. The first backward is shared by all seeds.
        """
        totals: dict[str, float] = {}
        try:
            with self._graph(image, label) as (value, tensors):
                slopes = self._slopes(value, tensors)
                for number, seed in enumerate(seeds):
                    last = number == len(seeds) - 1
                    for name, found in self._probe(tensors, slopes, seed, keep_graph=not last).items():
                        totals[name] = totals.get(name, 0.0) + found / len(seeds)
        except _NotTwiceError as error:
            raise self._not_twice(image, label, error) from error
        return totals

    def _slopes(self, value: Tensor, tensors: Mapping[Target, Sequence[Tensor]]) -> list[GradientEdge | None]:
        """Where the graph of each gradient begins, without the gradient itself; none where it is a constant."""
        gradients = self._gradients(value, tensors, graph=True)
        flat = [gradient for target in self.wanted for gradient in gradients[target]]
        return [get_gradient_edge(gradient) if gradient.requires_grad else None for gradient in flat]

    def _probe(
        self,
        tensors: Mapping[Target, Sequence[Tensor]],
        slopes: Sequence[GradientEdge | None],
        seed: int,
        keep_graph: bool,
    ) -> dict[str, float]:
        flat = [(target, tensor) for target in self.wanted for tensor in tensors[target]]
        probes = _signs([tensor for _, tensor in flat], seed)
        sums = self._no_sums()
        curved = [(edge, v) for edge, v in zip(slopes, probes, strict=True) if edge is not None]
        # A probe enters the graph where its turn comes, and what is inside the graph is summed up when it passes:
        # neither is kept in float for all layers at once. All of the inside lies on ways to leaves.
        ends = [(target, v, t) for (target, t), v in zip(flat, probes, strict=True) if t.is_leaf]
        inner = [(target, v, t) for (target, t), v in zip(flat, probes, strict=True) if not t.is_leaf]
        hooks = [
            tensor.register_hook(lambda h, target=target, v=v: self._add(sums, target, v, h))
            for target, v, tensor in inner
        ]
        for edge, v in curved:
            hooks.append(edge.node.register_prehook(partial(_entering, edge.output_nr, v, flat[0][1].dtype)))
        nothing = [flat[0][1].new_zeros(()).expand(v.shape) for _, v in curved]
        try:
            found = (
                torch.autograd.grad(
                    [edge for edge, _ in curved],
                    [tensor for _, _, tensor in ends],
                    nothing,
                    retain_graph=keep_graph,
                    allow_unused=True,
                )
                if curved
                else [None] * len(ends)
            )
        except RuntimeError as error:
            raise _NotTwiceError(str(error)) from error
        finally:
            for hook in hooks:
                hook.remove()
        for (target, v, _), h in zip(ends, found, strict=True):
            if h is not None:
                self._add(sums, target, v, h)
        return _finite(sums)

    def _gradients(
        self, value: Tensor, tensors: Mapping[Target, Sequence[Tensor]], graph: bool
    ) -> dict[Target, list[Tensor]]:
        flat = [tensor for target in self.wanted for tensor in tensors[target]]
        if not value.requires_grad:
            last = self.wanted[-1].layer
            raise ValueError(
                f"the loss does not depend on any layer, not even on the last one, layer '{last}'"
            )
        try:
            found = iter(torch.autograd.grad(value, flat, create_graph=graph, allow_unused=True))
        except RuntimeError as error:
            raise ValueError(f"the loss cannot be differentiated: {error}") from error
        gradients: dict[Target, list[Tensor]] = {}
        for target in self.wanted:
            for _ in tensors[target]:
                gradient = next(found)
                if gradient is None:
                    raise ValueError(
                        f"the loss does not depend on layer '{target.layer}': something behind it detaches or ignores its "
                        f"result; leave it out (without=['{target.layer}']) or use a loss that sees it"
                    )
                gradients.setdefault(target, []).append(gradient)
        if graph and _is_once_only(value):
            raise _NotTwiceError("it is marked as once_differentiable")
        return gradients

    @contextmanager
    def _graph(self, image: Tensor, label: Any) -> Iterator[tuple[Tensor, dict[Target, list[Tensor]]]]:
        """The loss with its graph, and the tensors that it is differentiated by: one, or one for each call."""
        tensors: dict[Target, list[Tensor]] = {target: [] for target in self.wanted}
        hooks = []

        def mark(target: Target, args: Any, kwargs: Any) -> tuple[Any, Any]:
            by_name = not args
            tensor = kwargs["input"] if by_name else args[0]
            # An alias that only this layer reads: the derivative by it is that by a perturbation of what goes in here.
            alias = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_(True)
            tensors[target].append(alias)
            return (args, {**kwargs, "input": alias}) if by_name else ((alias, *args[1:]), kwargs)

        # Only the plain attention kernel can be differentiated twice.
        with self._light(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for target in self.wanted:
                module = self.modules[target.layer]
                if target.kind == "input":
                    hooks.append(
                        module.register_forward_pre_hook(
                            lambda _, args, kwargs, target=target: mark(target, args, kwargs),
                            with_kwargs=True,
                        )
                    )
                else:
                    weight = cast(Tensor, module.weight)
                    if weight.is_leaf:
                        weight.requires_grad_(True)
                    tensors[target].append(weight)
            try:
                value = self.loss(self.network(image), label)
                self._check(value, image)
                for target in self.wanted:
                    if not tensors[target]:
                        raise ValueError(
                            f"layer '{target.layer}' does not run on this batch; leave it out "
                            f"(without=['{target.layer}'])"
                        )
                yield value, tensors
            finally:
                for hook in hooks:
                    hook.remove()

    @contextmanager
    def _light(self) -> Iterator[None]:
        """For a while nothing requires a gradient, and batch norm in evaluation is the affine map that it computes.

        Its own backward keeps its input, and its second derivative is a long formula; an affine map's are neither.
        Weights that are computed, such as those of weight norm, are computed once.
        """
        required = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        norms = [module for module in self.modules.values() if _is_affine(module)]
        try:
            for parameter, _ in required:
                parameter.requires_grad_(False)
            for norm in norms:
                norm.__dict__["forward"] = _affine(norm)
            with parametrize.cached():
                yield
        finally:
            for norm in norms:
                norm.__dict__.pop("forward", None)
            for parameter, before in required:
                parameter.requires_grad_(before)

    def _check(self, value: Any, image: Tensor) -> None:
        if not isinstance(value, Tensor) or value.dim() != 0:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss is {found}, expected one number, a 0-dim tensor")
        number = float(value.detach())
        if math.isfinite(number):
            return
        found = self._first_not_finite(image)
        where = (
            f"the first layer whose output is not finite is '{found}'"
            if found
            else "the network's output is finite"
        )
        raise ValueError(f"the loss is {number}: {where}")

    @torch.no_grad()
    def _first_not_finite(self, image: Tensor) -> str:
        seen: list[str] = []
        hooks = []
        for name, module in self.modules.items():
            if any(True for _ in module.children()):
                continue
            hooks.append(
                module.register_forward_hook(
                    lambda _, args, out, name=name: (
                        None if all(torch.isfinite(t).all() for t in tree_leaves(out) if isinstance(t, Tensor)) else seen.append(name)
                    )
                )
            )  # fmt: skip
        try:
            self.network(image)
        finally:
            for hook in hooks:
                hook.remove()
        return seen[0] if seen else ""

    def _not_twice(self, image: Tensor, label: Any, error: Exception) -> ValueError:
        """An error that names the layer behind which the operation without a second derivative lies."""
        everything, named = self.wanted, "the network"
        for layer in reversed(dict.fromkeys(target.layer for target in everything)):
            target = Target(layer, "input")
            self.wanted = [target]
            try:
                with self._graph(image, label) as (value, tensors):
                    self._probe(tensors, self._slopes(value, tensors), 0, keep_graph=False)
            except _NotTwiceError:
                named = f"layer '{layer}'"
                break
            finally:
                self.wanted = everything
        return ValueError(
            f"an operation behind {named} cannot be differentiated twice: {error}; use one that can, or another metric"
        )

    def _no_sums(self) -> dict[str, float]:
        return {name: 0.0 for t in self.wanted for _, name in t.names(self.modules[t.layer])}

    def _add(self, sums: dict[str, float], target: Target, first: Tensor, second: Tensor) -> None:
        """Add Σ a·b to a tensor's sum, parts apart."""
        module: Any = self.modules[target.layer]
        sizes = [part.channels for part in getattr(module, "parts", ())]
        axis = self._axis(module, first, target.kind)
        product = first.to(second.dtype) * second.detach()
        channels = product.sum([d for d in range(product.dim()) if d != axis]).double()
        pieces = channels.split(sizes or [len(channels)])
        for (_, name), piece in zip(target.names(module), pieces, strict=True):
            sums[name] += float(piece.sum())

    @staticmethod
    def _axis(module: Any, tensor: Tensor, kind: Kind) -> int:
        """Where the input channels are."""
        if kind == "weight":
            return (
                0 if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 1
            )
        return tensor.dim() + 1 - int(module.weight.dim())


def _finite(sums: dict[str, float]) -> dict[str, float]:
    for name, number in sums.items():
        if not math.isfinite(number):
            raise ValueError(f"the derivative by '{name}' is {number}, though the loss is finite")
    return sums


class _NotTwiceError(Exception):
    """What was differentiated has no derivative again."""


_ONCE = once_differentiable(lambda context: None).__code__  # of the wrapper that it puts around a backward


def _is_once_only(value: Tensor) -> bool:
    """Whether an operation on the way to a value is marked as having no second derivative.

    torch cuts the graph behind it, and finds a second derivative of 0 there without a word.
    """
    if value.grad_fn is None:
        return False
    for node in {value.grad_fn, *_reached([value.grad_fn])}:
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _ONCE:
            return True
    return False


def _is_affine(module: nn.Module) -> bool:
    """Whether a module is a batch norm with fixed statistics, whose forward is torch's own."""
    return (
        isinstance(module, _BatchNorm)
        and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        and not module.training
        and module.running_mean is not None
        and module.running_var is not None
    )


def _affine(norm: Any) -> Callable[[Tensor], Tensor]:
    """What a batch norm computes in evaluation: (x - μ)·γ/√(σ² + ε) + β, as one multiplication and addition."""
    gain = torch.rsqrt(norm.running_var + norm.eps)
    gain = gain if norm.weight is None else gain * norm.weight.detach()
    shift = -norm.running_mean * gain
    shift = shift if norm.bias is None else shift + norm.bias.detach()

    def forward(input: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (input.dim() - 2))
        return torch.addcmul(shift.view(shape), input, gain.view(shape))

    return forward


def _entering(
    number: int, probe: Tensor, dtype: torch.dtype, slopes: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What enters a node of the graph, with a probe added to one of its tensors."""
    return (*slopes[:number], probe.to(dtype).add_(slopes[number]), *slopes[number + 1 :])


def _reached(nodes: Iterable[Node | None]) -> set[Node]:
    """All nodes of the graph to which a way leads from some."""
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        following = {function for function, _ in node.next_functions if function is not None} - seen
        seen |= following
        waiting += following
    return seen


def _signs(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """+1 or -1 with equal chance for every value of every tensor, int8; the same for the same seed and device."""
    generator = torch.Generator(device=like[0].device).manual_seed(seed)
    signs = []
    for tensor in like:
        # Eight bytes a draw, and the last bit of each: the drawing itself is what takes time.
        drawn = torch.empty(tensor.numel() // 8 + 1, dtype=torch.int64, device=tensor.device)
        bits = drawn.random_(generator=generator).view(torch.int8)[: tensor.numel()]
        signs.append(bits.bitwise_and_(1).mul_(2).sub_(1).view(tensor.shape))
    return signs
