"""Passes over a traced graph that change no number and let engines run more of it in integers.

They know the two operators of ``trace`` and the standard ones; every lowering to ONNX begins with ``simplify``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .trace import DOMAIN

__all__ = ["attribute", "channels", "constant", "is_quant", "is_weight", "remove_unused", "simplify"]


def is_quant(node: ir.Node | None) -> bool:
    """Whether a node is the ``Quant`` of a traced graph."""
    return node is not None and node.domain == DOMAIN and node.op_type == "Quant"


def is_weight(node: ir.Node | None) -> bool:
    """Whether a node is the ``Weight`` of a traced graph."""
    return node is not None and node.domain == DOMAIN and node.op_type == "Weight"


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """What a value holds where that is known without running the graph."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def channels(value: ir.Value | None) -> int | None:
    """Size of axis 1, where it is known."""
    if value is None or value.shape is None or len(value.shape) < 2 or not isinstance(value.shape[1], int):
        return None
    return value.shape[1]


def simplify(graph: ir.Graph) -> None:
    """Run all passes, in place."""
    for node in list(graph):
        if node.op_type == "Pad":
            _drop_pad(node)
    for node in list(graph):
        if node.op_type == "Split":
            _cancel_split(graph, node)
    remove_unused(graph)
    for node in list(graph):
        if is_quant(node):
            _quantize_before_concat(graph, node)
    _merge_quants(graph)
    for node in list(graph):
        if node.op_type == "MaxPool":
            _quantize_before_pool(graph, node)
    _merge_quants(graph)
    for node in list(graph):
        if node.op_type == "Relu":
            _drop_relu(node)
    remove_unused(graph)
    graph.sort()


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes whose outputs nobody reads, and constants likewise."""
    kept = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(output in kept or output.uses() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in kept:
            del graph.initializers[name]


def _drop_pad(pad: ir.Node) -> None:
    """Without padding by nothing, which MONAI's decoders do where sizes are even."""
    pads = constant(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if (
        pads is not None
        and not pads.any()
        and pad.inputs[0] is not None
        and not pad.outputs[0].is_graph_output()
    ):
        pad.outputs[0].replace_all_uses_with(pad.inputs[0])


def _cancel_split(graph: ir.Graph, split: ir.Node) -> None:
    """Split(Concat(a, b, c)) in pieces that are a, b and c, or some of them side by side: the pieces themselves."""
    source = split.inputs[0]
    concat = None if source is None else source.producer()
    if concat is None or concat.op_type != "Concat" or attribute(split, "axis", 0) != 1:
        return
    if attribute(concat, "axis") != 1:
        return
    pieces = _grouped(concat.inputs, [channels(output) for output in split.outputs])
    if pieces is None:
        return
    for output, group in zip(split.outputs, pieces, strict=True):
        value = group[0]
        if len(group) > 1:
            joined = ir.node("Concat", group, attributes={"axis": 1})
            joined.outputs[0].shape, joined.outputs[0].type = output.shape, output.type
            graph.insert_before(split, joined)
            value = joined.outputs[0]
        output.replace_all_uses_with(value)


def _grouped(values: Sequence[ir.Value | None], sizes: Sequence[int | None]) -> list[list[ir.Value]] | None:
    """Values side by side that make up each size; None where a size ends within a value."""
    rest, groups = list(values), []
    for size in sizes:
        group, held = [], 0
        while size is not None and held < size and rest:
            value = rest.pop(0)
            width = channels(value)
            if value is None or width is None:
                return None
            group.append(value)
            held += width
        if size is None or held != size:
            return None
        groups.append(group)
    return groups


def _quant_key(node: ir.Node) -> tuple[Any, ...]:
    scale = constant(node.inputs[1])
    return (node.inputs[0], float(scale), *(attribute(node, name) for name in ("qmin", "qmax", "kind")))  # type: ignore[arg-type]


def _merge_quants(graph: ir.Graph) -> None:
    """One ``Quant`` where a tensor is rounded twice to the same grid, as a skip and on the way down."""
    seen: dict[tuple[Any, ...], ir.Node] = {}
    for node in list(graph):
        if is_quant(node):
            first = seen.setdefault(_quant_key(node), node)
            if first is not node:
                node.outputs[0].replace_all_uses_with(first.outputs[0])
                graph.remove(node, safe=True)


def _quantize_before_concat(graph: ir.Graph, quant: ir.Node) -> None:
    """Quant(Concat(a, b)) as Concat(Quant(a), Quant(b)): a and b may then be stored in integers."""
    source = quant.inputs[0]
    concat = None if source is None else source.producer()
    if concat is None or concat.op_type != "Concat" or len(concat.outputs[0].uses()) > 1:
        return
    rounded = []
    for value in concat.inputs:
        assert value is not None
        one = ir.node("Quant", [value, quant.inputs[1]], attributes=quant.attributes, domain=DOMAIN)
        one.outputs[0].shape, one.outputs[0].type = value.shape, value.type
        graph.insert_before(concat, one)
        rounded.append(one.outputs[0])
    joined = ir.node("Concat", rounded, attributes=concat.attributes)
    joined.outputs[0].shape, joined.outputs[0].type = concat.outputs[0].shape, concat.outputs[0].type
    graph.insert_before(concat, joined)
    quant.outputs[0].replace_all_uses_with(joined.outputs[0])
    graph.remove(quant, safe=True)
    if not concat.outputs[0].uses():
        graph.remove(concat, safe=True)


def _quantize_before_pool(graph: ir.Graph, pool: ir.Node) -> None:
    """Quant(MaxPool(x)) as MaxPool(Quant(x)): the same numbers, for rounding keeps the order.

    Only where x is rounded so anyway, or has no other reader: otherwise there would be more to round.
    """
    if len(pool.outputs) != 1 or pool.outputs[0].is_graph_output():
        return
    readers = [use.node for use in pool.outputs[0].uses()]
    source = pool.inputs[0]
    if source is None or len(readers) != 1 or not is_quant(readers[0]):
        return
    quant = readers[0]
    beside = [use.node for use in source.uses() if use.node is not pool]
    wanted = (source, *_quant_key(quant)[1:])
    if beside and not any(is_quant(node) and _quant_key(node) == wanted for node in beside):
        return
    first = ir.node("Quant", [source, quant.inputs[1]], attributes=quant.attributes, domain=DOMAIN)
    first.outputs[0].shape, first.outputs[0].type = source.shape, source.type
    graph.insert_before(pool, first)
    pool.replace_input_with(0, first.outputs[0])
    quant.outputs[0].replace_all_uses_with(pool.outputs[0])
    graph.remove(quant, safe=True)


def _drop_relu(relu: ir.Node) -> None:
    """Without a ReLU whose readers all round to a grid that begins at 0."""
    output, source = relu.outputs[0], relu.inputs[0]
    if source is None or output.is_graph_output() or not output.uses():
        return
    if all(is_quant(use.node) and attribute(use.node, "qmin") == 0 for use in output.uses()):
        output.replace_all_uses_with(source)
