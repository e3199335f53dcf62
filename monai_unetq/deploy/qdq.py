"""A traced network in ONNX's own quantization operators, which ONNX Runtime, OpenVINO and TensorRT execute in INT8.

Activations pass ``QuantizeLinear`` and ``DequantizeLinear``, narrower formats than 8 bits clipped first; weights are int8
constants with one scale for each output channel. A split convolution is one convolution over integers that were
quantized apart and concatenated (design decision 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from .lowering import Lowered, add_initializer, finished
from .simplify import attribute, constant, is_quant, is_weight, remove_unused, simplify
from .subpixel import is_shuffle, shuffle_last, spread
from .trace import DOMAIN, OPSET, Trace, TracedLayer

__all__ = ["Store", "Target", "meet", "to_qdq"]

Store = Literal["int8", "int4"]
Target = Literal["onnxruntime", "openvino", "tensorrt"]

OPSET_OF_INT4 = 21
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_MULTIPLY = (*_CONVOLUTIONS, "MatMul", "Gemm")
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Pad")
"""Operations behind which integers are the same integers in other places."""

_INT8 = (-128, 127)
_INT4 = (-8, 7)
_SEVEN_BITS = 63
_LARGEST = 3e38
"""About float32's largest number."""

_EPSILON = 1e-5
"""Of ONNX's InstanceNormalization, where it has none of its own."""

_EXACT = 1 << 24
"""Integers below are exact in float32."""


def to_qdq(
    traced: Trace, *, store: Store = "int8", target: Target = "onnxruntime", shuffled: bool = False
) -> Lowered:
    """Lower a trace to ONNX with QuantizeLinear and DequantizeLinear.

    Args:
        traced: of a quantized network.
        store: type of the weights' constants. With ``"int4"`` those that fit take half the bytes, and ONNX Runtime and
            OpenVINO run their layers in float.
        target: ``"tensorrt"`` takes signed INT8 with zero point 0 only (TensorRT 11).
        shuffled: transposed convolutions become convolutions with a pixel shuffle of our domain, which ``openvino.read``
            knows.

    Returns:
        a model that passes ``onnx.checker`` with full shape inference.

    Raises:
        ValueError: for formats that the target cannot hold, by the layer's name.
    """
    lowering = _Lowering(traced, store, target, shuffled)
    return lowering.run()


@dataclass(frozen=True)
class _Activation:
    """An activation on its grid: the integers, their scale, and the integer that stands for 0."""

    codes: ir.Value
    scale: float
    zero_point: int = 0


