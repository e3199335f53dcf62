"""``equalize``: the channels of what a layer reads brought to one range, so that one scale serves them all.

An activation has one scale, which its widest channels decide; at few bits the others are rounded away. But a float
network is the same function when channel c of a layer's result is divided by g > 0 and every weight that reads it is
multiplied by g, as long as what lies between is homogeneous: ReLU, pooling, interpolation, concatenation (cross-layer
equalization, Nagel et al., ICCV 2019, section 4.1). They choose g from weights alone. Behind a norm the weights that
make a channel say nothing of its range, and low-bit weights have a scale for each output channel; so g comes from what
was seen of the activations, as in SmoothQuant (Xiao et al., ICML 2023, equation 4 with α = 1), and is a power of two:
the float network then computes the same, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import PAIRED_NORMS, QuantizedLayer, SplitLayer, is_quantizable
from .calibrate import image_of
from .observe import LAYERS, TRANSPOSED, LayerCall, Operation, Trace, evaluating, observe, shares_weight

__all__ = ["equalize"]

logger = logging.getLogger(__name__)

# Operations with f(g·x) = g·f(x) for g > 0, channel by channel, that leave the channels where they are.
_HOMOGENEOUS = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "max_pool1d", "max_pool2d", "max_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "clone", "contiguous", "detach", "alias", "constant_pad_nd",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "add", "add_", "native_dropout", "dropout", "feature_dropout",
}  # fmt: skip
_SPLITS = ("split", "split_with_sizes", "chunk")
_FIXED = 0
_LARGEST = 6
"""Of the exponents, either way: a channel that is nearly dead keeps a range that training can use."""

_NORMS = (
    *PAIRED_NORMS,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
)


@torch.no_grad()
def equalize(network: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Divide the channels of a float network's activations by powers of two so that all have about one range, in place.

    The range of a channel is its largest magnitude in a batch, averaged over the batches. Channels that meet in an
    addition share a factor. Where something else than a homogeneous operation reads a channel (an unfolded norm, a
    sigmoid, attention, the user), it stays as it is. In evaluation the network's output is the same bit for bit, as long
    as no value leaves float32's normal range.

    Args:
        network: float, not split yet; its mode is kept.
        batches: of *training* data: tensors (N, C, …), or batches with the image first or under ``"image"``; at least one.

    Returns:
        the network.

    Raises:
        ValueError: if the network is quantized or split, there is no batch, a batch holds NaN or infinity, the network
            fails on it, or has convolutions that do not run in evaluation (what they read would change unseen);
            nothing is changed then.

    Example:
        >>> equalize(network, batches)
        >>> quantize(network, plan)
    """
    modules = dict(network.named_modules())
    for name, module in modules.items():
        if isinstance(module, (QuantizedLayer, SplitLayer)):
            done = "quantized" if isinstance(module, QuantizedLayer) else "split"
            raise ValueError(
                f"layer '{name}' is {done}: equalize the float network, before split and quantize"
            )
    device = next(network.parameters()).device
    images = [image_of(batch).to(device) for batch in batches]
    if not images:
        raise ValueError("equalize: no batch was given, expected at least one of training data")
    for number, image in enumerate(images):
        if not torch.isfinite(image).all():
            raise ValueError(f"equalize: batch {number} holds NaN or infinity: repair or exclude it")
    flow = _follow(network, observe(network, images[0][:1]))
    asleep = [n for n, m in modules.items() if isinstance(m, LAYERS) and n not in flow.ran]
    if asleep:
        raise ValueError(
            f"layer '{asleep[0]}' does not run in evaluation, so what it reads cannot be followed: "
            "switch on the output that it belongs to (deep supervision), or train without equalization"
        )
    exponents = _exponents(flow, _ranges(network, flow.readers, images))
    for name, channels in flow.makers.items():
        _divide(modules[name], torch.exp2(exponents[channels]).to(device))
    for name, channels in flow.readers.items():
        _multiply(modules[name], torch.exp2(exponents[channels]).to(device))
    moved = int((exponents != 0).sum())
    logger.info("equalized: %d of %d channels changed their range", moved, flow.free)
    return network


