"""Transposed convolutions as convolutions with a pixel shuffle behind them, for engines that are faster at these.

Output o of a transposed convolution with stride s, kernel K and padding p sums the inputs i with k = o + p − s·i in 0…K−1.
With o = s·j + r that is, for each remainder r, a convolution over j: it reads x[j + d] with tap k = r + p − s·d. The
convolutions of all remainders are one with sᴺ times the output channels, whose outputs ``DepthToSpace`` puts side by side
(sub-pixel convolution; Shi et al., CVPR 2016, section 2.2). Where K = s, each has one tap and none is zero. The first axes
may have the stride 1, as in nnU-Net's plans for thick slices: there is one remainder then, and nothing to put side by side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .lowering import add_initializer
from .simplify import attribute, constant, is_weight
from .trace import DOMAIN, TracedLayer

__all__ = ["SHUFFLE", "Phases", "is_shuffle", "shuffle_last", "spread"]

SHUFFLE = "DepthToSpace"
"""Of our domain, for any number of axes (ONNX's own has two): channel (r₁…r_N, c) goes to place s·j + r of channel c.

``blocksize`` is s, and ``kept`` how many spatial axes stand in front of these N and stay as they are.
"""

_ELEMENTWISE = ("Clip", "LeakyRelu", "QuantizeLinear", "Relu")


@dataclass(frozen=True)
class Phases:
    """One axis of a transposed convolution as the convolutions of its remainders.

    Attributes:
        taps: (s, T), the kernel's index that remainder r reads at x[j + t − before]; K where it reads none.
        before: zeros in front of the input.
        after: zeros behind it.
    """

    taps: np.ndarray
    before: int
    after: int

    @classmethod
    def of(cls, kernel: int, stride: int, before: int, after: int, output_padding: int) -> Phases | None:
        """Of a transposed convolution's axis; None where outputs are no multiple of the stride, or padding would be negative."""
        further = kernel - stride - before - after + output_padding
        if further % stride:
            return None
        remainders = np.arange(stride)
        first, last = (before - kernel + stride) // stride, (stride - 1 + before) // stride
        steps = np.arange(first, last + 1)
        taps = remainders[:, None] + before - stride * steps
        behind = further // stride + first + len(steps) - 1
        if first > 0 or behind < 0:
            return None
        return cls(np.where((taps >= 0) & (taps < kernel), taps, kernel), -int(first), behind)


def spread(graph: ir.Graph, layers: dict[str, TracedLayer]) -> dict[str, TracedLayer]:
    """Replace transposed convolutions with rounded weights and one stride, but for first axes of stride 1, in place.

    Left as they are: groups, dilation, other strides that differ between axes, a layer that is used twice.

    Args:
        graph: of a trace.
        layers: of a trace; left as it is.

    Returns:
        the layers, with the weights of those that were replaced.
    """
    found = dict(layers)
    used: Counter[str] = Counter()
    for node in filter(is_weight, graph):
        used[attribute(node, "layer")] += len(node.outputs[0].uses())
    for node in list(graph):
        maker = node.inputs[1].producer() if node.op_type == "ConvTranspose" and node.inputs[1] else None
        if maker is not None and is_weight(maker) and used[attribute(maker, "layer")] == 1:
            _spread(graph, node, maker, found)
    return found


def _spread(graph: ir.Graph, conv: ir.Node, maker: ir.Node, layers: dict[str, TracedLayer]) -> None:
    source, _, *rest = conv.inputs
    if source is None:
        return
    layer, kept = layers[attribute(maker, "layer")], constant(maker.inputs[0])
    bias = constant(rest[0]) if rest and rest[0] is not None else None
    if kept is None or layer.groups > 1 or (bias is None and rest):
        return
    axes = _axes(conv, kept.shape[2:])
    if axes is None:
        return
    strides = [len(axis.taps) for axis in axes]
    copies = math.prod(strides)
    layers[layer.name] = replace(
        layer,
        transposed=False,
        weights={
            part: replace(one, codes=_rows(one.codes, axes), scale=np.tile(one.scale, copies))
            for part, one in layer.weights.items()
        },
    )
    rows = _rows(kept.swapaxes(0, 1), axes)
    operands = [source, _weight(graph, maker, rows)]
    if bias is not None:
        operands.append(add_initializer(graph, ir.tensor(np.tile(bias, copies)), f"{layer.name}.bias_copies"))
    pads = [axis.before for axis in axes] + [axis.after for axis in axes]
    small = ir.node("Conv", operands, attributes={"kernel_shape": list(rows.shape[2:]), "pads": pads})
    sizes = {"blocksize": strides[-1], "kept": strides.count(1)}
    shuffle = ir.node(SHUFFLE, [small.outputs[0]], attributes=sizes, domain=DOMAIN)
    small.outputs[0].type, shuffle.outputs[0].type = conv.outputs[0].type, conv.outputs[0].type
    shuffle.outputs[0].shape = conv.outputs[0].shape
    graph.insert_before(conv, [small, shuffle])
    conv.outputs[0].replace_all_uses_with(shuffle.outputs[0], replace_graph_outputs=True)
    graph.remove(conv, safe=True)
    graph.remove(maker, safe=True)


def _axes(conv: ir.Node, kernel: Sequence[int]) -> list[Phases] | None:
    """The phases of each axis; None where they cannot be shuffled."""
    count = len(kernel)
    strides, dilations, padding = (
        attribute(conv, name, [usual] * count)
        for name, usual in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    pads = attribute(conv, "pads", [0] * 2 * count)
    stride = strides[-1]
    first = strides.count(1)
    if stride < 2 or list(strides) != [1] * first + [stride] * (count - first) or {*dilations} != {1}:
        return None
    if attribute(conv, "auto_pad", "NOTSET") != "NOTSET" or "output_shape" in conv.attributes:
        return None
    axes = [
        Phases.of(*sizes) for sizes in zip(kernel, strides, pads[:count], pads[count:], padding, strict=True)
    ]
    found = [axis for axis in axes if axis is not None]
    return found if len(found) == count else None


def _rows(weight: np.ndarray, axes: Sequence[Phases]) -> np.ndarray:
    """(O, I, K…) as (s₁·s₂·…·O, I, T…)."""
    count = len(axes)
    padded = np.pad(weight, [(0, 0), (0, 0), *[(0, 1)] * count])
    for axis in reversed(range(count)):
        padded = np.take(padded, axes[axis].taps, axis=2 + axis)  # one axis becomes two: (s, T)
    order = [*range(2, 2 + 2 * count, 2), 0, 1, *range(3, 3 + 2 * count, 2)]
    taps = [axis.taps.shape[1] for axis in axes]
    return np.ascontiguousarray(padded.transpose(order).reshape(-1, weight.shape[1], *taps))


def _weight(graph: ir.Graph, maker: ir.Node, rows: np.ndarray) -> ir.Value:
    """A ``Weight`` of other rows."""
    held = maker.inputs[0]
    assert held is not None and held.name is not None
    value = add_initializer(graph, ir.tensor(rows), f"{held.name}.rows")
    node = ir.node("Weight", [value], attributes=maker.attributes, domain=DOMAIN)
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph.insert_before(maker, node)
    return node.outputs[0]


def is_shuffle(node: ir.Node) -> bool:
    """Whether a node is a pixel shuffle of ``spread``."""
    return node.domain == DOMAIN and node.op_type == SHUFFLE


def shuffle_last(graph: ir.Graph) -> None:
    """Move pixel shuffles behind what works value by value, in place: the convolution then writes 8 bits by itself."""
    for shuffle in [node for node in graph if is_shuffle(node)]:
        while (reader := _elementwise_reader(shuffle)) is not None:
            before, shuffled, after = shuffle.inputs[0], shuffle.outputs[0], reader.outputs[0]
            assert before is not None
            after.replace_all_uses_with(shuffled)
            reader.replace_input_with(0, before)
            shuffle.replace_input_with(0, after)
            shuffled.type, after.shape = after.type, before.shape


def _elementwise_reader(shuffle: ir.Node) -> ir.Node | None:
    uses = list(shuffle.outputs[0].uses())
    if len(uses) != 1 or uses[0].idx != 0 or shuffle.outputs[0].is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type in _ELEMENTWISE and not node.outputs[0].is_graph_output() else None