class _Lowering:
    """The state of one lowering: the graph and what has been put into it."""

    def __init__(self, traced: Trace, store: Store, target: Target, shuffled: bool) -> None:
        self.model = ir.from_proto(traced.model)
        self.graph = self.model.graph
        self.layers = traced.layers
        self.store: Store = store
        self.target: Target = target
        self.shuffled = shuffled
        self.notes: dict[str, str] = {}
        self.activations: dict[ir.Value, _Activation] = {}
        self.constants: dict[tuple[Any, ...], ir.Value] = {}
        self.dequantized: dict[tuple[ir.Value, float], ir.Value] = {}
        self.readers: dict[str, list[ir.Node]] = {}  # of integer weights that are not split

    def run(self) -> Lowered:
        simplify(self.graph)
        if self.shuffled:
            self.layers = spread(self.graph, self.layers)
        if self.target != "tensorrt":
            for node in list(self.graph):
                if is_quant(node) and _INT8[0] <= attribute(node, "qmin") and _stands_by_signed(node):
                    self._round_twice(node)
        for node in list(self.graph):
            if is_quant(node):
                self._quantize(node)
            elif node.op_type == "MaxPool" and node.inputs[0] in self.activations:
                self._pool(node)
            elif is_weight(node):
                self._weight(node)
        for node in list(self.graph):
            if node.op_type == "Concat":
                self._concatenation(node)
            elif (
                node.op_type == "InstanceNormalization"
                and self.target == "openvino"
                and not self._normalize_integers(node)
            ):
                self._keep_scale(node)
        for layer, readers in self.readers.items():
            if not all(self._is_rounded(reader.inputs[0]) for reader in readers):
                self.notes.setdefault(layer, "its input is float, and so are its products")
        # Whatever reads rounded values besides what took the integers reads them dequantized.
        for value, activation in self.activations.items():
            if value.uses():
                value.replace_all_uses_with(self._dequantize(activation))
        remove_unused(self.graph)
        shuffle_last(self.graph)
        opsets = {"": OPSET_OF_INT4 if self.store == "int4" else OPSET}
        if any(is_shuffle(node) for node in self.graph):
            opsets[DOMAIN] = 1
        return finished(self.model, opsets, self.notes)

    # Activations

    def _round_twice(self, quant: ir.Node) -> None:
        """Give transposed convolutions a rounding of their own where others read it too: each needs another type."""
        uses = list(quant.outputs[0].uses())
        transposed = [use for use in uses if _transposed_only(use.node)]
        if transposed and len(transposed) < len(uses):
            twin = ir.node(
                quant.op_type, list(quant.inputs), attributes=quant.attributes, domain=quant.domain
            )
            twin.outputs[0].type, twin.outputs[0].shape = quant.outputs[0].type, quant.outputs[0].shape
            self.graph.insert_after(quant, twin)
            for use in transposed:
                use.node.replace_input_with(use.idx, twin.outputs[0])

    def _quantize(self, node: ir.Node) -> None:
        """Replace a ``Quant``; remember its integers."""
        source, scale = node.inputs[0], float(constant(node.inputs[1]))  # type: ignore[arg-type]
        qmin, qmax, kind = (attribute(node, name) for name in ("qmin", "qmax", "kind"))
        layer = attribute(node, "layer")
        assert source is not None
        output = node.outputs[0]
        held = (qmin >= 0 and qmax <= 255) or (_INT8[0] <= qmin and qmax <= _INT8[1])
        if kind == "literal" or (kind == "binary" and qmin < 0) or not held:
            self._emulate(node, source, scale, qmin, qmax, kind, layer)
            return
        # What 7 bits hold without a sign fits the type of the signed parts beside it.
        signed = qmax <= _INT8[1] and _stands_by_signed(node)
        # OpenVINO convolves int8 activations wrongly where there is no VNNI; transposed convolutions and norms of what has a
        # zero point it runs in float.
        offset = (
            signed
            and self.target != "tensorrt"
            and not all(
                _transposed_only(use.node) or _normalizes(use.node)
                for quant in _beside(node)
                for use in quant.outputs[0].uses()
            )
        )
        if self.target == "tensorrt" and not signed:
            if qmax > _INT8[1]:
                raise ValueError(
                    f"layer '{layer}': its input is unsigned with {qmax + 1} levels, and TensorRT takes signed INT8 only; "
                    "quantize activations to uint7 or less, or to int8"
                )
            signed = True
        zero_point = 128 if offset else 0
        dtype = np.dtype(np.int8 if signed and not offset else np.uint8)
        low, high = _INT8 if signed else (0, 255)
        if (qmin, qmax) != (low, high):
            source = self._clipped(node, source, qmin * scale, qmax * scale)
        codes = self._add(
            node,
            "QuantizeLinear",
            [source, self._constant(np.float32(scale)), self._constant(np.array(zero_point, dtype))],
        )
        codes.shape, codes.dtype = output.shape, ir.DataType.from_numpy(dtype)
        self.activations[output] = _Activation(codes, scale, zero_point)

    def _clipped(self, node: ir.Node, source: ir.Value, low: float, high: float) -> ir.Value:
        bounds = [self._constant(np.float32(low)), self._constant(np.float32(high))]
        clipped = self._add(node, "Clip", [source, *bounds])
        clipped.shape, clipped.type = source.shape, source.type
        return clipped

    def _emulate(
        self, node: ir.Node, source: ir.Value, scale: float, qmin: int, qmax: int, kind: str, layer: str
    ) -> None:
        """A format that 8 bits cannot hold, in float operations."""
        if kind == "literal":
            raise ValueError(
                f"layer '{layer}': its input is in the literal formula, which ONNX has no operators for; use Q(i.f) without it"
            )
        self.notes[layer] = f"input with codes {qmin} to {qmax} is rounded in float"
        if kind == "binary" and qmin < 0:
            positive = self._add(node, "GreaterOrEqual", [source, self._constant(np.float32(0))])
            pair = [self._constant(np.float32(sign * scale)) for sign in (1, -1)]
            rounded = self._add(node, "Where", [positive, *pair])
        else:
            scaled = self._add(node, "Div", [source, self._constant(np.float32(scale))])
            scaled = self._add(node, "Round", [scaled])
            scaled = self._clipped(node, scaled, qmin, qmax)
            rounded = self._add(node, "Mul", [scaled, self._constant(np.float32(scale))])
        node.outputs[0].replace_all_uses_with(rounded)

    def _pool(self, pool: ir.Node) -> None:
        """Max pooling of the integers."""
        source = pool.inputs[0]
        assert source is not None
        activation = self.activations[source]
        attributes = {k: v for k, v in pool.attributes.items() if k != "storage_order"}
        codes = self._add(pool, "MaxPool", [activation.codes], attributes)
        codes.type, codes.shape = activation.codes.type, pool.outputs[0].shape
        self.activations[pool.outputs[0]] = _Activation(codes, activation.scale, activation.zero_point)

    def _dequantize(self, activation: _Activation, scale: float | None = None) -> ir.Value:
        key = (activation.codes, activation.scale if scale is None else scale)
        if key not in self.dequantized:
            producer = activation.codes.producer()
            assert producer is not None
            zero = self._constant(np.array(activation.zero_point, activation.codes.dtype.numpy()))  # type: ignore[union-attr]
            node = ir.node("DequantizeLinear", [activation.codes, self._constant(np.float32(key[1])), zero])
            node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, activation.codes.shape
            self.graph.insert_after(producer, node)
            self.dequantized[key] = node.outputs[0]
        return self.dequantized[key]

    def _normalize_integers(self, norm: ir.Node) -> bool:
        """Let a norm of rounded values read their integers c, with ε/s² for ε; False where its input is not rounded.

        (s·c - s·μ)/√(s²σ² + ε) = (c - μ)/√(σ² + ε/s²). OpenVINO would take the scale through the norm and leave ε as it
        is; of a scale of 1 there is nothing to take.
        """
        reader, value = norm, norm.inputs[0]
        while value not in self.activations:
            producer = _producer(value)
            if producer is None or producer.op_type != "Reshape" or len(producer.outputs[0].uses()) > 1:
                return False
            reader, value = producer, producer.inputs[0]
        assert value is not None
        activation = self.activations[value]
        reader.replace_input_with(0, self._dequantize(activation, 1.0))
        epsilon = attribute(norm, "epsilon", _EPSILON) / activation.scale**2
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
        return True

    def _keep_scale(self, norm: ir.Node) -> None:
        """A clip at what float32 holds, in front of an instance norm (which group norms are, reshaped).

        OpenVINO takes a convolution's scale through the norm behind it, which a scale would not change were it not for
        ε: it then adds 1e-5 to the variance of integers. Of the clip it does not take a scale per channel through. Where
        one scale is all channels', one of them gets another, or ``Max`` does what the clip would at the price of a pass.
        """
        source = norm.inputs[0]
        assert source is not None
        weight = _weight_in_front(source)
        if weight is not None and _has_one_scale(weight) and not self._halve_one(weight):
            kept = self._add(norm, "Max", [source, self._constant(np.float32(-_LARGEST))])
            kept.shape, kept.type = source.shape, source.type
        else:
            kept = self._clipped(norm, source, -_LARGEST, _LARGEST)
        norm.replace_input_with(0, kept)

    def _halve_one(self, weight: ir.Node) -> bool:
        """Give one output channel half the scale and twice the codes; False, and as it was, where none has room for them."""
        source = weight.inputs[0]
        codes, scale = constant(source), constant(weight.inputs[1])
        assert source is not None and codes is not None and scale is not None
        rows = np.abs(codes.astype(np.int32)).reshape(codes.shape[0], -1).max(1)
        channel = int(rows.argmin())
        limit = max(
            _SEVEN_BITS, int(rows.max())
        )  # 8-bit codes saturate where there is no VNNI: no more of them
        transposed = any(use.node.op_type != "Conv" for use in weight.outputs[0].uses())
        if transposed or len(rows) < 2 or 2 * rows[channel] > limit or codes.dtype != np.int8:
            return False
        codes, scales = codes.copy(), np.full(len(rows), scale)
        codes[channel] *= 2
        scales[channel] /= 2
        endings = {"": codes, ".scale": scales, ".zero_point": np.zeros(len(rows), np.int8)}
        for place, (ending, array) in enumerate(endings.items()):
            value = self._initializer(ir.tensor(array), f"{source.name}{ending}")
            weight.replace_input_with(place, value)
        weight.attributes["axis"] = ir.AttrInt64("axis", 0)
        return True

    # Weights

    def _weight(self, node: ir.Node) -> None:
        """Replace the ``Weight`` of a layer with one part; those of split layers go with their concatenation."""
        layer = self.layers[attribute(node, "layer")]
        readers = [use.node for use in node.outputs[0].uses()]
        if len(layer.weights) == 1:
            (weight,) = layer.weights.values()
            placed = self._integers(node, layer, weight.codes, weight.scale)
            if placed is None:
                low, high = int(weight.codes.min()), int(weight.codes.max())
                self._float_weight(
                    node, layer, f"codes {low} to {high} and their scales do not fit int8 constants"
                )
            else:
                node.outputs[0].replace_all_uses_with(placed)
                self.readers[layer.name] = [node for node in readers if node.op_type in _MULTIPLY]
            self._round_biases(readers, layer, weight.scale)
        elif all(_reads_concatenation(reader) for reader in readers):
            return  # with its concatenation
        else:
            self._float_weight(node, layer, "the parts of its input are not concatenated in front of it")

    def _is_rounded(self, value: ir.Value | None) -> bool:
        """Whether a layer reads integers, whatever moves them about in between."""
        while value is not None and value not in self.activations:
            producer = value.producer()
            if producer is None or producer.op_type not in _MOVES:
                return False
            value = producer.inputs[0]
        return value is not None

    def _integers(
        self, node: ir.Node, layer: TracedLayer, codes: np.ndarray, scale: np.ndarray
    ) -> ir.Value | None:
        """int8 (or int4) constants and their DequantizeLinear, in the graph's layout; None where they are wider."""
        if layer.transposed and layer.groups > 1 and np.unique(scale).size > 1:
            return None  # its output channels are no axis of the weight
        if codes.size and not (_INT8[0] <= codes.min() and codes.max() <= _INT8[1]):
            return None
        stored = layer.to_layout(codes).astype(np.int8)
        fits = codes.size and _INT4[0] <= codes.min() and codes.max() <= _INT4[1]
        tensor: ir.TensorProtocol = ir.tensor(stored)
        if self.store == "int4" and fits:
            tensor = ir.tensor(stored, dtype=ir.DataType.INT4)
            self.notes[layer.name] = "4-bit weights: run in float"
        name = f"{layer.name}.weight_codes"
        value = self._initializer(tensor, name)
        one_scale = np.unique(scale).size == 1
        parameters: np.ndarray = scale[:1].reshape(()) if one_scale else scale
        attributes = {} if one_scale else {"axis": 1 if layer.transposed else 0}
        zero = np.zeros(parameters.shape, np.int8)
        zeros = (
            ir.tensor(zero, dtype=ir.DataType.INT4) if tensor.dtype == ir.DataType.INT4 else ir.tensor(zero)
        )
        operands = [
            value,
            self._initializer(ir.tensor(parameters.astype(np.float32)), f"{name}.scale"),
            self._initializer(zeros, f"{name}.zero_point"),
        ]
        found = self._add(node, "DequantizeLinear", operands, attributes)
        found.dtype, found.shape = ir.DataType.FLOAT, ir.Shape(stored.shape)
        return found

    def _float_weight(self, node: ir.Node, layer: TracedLayer, why: str) -> None:
        self.notes[layer.name] = f"weights in float: {why}"
        source = node.inputs[0]
        assert source is not None
        node.outputs[0].replace_all_uses_with(source)

    # Split convolutions

    def _concatenation(self, concat: ir.Node) -> None:
        """Concat of rounded parts: of the integers where they have one type, and for a split convolution where their scales
        can meet.
        """
        parts = [self.activations.get(value) for value in concat.inputs if value is not None]
        output = concat.outputs[0]
        split = {
            reader: (weight, layer)
            for reader in (use.node for use in output.uses())
            if (weight := _weight_of(reader)) is not None
            and len((layer := self.layers[attribute(weight, "layer")]).weights) > 1
        }
        if not parts or None in parts:
            for weight, layer in split.values():
                self._float_weight(weight, layer, "its parts are not all rounded")
            return
        activations = [part for part in parts if part is not None]
        joined = self._joined(concat, activations)
        if joined is not None and len({a.scale for a in activations}) == 1:
            self.activations[output] = replace(joined, scale=activations[0].scale)
        for reader, (weight, layer) in split.items():
            met = meet(layer, [a.scale for a in activations])
            placed = None if met is None else self._integers(weight, layer, *met)
            if met is None or placed is None:
                why = "the scales of its parts cannot meet on one grid of 8 bits"
                self._apart(reader, weight, layer, activations, why)
            elif joined is not None:
                weight.outputs[0].replace_all_uses_with(placed)
                reader.replace_input_with(0, self._dequantize(joined, 1.0))
                self._round_biases([reader], layer, met[1])
            elif len({a.codes.dtype for a in activations}) == 1 and reader.op_type == "Conv":
                weight.outputs[0].replace_all_uses_with(placed)
                self._join_padded(reader, activations, *met)
                self._round_biases([reader], layer, met[1])
            else:
                why = "the integers of its parts are of different types"
                self._apart(reader, weight, layer, activations, why)

    def _joined(self, concat: ir.Node, parts: list[_Activation]) -> _Activation | None:
        """The parts' integers side by side; None where they differ in type or zero point."""
        if len({(part.codes.dtype, part.zero_point) for part in parts}) > 1:
            return None
        codes = self._add(concat, "Concat", [part.codes for part in parts], {"axis": 1})
        codes.type, codes.shape = parts[0].codes.type, concat.outputs[0].shape
        return _Activation(codes, 1.0, parts[0].zero_point)

    def _join_padded(
        self, conv: ir.Node, parts: list[_Activation], codes: np.ndarray, scale: np.ndarray
    ) -> None:
        """Let a convolution read integers c of different zero points z as if all had one, Z.

        Σ w·(c - z) = Σ w·(c - Z) + Σ w·(Z - z), and the last sum goes into the bias. So that it is the same at the borders,
        each part is padded in front, with its own z. (OpenVINO takes a zero point for each channel, but pads wrongly then
        unless the borders between the parts are multiples of 8, seen in 2026.4.)
        """
        dimensions = codes.ndim - 2
        pads = list(attribute(conv, "pads", [0] * 2 * dimensions))
        around = self._constant(np.array([0, 0, *pads[:dimensions], 0, 0, *pads[dimensions:]]))
        common = max(part.zero_point for part in parts)
        sums, padded, first = np.zeros(len(codes), np.int64), [], 0
        for part in parts:
            zero = self._constant(np.array(part.zero_point, part.codes.dtype.numpy()))  # type: ignore[union-attr]
            value = self._add(conv, "Pad", [part.codes, around, zero])
            value.type = part.codes.type
            padded.append(value)
            last = first + int(part.codes.shape[1])  # type: ignore[arg-type, index]
            weights = codes[:, first:last].reshape(len(codes), -1)
            sums += (common - part.zero_point) * weights.sum(1, dtype=np.int64)
            first = last
        joined = self._add(conv, "Concat", padded, {"axis": 1})
        joined.type = parts[0].codes.type
        conv.replace_input_with(0, self._dequantize(_Activation(joined, 1.0, common)))
        conv.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
        bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
        total = sums * scale.astype(np.float64) + (0.0 if bias is None else bias)
        conv.resize_inputs(3)
        conv.replace_input_with(2, self._initializer(ir.tensor(total.astype(np.float32)), "joined_bias"))

    def _apart(
        self, conv: ir.Node, weight: ir.Node, layer: TracedLayer, parts: list[_Activation], why: str
    ) -> None:
        """A convolution for each part, and their sum."""
        self.notes[layer.name] = f"{len(parts)} convolutions: {why}"
        outputs = []
        for number, (part, activation) in enumerate(zip(layer.weights.values(), parts, strict=True)):
            one = TracedLayer(f"{layer.name}[{number}]", {}, layer.transposed, layer.groups)
            placed = self._integers(weight, one, part.codes, part.scale)
            if placed is None:
                self._float_weight(weight, layer, "its parts' weights are wider than 8 bits")
                return
            bias = list(conv.inputs[2:]) if number == 0 else []
            node = ir.node(
                conv.op_type, [self._dequantize(activation), placed, *bias], attributes=conv.attributes
            )
            self.graph.insert_before(conv, node)
            outputs.append(node.outputs[0])
        total = outputs[0]
        for other in outputs[1:]:
            total = self._add(conv, "Add", [total, other])
        total.type, total.shape = conv.outputs[0].type, conv.outputs[0].shape
        conv.outputs[0].replace_all_uses_with(total, replace_graph_outputs=True)

    # Biases

    def _round_biases(self, readers: list[ir.Node], layer: TracedLayer, scale: np.ndarray) -> None:
        """int32 constants for biases that stand on the accumulator's grid, input scale × weight scale.

        Not for TensorRT, whose DequantizeLinear takes no int32 (onnx/onnx-tensorrt#850): the same numbers in float32.
        """
        if self.target == "tensorrt":
            return
        for conv in readers:
            if conv.op_type not in _CONVOLUTIONS or len(conv.inputs) < 3:
                continue
            source = conv.inputs[0]
            activation = self.activations.get(source) if source is not None else None
            step = scale if activation is None else scale * np.float32(activation.scale)
            bias = constant(conv.inputs[2])
            if bias is None:
                continue
            codes = np.rint(bias.astype(np.float64) / step)
            if np.abs(codes).max(initial=0) >= _EXACT or not np.array_equal(
                codes.astype(np.float32) * step, bias
            ):
                continue
            name = f"{layer.name}.bias_codes"
            operands = [
                self._initializer(ir.tensor(codes.astype(np.int32)), name),
                self._initializer(ir.tensor(step.astype(np.float32)), f"{name}.scale"),
            ]
            value = self._add(conv, "DequantizeLinear", operands, {"axis": 0})
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(bias.shape)
            conv.replace_input_with(2, value)

    # The graph

    def _add(
        self,
        before: ir.Node,
        operator: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes=dict(attributes or {}))
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _constant(self, array: Any) -> ir.Value:
        found = np.asarray(array)
        key = (found.dtype.str, found.shape, found.tobytes())
        if key not in self.constants:
            self.constants[key] = self._initializer(ir.tensor(found), f"constant_{len(self.constants)}")
        return self.constants[key]

    def _initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        return add_initializer(self.graph, tensor, name)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _weight_in_front(value: ir.Value) -> ir.Node | None:
    """The weight's ``DequantizeLinear`` of the convolution that makes a value, perhaps reshaped."""
    node = value.producer()
    while node is not None and node.op_type == "Reshape":
        node = _producer(node.inputs[0])
    weight = _producer(node.inputs[1]) if node is not None and node.op_type in _CONVOLUTIONS else None
    return weight if weight is not None and weight.op_type == "DequantizeLinear" else None