@dataclass
class _Flow:
    """Whose channels go where: each has a number, channels that must share a factor have the same, 0 keeps its own.

    Attributes:
        makers: norm, or layer without one, → numbers of the channels that its parameters can divide.
        readers: layer → numbers of the channels that its weight can multiply.
        ran: layers that ran.
    """

    makers: dict[str, np.ndarray] = field(default_factory=dict)
    readers: dict[str, np.ndarray] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    parents: list[int] = field(default_factory=lambda: [_FIXED])
    values: dict[int, np.ndarray] = field(default_factory=dict)  # of each tensor, its channels' numbers

    @property
    def free(self) -> int:
        """Channels that may get a factor, those that share one counted once."""
        return len({int(n) for channels in self.makers.values() for n in channels} - {_FIXED})

    def new(self, count: int) -> np.ndarray:
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def join(self, *together: np.ndarray) -> np.ndarray:
        """Channels of the same place get the same number; all are fixed where their counts differ."""
        if len({len(channels) for channels in together}) > 1:
            for channels in together:
                self.fix(channels)
            return together[0]
        for others in together[1:]:
            for one, other in zip(together[0], others, strict=True):
                low, high = sorted((self.root(int(one)), self.root(int(other))))
                self.parents[high] = low  # 0 stays a root
        return together[0]

    def fix(self, channels: np.ndarray) -> None:
        for number in channels:
            self.parents[self.root(int(number))] = _FIXED

    def settle(self) -> None:
        """Every number is its root's."""
        for found in (self.makers, self.readers):
            for name, channels in found.items():
                found[name] = np.array([self.root(int(number)) for number in channels], dtype=np.int64)


def _follow(network: nn.Module, trace: Trace) -> _Flow:
    flow, modules = _Flow(), dict(network.named_modules())
    norms = {name: module for name, module in modules.items() if type(module) in _NORMS}
    # A norm's result is the last tensor that it made; of one that runs twice nothing is known.
    results: dict[str, int] = {}
    for op in trace.operations:
        if op.module in norms:
            results[op.module] = op.outputs[0]
    kernels = [op.module for op in trace.operations if op.module in norms and "norm" in op.name]
    calls = list(trace.calls)
    for position, op in enumerate(trace.operations):
        while calls and calls[0].position <= position:
            _call(flow, trace, network, modules[calls[0].layer], calls.pop(0))
        if op.module in norms:
            affine = norms[op.module]._parameters.get("weight") is not None
            once = kernels.count(op.module) == 1 and affine and not shares_weight(network, norms[op.module])
            _norm(flow, trace, op, results[op.module] if once else None)
        elif not op.layer:
            _operation(flow, trace, op)
    for call in calls:
        _call(flow, trace, network, modules[call.layer], call)
    for tensor in (trace.network_input, *trace.network_outputs):
        flow.fix(_channels(flow, trace, tensor))
    flow.settle()
    return flow


def _channels(flow: _Flow, trace: Trace, tensor: int) -> np.ndarray:
    """The numbers of a tensor's channels; fixed ones where nothing is known of it."""
    shape = trace.shapes[tensor]
    known = flow.values.get(tensor)
    if known is not None and len(shape) > 1 and len(known) == shape[1]:
        return known
    if known is not None:
        flow.fix(known)
    return np.zeros(shape[1] if len(shape) > 1 else 1, dtype=np.int64)


def _call(flow: _Flow, trace: Trace, network: nn.Module, module: nn.Module, call: LayerCall) -> None:
    name, read = call.layer, _channels(flow, trace, call.input)
    flow.ran.add(name)
    plain = is_quantizable(module) and not isinstance(module, nn.Linear) and call.channels_second
    if not plain or "weight" not in module._parameters or shares_weight(network, module):
        flow.fix(read)
        return
    flow.readers[name] = flow.join(flow.readers[name], read) if name in flow.readers else read
    made = flow.new(call.output_shape[1])
    flow.makers[name] = flow.join(flow.makers[name], made) if name in flow.makers else made
    flow.values[call.output] = made


def _norm(flow: _Flow, trace: Trace, op: Operation, result: int | None) -> None:
    """An operation of a norm: nothing passes through it, and its γ and β make what comes out."""
    for tensor in op.inputs:
        flow.fix(_channels(flow, trace, tensor))
    for tensor in op.outputs:
        if tensor != result:
            flow.values.pop(tensor, None)
    if result in op.outputs and op.module not in flow.makers:
        flow.makers[op.module] = flow.values[result] = flow.new(trace.shapes[result][1])


