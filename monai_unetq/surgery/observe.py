"""``observe``: one forward pass, recorded operation by operation, and what it tells about the layers.

Nothing is concluded from class names: which batch norm follows which convolution, and which tensors can be
negative, is read off the operations that ran (design decision 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..layers import PAIRED_NORMS, QUANTIZED_LAYERS, PairedNorm, QuantizedLayer

__all__ = ["LayerCall", "Operation", "Trace", "evaluating", "example_for", "observe"]

LAYERS: tuple[type[nn.Module], ...] = (*QUANTIZED_LAYERS, QuantizedLayer)
NORMS: tuple[type[nn.Module], ...] = (*PAIRED_NORMS, PairedNorm)
UNFOLDED_NORMS: tuple[type[nn.Module], ...] = (_InstanceNorm, nn.GroupNorm)
"""Norms whose statistics are the image's own: no weight can hold them."""
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Operations whose result is never negative, whatever goes in.
_NEVER_NEGATIVE = {
    "relu",
    "relu_",
    "sigmoid",
    "sigmoid_",
    "abs",
    "exp",
    "softmax",
    "_softmax",
    "square",
    "hardsigmoid",
}
# Operations whose result is never negative where no tensor that goes in is: they select, average, add or move.
_KEEP_SIGN = {
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d",
    "avg_pool3d", "avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "adaptive_avg_pool1d", "cat", "stack", "add", "add_", "mul", "mul_", "mean", "sum", "amax",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "view", "_unsafe_view", "reshape", "permute", "transpose", "t",
    "slice", "select", "squeeze", "unsqueeze", "expand", "clone", "contiguous", "_to_copy", "detach", "alias",
    "native_dropout", "dropout", "split", "split_with_sizes", "chunk", "pixel_shuffle", "flatten", "roll",
    "constant_pad_nd",
}  # fmt: skip
_WITH_NUMBER = {"add", "add_", "mul", "mul_", "constant_pad_nd"}  # … and no number that they take is negative

Pieces = tuple[tuple[int, bool], ...]
"""Channels of each tensor in a concatenation, and whether they could be negative."""


@dataclass(frozen=True)
class Operation:
    """One operation of the pass.

    Attributes:
        name: its aten name.
        module: the innermost module it ran in.
        inputs: numbers of the tensors that went in.
        outputs: numbers of the tensors that came out.
        constant: the number that an addition adds or a padding pads with; 0 for any other operation.
        layer: the convolution, transposed convolution or linear layer that it is part of; empty outside of them.
        pointwise: whether every value of the result comes from the values at its place alone.
        arguments: its other arguments, by name; empty inside layers.
    """

    name: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constant: float = 0.0
    layer: str = ""
    pointwise: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerCall:
    """One call of a convolution, transposed convolution or linear layer.

    Attributes:
        layer: its name.
        input: number of the tensor that went in.
        output: number of the tensor that came out.
        input_shape: shape of the input, batch first.
        output_shape: shape of the output.
        signed: whether the input could be negative when the layer ran (later it may be changed in place).
        pieces: of an input that was concatenated along its channels, (channels, whether they could be negative) of each
            tensor in it; else empty.
        channels_second: whether the output has its channels in axis 1, where a batch norm takes them: not so
            for a linear layer on sequences, nor without a batch axis.
        position: how many operations of the trace had run when it returned.
    """

    layer: str
    input: int
    output: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    signed: bool
    channels_second: bool
    position: int = 0
    pieces: Pieces = ()