def _has_one_scale(weight: ir.Node) -> bool:
    scale = constant(weight.inputs[1])
    return scale is not None and scale.size == 1


def _beside(quant: ir.Node) -> list[ir.Node]:
    """The ``Quant`` nodes that must have one integer type: this one, and those concatenated with it."""
    found = [quant]
    for use in quant.outputs[0].uses():
        if use.node.op_type == "Concat":
            makers = [value.producer() for value in use.node.inputs if value is not None]
            found += [maker for maker in makers if maker is not None and is_quant(maker)]
    return found


def _stands_by_signed(quant: ir.Node) -> bool:
    """Whether a ``Quant`` is signed, or one that is concatenated with it."""
    return any(attribute(one, "qmin") < 0 for one in _beside(quant))


def _transposed_only(node: ir.Node) -> bool:
    """Whether a node is a transposed convolution, or a concatenation that these alone read."""
    if node.op_type != "Concat":
        return bool(node.op_type == "ConvTranspose")
    readers = [use.node for use in node.outputs[0].uses()]
    return bool(readers) and all(reader.op_type == "ConvTranspose" for reader in readers)


def _normalizes(node: ir.Node) -> bool:
    """Whether a node is an instance norm, or a reshape that these alone read (of a group norm)."""
    if node.op_type == "Reshape":
        readers = [use.node for use in node.outputs[0].uses()]
        return bool(readers) and all(reader.op_type == "InstanceNormalization" for reader in readers)
    return bool(node.op_type == "InstanceNormalization")