def _operation(flow: _Flow, trace: Trace, op: Operation) -> None:
    first, after = op.inputs[:1], [trace.shapes[tensor] for tensor in op.outputs]
    before = [_channels(flow, trace, tensor) for tensor in op.inputs]
    if op.name == "cat" and _axis(op, after[0]) == 1:
        flow.values[op.outputs[0]] = np.concatenate(before)
    elif op.name in _SPLITS and _axis(op, after[0]) == 1:
        at = np.cumsum([shape[1] for shape in after])[:-1]
        flow.values |= dict(zip(op.outputs, np.split(before[0], at), strict=True))
    elif op.name in (*_SPLITS, "slice", "cat") and first and _axis(op, after[0]) != 1:
        flow.values |= dict.fromkeys(op.outputs, flow.join(*before))
    elif op.name in _HOMOGENEOUS and op.constant == 0 and first:
        joined = flow.join(*before[:1]) if op.name == "_prelu_kernel" else flow.join(*before)
        flow.values |= dict.fromkeys(op.outputs, joined)
    else:
        for channels in before:
            flow.fix(channels)
        for tensor in op.outputs:
            if tensor in flow.values:  # changed in place
                flow.fix(flow.values[tensor])


def _axis(op: Operation, shape: tuple[int, ...]) -> int:
    return int(op.arguments.get("dim", 0)) % len(shape)


def _ranges(network: nn.Module, readers: Mapping[str, np.ndarray], images: list[Tensor]) -> dict[str, Tensor]:
    """Layer → the largest magnitude of each channel that it reads, averaged over batches; float64, on the CPU."""
    sums = {name: torch.zeros(len(channels), dtype=torch.float64) for name, channels in readers.items()}
    with _seen(network, sums), evaluating(network):
        for image in images:
            network(image)
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ValueError(
                f"layer '{name}' reads NaN or infinity: the network is broken, equalize cannot help"
            )
    return {name: total / len(images) for name, total in sums.items()}


@contextmanager
def _seen(network: nn.Module, sums: dict[str, Tensor]) -> Iterator[None]:
    """While it lasts, every call of a layer adds the largest magnitudes of its input's channels."""

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: Any, kwargs: Any) -> None:
            read = (args[0] if args else kwargs["input"]).as_subclass(Tensor)
            sums[name] += read.abs().transpose(0, 1).flatten(1).amax(1).double().cpu()

        return add

    hooks = [
        network.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in sums
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _exponents(flow: _Flow, ranges: Mapping[str, Tensor]) -> Tensor:
    """The exponent of each number's factor, float32: its range over the mean one of the channels read beside it.

    The geometric mean of all channels that meet in some layer's input, directly or over others, so that weights keep
    their size on average.
    """
    count = len(flow.parents)
    largest = np.zeros(count)
    beside = _Flow(parents=list(range(count)))
    for name, channels in flow.readers.items():
        np.maximum.at(largest, channels, ranges[name].numpy())
        free = channels[channels != _FIXED]
        for number in free[1:]:
            beside.join(free[:1], np.array([number]))
    exponents = np.zeros(count)
    largest[_FIXED] = 0
    together: dict[int, list[int]] = {}
    for number in np.flatnonzero(largest):  # a dead channel keeps its range
        together.setdefault(beside.root(int(number)), []).append(int(number))
    for numbers in together.values():
        logs = np.log2(largest[numbers])
        exponents[numbers] = np.clip(np.round(logs - logs.mean()), -_LARGEST, _LARGEST)
    return torch.from_numpy(exponents).float()


def _divide(maker: nn.Module, factors: Tensor) -> None:
    """What it makes is divided by ``factors``, one a channel."""
    weight, bias = maker.weight, maker.bias
    assert isinstance(weight, Tensor)
    if type(maker) in _NORMS:
        weight.div_(factors)
    elif isinstance(maker, TRANSPOSED):
        grouped = factors.view(maker.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight.copy_((weight.unflatten(0, (maker.groups, -1)) / grouped).flatten(0, 1))
    else:
        weight.div_(factors.view(-1, *[1] * (weight.dim() - 1)))
    if isinstance(bias, Tensor):
        bias.div_(factors)


def _multiply(reader: nn.Module, factors: Tensor) -> None:
    """What it reads comes divided by ``factors``, one a channel."""
    weight = reader.weight
    assert isinstance(weight, Tensor)
    spatial = [1] * (weight.dim() - 2)
    if isinstance(reader, TRANSPOSED):
        weight.mul_(factors.view(-1, 1, *spatial))
        return
    groups = int(reader.groups)  # type: ignore[arg-type]
    grouped = factors.view(groups, 1, -1, *spatial)
    weight.copy_((weight.unflatten(0, (groups, -1)) * grouped).flatten(0, 1))