@dataclass
class Trace:
    """The record of one forward pass; tensors are numbered in the order they appeared."""

    operations: list[Operation] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)
    norm_inputs: dict[str, list[int]] = field(default_factory=dict)
    unfolded_norms: set[str] = field(default_factory=set)
    network_input: int = -1
    network_outputs: set[int] = field(default_factory=set)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    nonnegative: set[int] = field(default_factory=set)

    def layers(self) -> list[str]:
        """Names of the layers in the order they first ran."""
        return list(dict.fromkeys(call.layer for call in self.calls))

    def image_layers(self) -> list[str]:
        """Names of the layers that the network's input goes into as it is, in the order they first ran."""
        found = (call.layer for call in self.calls if call.input == self.network_input)
        return list(dict.fromkeys(found))

    def calls_of(self, layer: str) -> list[LayerCall]:
        """All calls of one layer."""
        return [call for call in self.calls if call.layer == layer]

    def takes_negative(self, layer: str, channels: range | None = None) -> bool:
        """Whether the layer's input, or some channels of it, can be negative in any of its calls (after ReLU it cannot)."""
        return any(_can_be_negative(call, channels) for call in self.calls_of(layer))

    def consumers(self, tensor: int) -> list[Operation]:
        """The operations that read a tensor."""
        return [op for op in self.operations if tensor in op.inputs]

    def paired_norms(self) -> dict[str, str]:
        """Layer → the batch norm that is its only consumer, for those that ran once each: what can be folded."""
        pairs = {}
        for norm, inputs in self.norm_inputs.items():
            producers = [call for call in self.calls if inputs == [call.output]]
            if len(producers) != 1 or not producers[0].channels_second:
                continue
            if len(self.calls_of(producers[0].layer)) != 1:
                continue
            output = producers[0].output
            alone = (
                all(op.module == norm for op in self.consumers(output)) and output not in self.network_outputs
            )
            if alone:
                pairs[producers[0].layer] = norm
        return pairs

    def normalized_layers(self) -> list[str]:
        """Names of the layers whose outputs instance or group norms read, and nothing else, in the order they ran."""
        others = {
            call.layer
            for call in self.calls
            if call.output in self.network_outputs
            or not call.channels_second
            or not (readers := {op.module for op in self.consumers(call.output)})
            or not readers <= self.unfolded_norms
        }
        return [layer for layer in self.layers() if layer not in others]