def _reads_concatenation(node: ir.Node) -> bool:
    """Whether a node reads a concatenation."""
    source = node.inputs[0] if node.inputs else None
    producer = None if source is None else source.producer()
    return producer is not None and producer.op_type == "Concat"


def _weight_of(node: ir.Node) -> ir.Node | None:
    """The ``Weight`` that a convolution reads."""
    if node.op_type not in _CONVOLUTIONS or node.inputs[1] is None:
        return None
    producer = node.inputs[1].producer()
    return producer if is_weight(producer) else None


def meet(layer: TracedLayer, input_scales: list[float]) -> tuple[np.ndarray, np.ndarray] | None:
    """One weight for all parts, over integers whose scales are left out.

    Output channel o accumulates Σ_p s_p·s_wp[o] Σ codes·input codes. On the finest of the parts' grids, t[o], the other
    parts' codes are multiplied by s_p·s_wp[o]/t[o].

    Args:
        layer: with a weight for each part.
        input_scales: of each part, in the layer's order.

    Returns:
        codes (O, I, …) and scales t (O,), float32; None where a ratio is no whole number or a code leaves 8 bits.
    """
    weights = list(layer.weights.values())
    if len(weights) != len(input_scales):
        return None
    grids = np.stack([w.scale.astype(np.float64) * s for w, s in zip(weights, input_scales, strict=True)])
    used = np.stack([np.abs(w.codes).reshape(w.codes.shape[0], -1).max(1) > 0 for w in weights])
    finest = np.where(used, grids, np.inf).min(0)
    finest = np.where(np.isfinite(finest), finest, grids[0])
    shifted = []
    for weight, grid, present in zip(weights, grids, used, strict=True):
        ratio = np.where(present, grid / finest, 1.0)
        if not np.array_equal(ratio, np.rint(ratio)):
            return None
        codes = weight.codes * ratio.astype(np.int64).reshape(-1, *[1] * (weight.codes.ndim - 1))
        if codes.min(initial=0) < _INT8[0] or codes.max(initial=0) > _INT8[1]:
            return None
        shifted.append(codes)
    return np.concatenate(shifted, 1).astype(np.int32), finest.astype(np.float32)
