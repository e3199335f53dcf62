"""First and second derivatives of a loss with respect to every weight and every layer's input at once.

An input is no parameter: a perturbation of zeros is added to it in front of its layer, and differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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
        return self._sums({target: [(g, g) for g in found] for target, found in gradients.items()})

    def products(self, image: Tensor, label: Any, seed: int) -> dict[str, float]:
        """Tensor's name → vᵀHv for its block of the Hessian, v of random signs: unbiased for the block's trace.

        Hutchinson's estimator (1989) with Rademacher probes, all blocks in one double backward: what a probe's other
        blocks add has mean 0.
        """
        with self._graph(image, label) as (value, tensors):
            gradients = self._gradients(value, tensors, graph=True)
            probes = _signs(
                {t: [g.shape for g in found] for t, found in gradients.items()}, image.device, seed
            )
            flat = [tensor for t in self.wanted for tensor in tensors[t]]
            inner = [
                (g * v).sum() for t in self.wanted for g, v in zip(gradients[t], probes[t], strict=True) if g.requires_grad
            ]  # fmt: skip
            if not inner:  # the gradient is a constant
                return {name: 0.0 for t in self.wanted for _, name in t.names(self.modules[t.layer])}
            try:
                second = torch.autograd.grad(sum(inner[1:], start=inner[0]), flat, allow_unused=True)
            except RuntimeError as error:
                raise self._not_twice(image, label, error) from error
        remaining = iter(second)
        pairs = {
            t: [
                (v, torch.zeros_like(v) if h is None else h)
                for v, h in ((v, next(remaining)) for v in probes[t])
            ]
            for t in self.wanted
        }
        return self._sums(pairs)

    def _gradients(
        self, value: Tensor, tensors: Mapping[Target, Sequence[Tensor]], graph: bool
    ) -> dict[Target, list[Tensor]]:
        flat = [tensor for target in self.wanted for tensor in tensors[target]]
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
        return gradients

    @contextmanager
    def _graph(self, image: Tensor, label: Any) -> Iterator[tuple[Tensor, dict[Target, list[Tensor]]]]:
        """The loss with its graph, and the tensors that it is differentiated by: one, or one for each call."""
        tensors: dict[Target, list[Tensor]] = {target: [] for target in self.wanted}
        hooks = []
        weights = [cast(Tensor, self.modules[t.layer].weight) for t in self.wanted if t.kind == "weight"]
        frozen = [weight for weight in weights if weight.is_leaf and not weight.requires_grad]

        def perturb(target: Target, args: Any, kwargs: Any) -> tuple[Any, Any]:
            by_name = not args
            tensor = kwargs["input"] if by_name else args[0]
            zeros = torch.zeros_like(tensor, requires_grad=True)
            tensors[target].append(zeros)
            moved = tensor + zeros
            return (args, {**kwargs, "input": moved}) if by_name else ((moved, *args[1:]), kwargs)

        for target in self.wanted:
            module = self.modules[target.layer]
            if target.kind == "input":
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, target=target: perturb(target, args, kwargs),
                        with_kwargs=True,
                    )
                )
            else:
                tensors[target].append(cast(Tensor, module.weight))
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            # Only the plain attention kernel can be differentiated twice.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                value = self.loss(self.network(image), label)
                self._check(value, image)
                idle = [target.layer for target in self.wanted if not tensors[target]]
                if idle:
                    raise ValueError(
                        f"layer '{idle[0]}' does not run on this batch; leave it out (without=['{idle[0]}'])"
                    )
                yield value, tensors
        finally:
            for hook in hooks:
                hook.remove()
            for weight in frozen:
                weight.requires_grad_(False)

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

    def _not_twice(self, image: Tensor, label: Any, error: RuntimeError) -> ValueError:
        """An error that names the layer behind which the operation without a second derivative lies."""
        everything, named = self.wanted, "the network"
        inputs = [target for target in everything if target.kind == "input"]
        for target in reversed(inputs):
            self.wanted = [target]
            try:
                with self._graph(image, label) as (value, tensors):
                    (gradient,) = self._gradients(value, tensors, graph=True)[target][:1]
                    if gradient.requires_grad:
                        torch.autograd.grad(gradient.sum(), tensors[target], allow_unused=True)
            except RuntimeError:
                named = f"layer '{target.layer}'"
                break
            finally:
                self.wanted = everything
        return ValueError(
            f"an operation behind {named} cannot be differentiated twice: {error}; use one that can, or another metric"
        )

    def _sums(self, pairs: Mapping[Target, Sequence[tuple[Tensor, Tensor]]]) -> dict[str, float]:
        """Σ a·b for every tensor, parts apart."""
        sums: dict[str, float] = {}
        for target, found in pairs.items():
            module: Any = self.modules[target.layer]
            parts = target.names(module)
            for _, name in parts:
                sums[name] = 0.0
            for first, second in found:
                product = (first.detach() * second.detach()).double()
                sizes = [part.channels for part in getattr(module, "parts", ())]
                pieces = (
                    product.split(sizes, self._axis(module, product, target.kind)) if sizes else (product,)
                )
                for (_, name), piece in zip(parts, pieces, strict=True):
                    sums[name] += float(piece.sum())
        return sums

    @staticmethod
    def _axis(module: Any, tensor: Tensor, kind: Kind) -> int:
        """Where the input channels are."""
        if kind == "weight":
            return (
                0 if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 1
            )
        return tensor.dim() + 1 - int(module.weight.dim())


def _signs(
    shapes: Mapping[Target, Sequence[torch.Size]], device: torch.device, seed: int
) -> dict[Target, list[Tensor]]:
    """+1 or -1 with equal chance for every value; the same for the same seed and device."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return {
        target: [
            torch.randint(0, 2, shape, generator=generator, device=device).float().mul_(2).sub_(1)
            for shape in found
        ]
        for target, found in shapes.items()
    }