def _can_be_negative(call: LayerCall, channels: range | None) -> bool:
    if channels is None or not call.pieces:
        return call.signed
    begins = itertools.accumulate((count for count, _ in call.pieces), initial=0)
    return any(
        signed and begin < channels.stop and channels.start < begin + count
        for begin, (count, signed) in zip(begins, call.pieces, strict=False)
    )


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        # Concatenation and its axis, counted from the end → what is in it.
        self.pieces: dict[tuple[int, int], Pieces] = {}
        self.stack: list[str] = []
        self.layer = ""  # the one that is running
        self._numbers = (
            WeakTensorKeyDictionary()
        )  # keeps no tensor alive that the network itself is done with

    def number(self, tensor: Tensor) -> int:
        number = self._numbers.get(tensor)
        if number is None:
            number = self._numbers[tensor] = len(self.trace.shapes)
            self.trace.shapes[number] = tuple(tensor.shape)
        return int(number)

    def sharing_memory(self, changed: set[int]) -> set[int]:
        """The tensors that are views of one another with these, themselves included."""
        alive = [(int(number), tensor) for tensor, number in self._numbers.items()]
        memory = {tensor.untyped_storage()._cdata for number, tensor in alive if number in changed}
        return {number for number, tensor in alive if tensor.untyped_storage()._cdata in memory}

    def _concatenated(self, result: int, tensors: Sequence[int], axis: int) -> None:
        """Remember the pieces of a concatenation, those of its pieces among them."""
        shapes = self.trace.shapes
        from_end = axis - len(shapes[result]) if axis >= 0 else axis
        pieces: list[tuple[int, bool]] = []
        for tensor in tensors:
            if len(shapes[tensor]) != len(shapes[result]):  # torch leaves out what has shape (0,)
                continue
            alone = ((shapes[tensor][from_end], tensor not in self.trace.nonnegative),)
            pieces += self.pieces.get((tensor, from_end), alone)
        self.pieces[result, from_end] = tuple(pieces)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [self.number(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [self.number(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not results:
            return out
        name = func.overloadpacket.__name__
        if name == "cat":
            self._concatenated(
                results[0], tensors, args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            )
        elif self.pieces and (written := set(tensors) & set(results)):  # in place
            gone = self.sharing_memory(written)
            self.pieces = {key: pieces for key, pieces in self.pieces.items() if key[0] not in gone}
        module = self.stack[-1] if self.stack else ""
        numbers = [a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, (int, float))]
        constant = 0.0
        if name == "constant_pad_nd" or (name in ("add", "add_") and len(tensors) == 1):
            constant = float(numbers[0]) if numbers else 0.0
        arguments = {}
        if not self.layer:
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
            arguments = {
                name: value
                for name, value in {**given, **(kwargs or {})}.items()
                if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
            }
        pointwise = torch.Tag.pointwise in func.tags
        self.trace.operations.append(
            Operation(
                name, module, tuple(tensors), tuple(results), constant, self.layer, pointwise, arguments
            )
        )
        known = self.trace.nonnegative
        clamps_above = name in ("clamp", "clamp_", "hardtanh", "hardtanh_", "clamp_min", "clamp_min_") and (
            isinstance(low := (args[1] if len(args) > 1 else (kwargs or {}).get("min", -1)), (int, float))
            and low >= 0
        )
        # Of an addition this counts what is added and what it is multiplied with (alpha).
        numbers_fit = name not in _WITH_NUMBER or all(number >= 0 for number in numbers)
        if (
            name in _NEVER_NEGATIVE
            or clamps_above
            or (name in _KEEP_SIGN and numbers_fit and all(t in known for t in tensors))
        ):
            known.update(results)
        elif changed := known.intersection(results):  # in place: what shares the memory is changed too
            known -= self.sharing_memory(changed)
        return out


def observe(network: nn.Module, example: Tensor) -> Trace:
    """Run the network once on an example, in evaluation mode and without gradients, and record what happens.

    Args:
        network: float or quantized; its mode, its buffers and torch's random numbers are as before after it.
        example: (N, C, spatial…) or whatever its forward takes as one tensor, on the network's device.

    Raises:
        ValueError: if the network fails on the example; the message shows its shape and the cause.
    """
    # Subclasses such as MONAI's MetaTensor wrap every result anew, so that nothing could be followed.
    example = example.as_subclass(Tensor)
    recorder = _Recorder()
    trace = recorder.trace
    signs: list[tuple[bool, Pieces]] = []  # of the inputs of the layers being run
    names = {module: name for name, module in network.named_modules()}
    hooks: list[RemovableHandle] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.stack.append(names[module])
        if isinstance(module, UNFOLDED_NORMS):
            trace.unfolded_norms.add(names[module])
        if isinstance(module, (*NORMS, *LAYERS)):
            number = recorder.number(args[0] if args else kwargs["input"])
            if isinstance(module, NORMS):
                trace.norm_inputs.setdefault(names[module], []).append(number)
            else:
                channels = 1 - cast(Tensor, module.weight).dim()  # their axis
                signs.append((number not in trace.nonnegative, recorder.pieces.get((number, channels), ())))
                recorder.layer = names[module]

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        name = recorder.stack.pop()
        if isinstance(module, LAYERS):
            (signed, pieces), recorder.layer = signs.pop(), ""
            if not isinstance(out, Tensor):
                return  # it failed, and the network goes on without it
            tensor = args[0] if args else kwargs["input"]
            numbers = recorder.number(tensor), recorder.number(out)
            shapes = tuple(tensor.shape), tuple(out.shape)
            channels_second = out.dim() == cast(Tensor, module.weight).dim()
            position = len(trace.operations)
            trace.calls.append(LayerCall(name, *numbers, *shapes, signed, channels_second, position, pieces))

    try:
        for module in names:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no such hooks, and is a black box
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        with evaluating(network), _unchanged(network, example.device), torch.no_grad(), recorder:
            trace.network_input = recorder.number(example)
            out = network(example)
            trace.network_outputs.update(
                recorder.number(t) for t in tree_leaves(out) if isinstance(t, Tensor)
            )
    except Exception as error:
        raise ValueError(
            f"{type(network).__name__} failed on an example of shape {tuple(example.shape)}: {error}. "
            "Give an example that it accepts: example=torch.zeros(1, channels, *patch_size)"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def shares_weight(network: nn.Module, layer: nn.Module) -> bool:
    """Whether another layer uses the same weight parameter: a batch norm cannot be folded into it then."""
    weight = layer._parameters.get("weight")
    return sum(module._parameters.get("weight") is weight for module in network.modules()) > 1


def example_for(network: nn.Module) -> Tensor:
    """A batch of one that most segmentation networks accept: zeros with the first convolution's channels.

    Its size is 64 pixels in 2D, 32 voxels in 3D (divisible by 2^5).

    Raises:
        ValueError: if the network has no convolution; an example has to be given then.
    """
    for module in network.modules():
        if isinstance(module, LAYERS) and not isinstance(module, nn.Linear):
            weight = cast(Tensor, module.weight)
            dimensions = weight.dim() - 2
            shape = (1, cast(int, module.in_channels), *[64 if dimensions < 3 else 32] * dimensions)
            return torch.zeros(shape, device=weight.device, dtype=weight.dtype)
    raise ValueError(
        f"{type(network).__name__} has no convolution to take an example's shape from: give example="
    )


@contextmanager
def _unchanged(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers and random numbers as they were, whatever the network's forward does to them."""
    modules = (module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule))
    buffers = [(module, dict(module._buffers)) for module in modules]
    values = {id(b): (b, b.detach().clone()) for _, found in buffers for b in found.values() if b is not None}
    versions = {key: buffer._version for key, (buffer, _) in values.items()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, found in buffers:
            module._buffers.update(found)
        with torch.no_grad():
            for key, (buffer, value) in values.items():
                if buffer._version != versions[key]:
                    buffer.copy_(value)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode is restored after it."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
