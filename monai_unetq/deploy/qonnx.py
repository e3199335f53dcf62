"""A traced network in QONNX, whose ``Quant`` and ``BipolarQuant`` nodes hold any number of bits: for FINN and hls4ml."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .lowering import Lowered, add_initializer, finished
from .simplify import attribute, constant, is_quant, is_weight, remove_unused, simplify
from .trace import OPSET, Trace, TracedLayer, TracedWeight

__all__ = ["QONNX_DOMAIN", "to_qonnx"]

QONNX_DOMAIN = "qonnx.custom_op.general"


def to_qonnx(traced: Trace) -> Lowered:
    """Lower a trace to QONNX.

    Weights stand as float constants on their grid, each in front of its ``Quant``; parts of a split convolution have one
    each and are concatenated.

    Args:
        traced: of a quantized network.

    Raises:
        ValueError: for the literal formula on an input, by the layer's name: no ``Quant`` computes it.
    """
    model = ir.from_proto(traced.model)
    graph = model.graph
    simplify(graph)
    for node in list(graph):
        if is_quant(node):
            _activation(graph, node)
        elif is_weight(node):
            _weight(graph, node, traced.layers[attribute(node, "layer")])
    remove_unused(graph)
    return finished(model, {"": OPSET, QONNX_DOMAIN: 1}, {})


def quant_attributes(qmin: int, qmax: int) -> tuple[int, dict[str, Any]] | None:
    """Bit width, and the attributes ``signed`` and ``narrow``, of the ``Quant`` with these codes; None where none has."""
    signed = qmin < 0
    bits = max(qmax.bit_length(), (-qmin - 1).bit_length() if signed else 0) + int(signed)
    for narrow in (0, 1):
        low = -(1 << (bits - 1)) + narrow if signed else 0
        high = (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1 - narrow
        if (low, high) == (qmin, qmax):
            return bits, {"signed": int(signed), "narrow": narrow, "rounding_mode": "ROUND"}
    return None


def _activation(graph: ir.Graph, node: ir.Node) -> None:
    qmin, qmax = attribute(node, "qmin"), attribute(node, "qmax")
    scale = np.asarray(constant(node.inputs[1]), np.float32).reshape(())
    source = node.inputs[0]
    assert source is not None
    if attribute(node, "kind") == "binary" and qmin < 0:
        replaced = _bipolar(graph, node, source, scale)
    else:
        found = quant_attributes(qmin, qmax)
        if attribute(node, "kind") == "literal" or found is None:
            raise ValueError(
                f"layer '{attribute(node, 'layer')}': QONNX has no Quant for its input's format; use Q(i.f) or intN"
            )
        replaced = _quant(graph, node, source, scale, *found)
    replaced.shape, replaced.type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(replaced)


def _weight(graph: ir.Graph, node: ir.Node, layer: TracedLayer) -> None:
    pieces = [_piece(graph, node, layer, part, weight) for part, weight in layer.weights.items()]
    whole = pieces[0]
    if len(pieces) > 1:
        joined = ir.node("Concat", pieces, attributes={"axis": 0 if layer.transposed else 1})
        graph.insert_before(node, joined)
        whole = joined.outputs[0]
    node.outputs[0].replace_all_uses_with(whole)


def _piece(graph: ir.Graph, node: ir.Node, layer: TracedLayer, part: str, weight: TracedWeight) -> ir.Value:
    column = weight.scale.reshape(-1, *[1] * (weight.codes.ndim - 1))
    values = layer.to_layout((weight.codes * column).astype(np.float32))
    name = f"{layer.name}.weight" if len(layer.weights) == 1 else f"{layer.name}.weight[{part}]"
    constant_ = _initializer(graph, values, f"{name}.values")
    if np.unique(weight.scale).size == 1:
        scale = weight.scale[:1].reshape(())
    elif layer.transposed and layer.groups > 1:
        scale = layer.to_layout(np.broadcast_to(column, weight.codes.shape).copy())
    else:
        scale = weight.scale.reshape(
            [-1 if axis == int(layer.transposed) else 1 for axis in range(weight.codes.ndim)]
        )
    number_format = weight.number_format
    if number_format.kind == "binary":
        return _bipolar(graph, node, constant_, scale)
    qmin, qmax = int(weight.codes.min(initial=0)), int(weight.codes.max(initial=0))
    found = None if number_format.kind == "pow2" else quant_attributes(number_format.qmin, number_format.qmax)
    if found is None:  # the codes are on the grid already: any width that holds them
        bits = max(qmax.bit_length(), (-qmin - 1).bit_length() if qmin else 0) + 1
        found = bits, {"signed": 1, "narrow": 0, "rounding_mode": "ROUND"}
    return _quant(graph, node, constant_, scale, *found)


def _quant(
    graph: ir.Graph,
    before: ir.Node,
    source: ir.Value,
    scale: np.ndarray,
    bits: int,
    attributes: dict[str, Any],
) -> ir.Value:
    operands = [
        source,
        _initializer(graph, scale.astype(np.float32), "scale"),
        _initializer(graph, np.float32(0), "zero_point"),
        _initializer(graph, np.float32(bits), "bit_width"),
    ]
    node = ir.node("Quant", operands, attributes=attributes, domain=QONNX_DOMAIN)
    node.outputs[0].type, node.outputs[0].shape = source.type, source.shape
    graph.insert_before(before, node)
    return node.outputs[0]


def _bipolar(graph: ir.Graph, before: ir.Node, source: ir.Value, scale: np.ndarray) -> ir.Value:
    operands = [source, _initializer(graph, scale.astype(np.float32), "scale")]
    node = ir.node("BipolarQuant", operands, domain=QONNX_DOMAIN)
    node.outputs[0].type, node.outputs[0].shape = source.type, source.shape
    graph.insert_before(before, node)
    return node.outputs[0]


def _initializer(graph: ir.Graph, array: Any, name: str) -> ir.Value:
    return add_initializer(graph, ir.tensor(np.asarray(array)), name)
