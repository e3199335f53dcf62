"""What lowerings to ONNX share: what they return, and how a model is made ready to be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from .trace import DOMAIN

__all__ = ["Lowered", "add_initializer", "finished"]


@dataclass(frozen=True)
class Lowered:
    """What a lowering wrote, and what it could not put into the target's integers.

    Attributes:
        model: without operators of our own.
        notes: layer → why it is not one integer convolution; the others are.
    """

    model: onnx.ModelProto
    notes: dict[str, str] = field(default_factory=dict)


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Add a constant under its name, with a number where it is taken."""
    unique, number = name, 1
    while unique in graph.initializers:
        unique, number = f"{name}_{number}", number + 1
    shape = ir.Shape(list(map(int, tensor.numpy().shape)))
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def finished(model: ir.Model, opsets: Mapping[str, int], notes: dict[str, str]) -> Lowered:
    """A lowered graph as a checked model: sorted, named, its shapes inferred.

    Raises:
        onnx.checker.ValidationError: if it is no valid model: a defect of the lowering.
    """
    graph = model.graph
    graph.sort()
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.update(opsets)
    for number, node in enumerate(graph):
        node.name = f"{node.op_type}_{number}"
        for place, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"value_{number}" if not place else f"value_{number}_{place}"
    proto = ir.to_proto(model)
    _forget_metadata(proto)
    onnx.checker.check_model(proto, full_check=True)
    return Lowered(onnx.shape_inference.infer_shapes(proto, strict_mode=True), notes)


def _forget_metadata(proto: onnx.ModelProto) -> None:
    """Without what the exporter tells of the source code: names and stack traces of files where it ran."""
    del proto.metadata_props[:]
    graph = proto.graph
    del graph.metadata_props[:]
    graph.doc_string = ""
    for holder in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""
