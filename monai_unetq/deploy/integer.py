"""Lowers a traced network to integers only: every exponent and bound is settled here, or the network is refused.

What is written is ``program.json`` (``runtime.program``) beside the packed file that holds weights and biases;
``runtime.integer`` runs both without torch. A value that is computed is integer × 2^-exponent, with one exponent for
each channel: scales are powers of two, so every operation is a sum of products, a shift or a comparison.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from ..files import write_json
from ..parts import WHOLE
from ..runtime.grids import Constants, assemble, infer, settled_bias
from ..runtime.integer import PROGRAM_FILE, IntegerNetwork, constants_of
from ..runtime.packed import PackedFile, read
from ..runtime.program import (
    IMAGE,
    Add,
    Clip,
    Concat,
    Convolve,
    Flatten,
    Grid,
    Interpolate,
    Leaky,
    MaxPool,
    Operation,
    Packed,
    Pad,
    PartWeights,
    Program,
    Repeat,
    Round,
    Rounding,
    Shift,
    Slice,
    SumPool,
)
from .packed import pack
from .trace import DOMAIN, Trace, TracedLayer

__all__ = ["PACKED_FILE", "lower", "write"]

PACKED_FILE = "model.unetq"

_INT32 = 1 << 31

_ADVICE = {
    "InstanceNormalization": "instance norm depends on the image; train with batch norm, which is folded",
    "GroupNormalization": "group norm depends on the image; train with batch norm, which is folded",
    "LayerNormalization": "layer norm depends on the image; train with batch norm, which is folded",
    "BatchNormalization": "this batch norm was not folded: it has to be the only consumer of a quantized convolution",
    "Tanh": "use ReLU, or hardtanh, which integers compute exactly",
    "Sigmoid": "leave it out: logits are compared with 0 instead",
    "Softmax": "leave it out: the largest logit is the most probable class",
    "LogSoftmax": "leave it out: the largest logit is the most probable class",
    "Elu": "use ReLU, or LeakyReLU with a slope that is a power of two",
    "Selu": "use ReLU, or LeakyReLU with a slope that is a power of two",
    "Gelu": "use ReLU, or LeakyReLU with a slope that is a power of two",
    "Erf": "this is GELU; use ReLU, or LeakyReLU with a slope that is a power of two",
    "Mish": "use ReLU, or LeakyReLU with a slope that is a power of two",
    "HardSwish": "use ReLU, or LeakyReLU with a slope that is a power of two",
    "Mul": "products of two tensors are not among the operations of an integer program",
    "Div": "division is not among the operations of an integer program",
    "GlobalAveragePool": "use average pooling over a window that is a power of two",
    "ReduceMean": "use average pooling over a window that is a power of two",
}


@dataclass(frozen=True)
class _Weight:
    """The weight of a layer, as a node's input; ``turned`` where a linear layer's is transposed."""

    layer: TracedLayer
    turned: bool = False


def lower(trace: Trace) -> Program:
    """A traced network as an integer program.

    Args:
        trace: of a network whose scales are powers of two, batch norm folded.

    Returns:
        the program; ``layers()`` of it says which accumulator each layer needs, and for what bound.

    Raises:
        ValueError: if the network holds what integers cannot compute exactly (instance norm, a slope or a scale that
            is no power of two, ``align_corners=True``, a layer that is kept float, …); the message names the module
            and says what would make it acceptable.
    """
    return _Lowering(trace).run()[0]


def write(trace: Trace, network: nn.Module, folder: str | Path) -> Program:
    """Write a network as ``model.unetq`` and ``program.json``, each atomically; the network is left as it is.

    Args:
        trace: of the network.
        network: quantized and calibrated, what was traced.
        folder: where to; it must exist.

    Returns:
        the program that was written.

    Raises:
        ValueError: see ``lower``, or if the network is not the one that was traced.
        OSError: if the files cannot be written.
    """
    folder = Path(folder)
    lowering = _Lowering(trace)
    program, constants = lowering.run()
    pack(network, folder / PACKED_FILE)
    file = read(folder / PACKED_FILE)
    stored = constants_of(program, file)
    for operation in program.operations:
        if isinstance(operation, Convolve):
            one, other = constants[operation.output], stored[operation.output]
            same = np.array_equal(one.weight, other.weight) and np.array_equal(one.bias, other.bias)
            if not same or not _vanishes(operation, file, lowering.finest[operation.output]):
                raise ValueError(f"layer '{operation.layer}' is not what was traced: trace the network again")
    program = replace(program, packed=Packed(PACKED_FILE, file.document["checksum"]))
    IntegerNetwork(program, stored)
    write_json(folder / PROGRAM_FILE, program.to_json())
    return program


def _vanishes(operation: Convolve, file: PackedFile, grid: tuple[int, ...]) -> bool:
    """Whether a bias that the graph does not have, because it rounds to zeros, is zeros in the file, too."""
    bias = file.tensors.get(f"{operation.layer}.bias")
    if operation.bias or bias is None:
        return True
    return not any(integer for integer, _ in settled_bias(bias.array(), grid))


class _Lowering:
    """Walks the graph, node by node; what is known so far."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        graph = trace.model.graph
        self.constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        self.shapes = {
            one.name: tuple(int(d.dim_value) for d in one.type.tensor_type.shape.dim)
            for one in (*graph.value_info, *graph.input, *graph.output)
        }
        self.image = graph.input[0].name
        shape = self.shapes[self.image]
        self.channels, self.dimensions = shape[1], len(shape) - 2
        self.names: dict[str, str] = {self.image: IMAGE}  # in the graph → in the program
        self.joined: dict[str, tuple[str, ...]] = {}  # concatenations that nothing read as a whole so far
        self.weights: dict[str, _Weight] = {}
        self.grids: dict[str, Grid] = {}
        self.ranks: dict[str, int] = {IMAGE: len(shape)}
        self.rounded: set[str] = set()
        self.operations: list[Operation] = []
        self.numbers: dict[str, Constants] = {}
        self.finest: dict[
            str, tuple[int, ...]
        ] = {}  # convolution's output → the grid that its bias is rounded to
        self.sizes: set[str] = set()  # what is computed from shapes
        self.done: set[str] = set()  # outputs of nodes that another one took along
        self.readers: dict[str, list[onnx.NodeProto]] = {}

    def run(self) -> tuple[Program, dict[str, Constants]]:
        graph = self.trace.model.graph
        if len(graph.output) != 1:
            raise ValueError(f"the network has {len(graph.output)} outputs, expected 1")
        for node in _needed(graph):
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        for node in _needed(graph):
            if node.output[0] in self.done:
                continue
            if node.op_type == "Shape" or self.sizes & set(node.input):
                known = any(name in self.names or name in self.joined for name in node.input)
                if node.op_type == "Shape" or not known:
                    self.sizes |= set(node.output)
                    continue
            handler = _HANDLERS.get((node.domain, node.op_type))
            if handler is None:
                raise self.refusal(node, _ADVICE.get(node.op_type, "there is no integer form of it here"))
            handler(self, node)
        output = self.tensor(graph.output[0].name)
        if output == IMAGE:
            raise ValueError("the network returns its image")
        program = Program(self.channels, self.dimensions, tuple(self.operations), self.grids, output)
        return program, self.numbers

    # Names and values

    def tensor(self, name: str) -> str:
        """The program's tensor of a value of the graph; what was only joined so far is concatenated now."""
        if name in self.joined:
            pieces = self.joined.pop(name)
            self.add(Concat(pieces, name), rounded=all(piece in self.rounded for piece in pieces))
            self.names[name] = name
        return self.names[name]

    def read(self, node: onnx.NodeProto, place: int = 0) -> str:
        """A node's input that an operation works on.

        Raises:
            ValueError: if it is the image itself, or a constant.
        """
        name = node.input[place]
        if name not in self.names and name not in self.joined:
            raise self.refusal(node, "one of its inputs is a constant, or computed from sizes")
        found = self.tensor(name) if IMAGE not in self.joined.get(name, ()) else IMAGE
        if found == IMAGE:
            raise self.refusal(
                node,
                "it works on the image before that is rounded: let a quantized layer read the image first",
            )
        return found

    def constant(self, node: onnx.NodeProto, place: int) -> np.ndarray | None:
        """A node's input that is known now; None where there is none."""
        if place >= len(node.input) or not node.input[place]:
            return None
        found = self.constants.get(node.input[place])
        if found is None:
            raise self.refusal(node, "it depends on the image's size: trace with a fixed size")
        return found

    def add(
        self,
        operation: Operation,
        *,
        rounded: bool,
        constants: Constants | None = None,
        grid: Grid | None = None,
    ) -> str:
        """Append an operation; the name of its output."""
        inputs = [self.grids[name] for name in operation.inputs if name != IMAGE]
        if grid is None:
            grid = infer(operation, inputs, constants, self.channels)
        self.operations.append(operation)
        self.grids[operation.output] = grid
        if operation.inputs:
            self.ranks[operation.output] = self.ranks[operation.inputs[0]]
        if rounded:
            self.rounded.add(operation.output)
        return operation.output

    def give(self, node: onnx.NodeProto, operation: Operation) -> None:
        """Append what a node is; values that were rounded stay so."""
        try:
            self.add(operation, rounded=all(name in self.rounded for name in operation.inputs))
        except ValueError as error:
            raise self.refusal(node, str(error)) from None
        self.names[node.output[0]] = operation.output

    def on_grid(self, node: onnx.NodeProto, name: str, by: Sequence[int]) -> str:
        """A tensor on a finer grid, where one of its channels needs it."""
        if not any(by):
            return name
        return self.add(Shift((name,), f"{node.output[0]}.finer", tuple(by)), rounded=name in self.rounded)

    def static(self, node: onnx.NodeProto, name: str) -> tuple[int, ...]:
        """The shape of a value of the graph; the batch counts as 0 where it is free.

        Raises:
            ValueError: if it is not fixed.
        """
        shape = self.shapes.get(name, ())
        if not shape or not all(shape[1:]):  # the batch may have any size
            raise self.refusal(node, "it depends on the image's size: trace with a fixed size")
        return shape

    def refusal(self, node: onnx.NodeProto, advice: str) -> ValueError:
        """An error that names the module a node is of."""
        name, kind = _module_of(node)
        what = f"'{name}' ({kind})" if kind else f"'{name}'"
        return ValueError(f"{what} cannot be computed in integers: operator {node.op_type}: {advice}")


Handler = Callable[[_Lowering, onnx.NodeProto], None]


def _needed(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that the output depends on, in order."""
    wanted = {one.name for one in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _module_of(node: onnx.NodeProto) -> tuple[str, str]:
    """Name and class of the module that a node was traced in."""
    facts = {entry.key: entry.value for entry in node.metadata_props}
    try:
        scopes = ast.literal_eval(facts["pkg.torch.onnx.name_scopes"])
        classes = ast.literal_eval(facts["pkg.torch.onnx.class_hierarchy"])
        kind = str(classes[-2]).rpartition(".")[2]
        if kind.startswith("_empty"):  # what the exporter calls what stands in no module
            raise KeyError(kind)
        return str(scopes[-2]) or "the network", kind
    except (KeyError, ValueError, SyntaxError, IndexError, TypeError):
        return node.name or node.output[0], ""


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _power_of_two(value: float) -> int | None:
    """k where the value is 2^k."""
    mantissa, exponent = math.frexp(value)
    return exponent - 1 if mantissa == 0.5 else None


def _dyadic(value: float) -> tuple[int, int]:
    """(integer, exponent) with value = integer × 2^-exponent, the exponent the least, 0 or more."""
    numerator, denominator = value.as_integer_ratio()
    return numerator, denominator.bit_length() - 1


# Rounding


def _quant(at: _Lowering, node: onnx.NodeProto) -> None:
    facts = _attributes(node)
    where = f"layer '{facts['layer']}'" + ("" if facts["part"] == WHOLE else f", part '{facts['part']}'")
    scale = at.constant(node, 1)
    power = None if scale is None else _power_of_two(float(scale))
    if power is None:
        raise ValueError(
            f"{where}: its input has the scale {scale}, which is no power of two: quantize with a plan of scale "
            "'power-of-two'"
        )
    rounding: Rounding = "nearest"
    if facts["kind"] == "binary" and facts["qmin"] < 0:
        rounding = "sign"
    elif facts["kind"] == "literal":
        rounding = "literal"
    name = node.input[0]
    if name not in at.names and name not in at.joined:
        raise ValueError(f"{where}: its input is a constant")
    source = at.read(node) if at.joined.get(name) else at.tensor(name)
    operation = Round(
        (source,),
        node.output[0],
        facts["layer"],
        facts["part"],
        -power,
        facts["qmin"],
        facts["qmax"],
        rounding,
    )
    at.add(operation, rounded=True)
    at.names[node.output[0]] = operation.output


def _take_weight(at: _Lowering, node: onnx.NodeProto) -> None:
    at.weights[node.output[0]] = _Weight(at.trace.layers[_attributes(node)["layer"]])


# Layers


def _convolution(at: _Lowering, node: onnx.NodeProto) -> None:
    facts = _attributes(node)
    weight = _weight_of(at, node, 1)
    if facts.get("auto_pad", "NOTSET") != "NOTSET":
        raise at.refusal(node, f"its padding is {facts['auto_pad']}: give numbers")
    transposed = node.op_type == "ConvTranspose"
    if facts.get("output_shape"):
        raise at.refusal(node, "its output_size is given: use output_padding")
    if weight.layer.transposed != transposed or weight.turned:
        raise at.refusal(node, "its weight is not used as it is")
    axes = at.dimensions
    _layer(
        at, node, weight.layer, at.constant(node, 2), node.output[0],
        strides=tuple(facts.get("strides", [1] * axes)),
        pads=tuple(facts.get("pads", [0] * 2 * axes)),
        dilations=tuple(facts.get("dilations", [1] * axes)),
        output_padding=tuple(facts.get("output_padding", [0] * axes)),
    )  # fmt: skip


def _gemm(at: _Lowering, node: onnx.NodeProto) -> None:
    facts = _attributes(node)
    weight = _weight_of(at, node, 1)
    plain = facts.get("alpha", 1.0) == facts.get("beta", 1.0) == 1.0 and not facts.get("transA", 0)
    if not plain or weight.turned == bool(facts.get("transB", 0)):
        raise at.refusal(node, "its operands are scaled or transposed")
    _layer(at, node, weight.layer, at.constant(node, 2), node.output[0])


def _matmul(at: _Lowering, node: onnx.NodeProto) -> None:
    weight = _weight_of(at, node, 1)
    if not weight.turned or at.ranks[at.read(node)] != 2:
        raise at.refusal(
            node,
            "a linear layer over one axis of an image: use a convolution with kernel 1, or flatten before it",
        )
    readers = at.readers.get(node.output[0], [])
    if len(readers) == 1 and readers[0].op_type == "Add":
        (other,) = [name for name in readers[0].input if name != node.output[0]] or [""]
        if other == f"{weight.layer.name}.bias":
            at.done.add(readers[0].output[0])
            _layer(at, node, weight.layer, at.constants[other], readers[0].output[0])
            return
    _layer(at, node, weight.layer, None, node.output[0])


def _transpose(at: _Lowering, node: onnx.NodeProto) -> None:
    weight = at.weights.get(node.input[0])
    if weight is None or list(_attributes(node).get("perm", [])) != [1, 0]:
        raise at.refusal(node, "it moves axes of the image")
    at.weights[node.output[0]] = replace(weight, turned=not weight.turned)


def _weight_of(at: _Lowering, node: onnx.NodeProto, place: int) -> _Weight:
    weight = at.weights.get(node.input[place])
    if weight is None:
        name, _ = _module_of(node)
        raise ValueError(
            f"layer '{name}' is kept float (its weight is not rounded): give it number formats in the plan"
        )
    return weight


def _layer(
    at: _Lowering, node: onnx.NodeProto, layer: TracedLayer, bias: np.ndarray | None, output: str,
    strides: tuple[int, ...] = (), pads: tuple[int, ...] = (), dilations: tuple[int, ...] = (),
    output_padding: tuple[int, ...] = (),
) -> None:  # fmt: skip
    where = f"layer '{layer.name}'"
    name = node.input[0]
    source = at.tensor(name) if name in at.names or name in at.joined else None
    if source is None or source == IMAGE or source not in at.rounded:
        raise ValueError(
            f"{where}: its input is not rounded (format 'float'): give it a number format in the plan"
        )
    grid = at.grids[source]
    steps = _steps(layer, grid, where)
    rounds_bias = at.trace.plan[layer.name].bias == "accumulator"
    outputs = len(next(iter(steps.values()))[0])
    finest = tuple(max(step[o] for step, _ in steps.values()) for o in range(outputs))
    at.finest[output] = finest if rounds_bias else ()
    bias_exponents = finest if bias is not None and rounds_bias else ()
    settled = [(0, 0)] * outputs
    if bias is not None:
        bias = np.ascontiguousarray(bias, dtype=np.float32)
        try:
            settled = settled_bias(bias, bias_exponents)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    silent = _silent(layer, grid, steps, settled)
    exponents = []
    for channel, (integer, own) in enumerate(settled):
        grids = [step[channel] for step, live in steps.values() if live[channel] and channel not in silent]
        exponents.append(max([*grids, *([own] if integer else [])], default=0))
    parts = (
        PartWeights(
            part,
            tuple(exponents[o] - step[o] if live[o] and o not in silent else 0 for o in range(outputs)),
        )
        for part, (step, live) in steps.items()
    )
    operation = Convolve(
        inputs=(source,), output=output, layer=layer.name, parts=tuple(parts),
        bias=bias is not None, bias_exponents=bias_exponents, silent=silent,
        strides=strides, pads=pads, dilations=dilations, groups=layer.groups, transposed=layer.transposed,
        output_padding=output_padding or (0,) * len(strides), accumulator="int32",
    )  # fmt: skip
    if any(shift > 62 for part in operation.parts for shift in part.shifts):
        raise ValueError(
            f"{where}: the grids of its parts or of its bias differ by more than 2^62: no 64-bit accumulator holds both"
            + ("" if rounds_bias else "; let the plan round its bias ('accumulator')")
        )
    try:
        constants = assemble(
            operation, {p: w.codes.astype(np.int64) for p, w in layer.weights.items()}, bias, exponents
        )
        proven = infer(operation, [grid], constants, at.channels)
    except ValueError as error:
        raise ValueError(
            f"{error if str(error).startswith('layer') else f'{where}: {error}'}: its sums do not fit a 64-bit "
            "accumulator; use fewer bits, or scales that are closer to each other"
            + ("" if rounds_bias else ", or let the plan round its bias ('accumulator')")
        ) from None
    if proven.bound >= _INT32:
        operation = replace(operation, accumulator="int64")
    at.numbers[output] = constants
    at.add(operation, rounded=False, grid=Grid(tuple(exponents), proven.bounds))
    at.names[output] = output


def _steps(layer: TracedLayer, image: Grid, where: str) -> dict[str, tuple[list[int], list[bool]]]:
    """Part → exponents of input step × weight step for each output channel, and whether its weights are not all 0."""
    found: dict[str, tuple[list[int], list[bool]]] = {}
    begin = 0
    for part, weight in layer.weights.items():
        channels = weight.codes.shape[1] * layer.groups
        exponents = set(image.exponents[begin : begin + channels])
        begin += channels
        if len(exponents) != 1:
            raise ValueError(f"{where}: channels of its input (part '{part}') are rounded to different grids")
        powers = [_power_of_two(float(scale)) for scale in weight.scale]
        wrong = next((s for s, power in zip(weight.scale, powers, strict=True) if power is None), None)
        if wrong is not None:
            raise ValueError(
                f"{where}: its weight has the scale {wrong}, which is no power of two: quantize with a plan of scale "
                "'power-of-two'"
            )
        (exponent,) = exponents
        live = np.any(weight.codes.reshape(weight.codes.shape[0], -1), axis=1)
        found[part] = ([exponent - power for power in powers if power is not None], [bool(v) for v in live])
    return found


def _silent(
    layer: TracedLayer,
    image: Grid,
    steps: dict[str, tuple[list[int], list[bool]]],
    settled: Sequence[tuple[int, int]],
) -> tuple[int, ...]:
    """Output channels whose weights together are less than 2^-54 of their bias."""
    found = []
    for channel, (integer, own) in enumerate(settled):
        finest = min((step[channel] for step, live in steps.values() if live[channel]), default=own)
        if not integer or finest - own < 54 - abs(integer).bit_length():
            continue
        reach = Fraction(0)
        for part, (step, _) in steps.items():
            codes = layer.weights[part].codes[channel].astype(object)
            reach += int(np.abs(codes).sum()) * image.bound * Fraction(2) ** -step[channel]
        if reach < abs(integer) * Fraction(2) ** (-own - 54):
            found.append(channel)
    return tuple(found)


# Activations


def _relu(at: _Lowering, node: onnx.NodeProto) -> None:
    source = at.read(node)
    at.give(node, Clip((source,), node.output[0], (0,) * at.grids[source].channels, ()))


def _clip(at: _Lowering, node: onnx.NodeProto) -> None:
    source = at.read(node)
    limits = [
        None if limit is None else float(limit) for limit in (at.constant(node, 1), at.constant(node, 2))
    ]
    limits = [None if limit is None or math.isinf(limit) else limit for limit in limits]
    dyadic = [None if limit is None else _dyadic(limit) for limit in limits]
    finest = max((exponent for entry in dyadic if entry for exponent in entry[1:]), default=0)
    by = [max(0, finest - exponent) for exponent in at.grids[source].exponents]
    if max(by) > 32:
        raise at.refusal(node, f"its limits {limits} need a grid finer by 2^{max(by)}: use powers of two")
    source = at.on_grid(node, source, by)
    exponents = at.grids[source].exponents
    low, high = (
        () if entry is None else tuple(entry[0] << (e - entry[1]) for e in exponents) for entry in dyadic
    )
    at.give(node, Clip((source,), node.output[0], low, high))


def _leaky(at: _Lowering, node: onnx.NodeProto) -> None:
    source = at.read(node)
    channels = at.grids[source].channels
    if node.op_type == "LeakyRelu":
        slopes = [float(np.float32(_attributes(node).get("alpha", 0.01)))] * channels
    else:
        given = at.constant(node, 1)
        assert given is not None
        slopes = [float(value) for value in np.broadcast_to(given.reshape(-1), (channels,))]
    if not any(slopes):
        at.give(node, Clip((source,), node.output[0], (0,) * channels, ()))
        return
    powers = [_power_of_two(slope) for slope in slopes]
    wrong = next((s for s, power in zip(slopes, powers, strict=True) if power is None), None)
    if wrong is not None:
        near = 2.0 ** round(math.log2(wrong)) if wrong > 0 else 0.125
        raise at.refusal(
            node,
            f"its slope {wrong:g} is no power of two: use ReLU, or train with a fixed slope such as {near:g}",
        )
    known = [power for power in powers if power is not None]
    positive, negative = tuple(max(0, -p) for p in known), tuple(max(0, p) for p in known)
    at.give(node, Leaky((source,), node.output[0], positive, negative))


# Pooling, upsampling, shapes


def _window(at: _Lowering, node: onnx.NodeProto) -> dict[str, Any]:
    facts = _attributes(node)
    axes = len(facts["kernel_shape"])
    if facts.get("ceil_mode", 0):
        raise at.refusal(node, "ceil_mode is on: switch it off, or pad")
    if facts.get("auto_pad", "NOTSET") != "NOTSET":
        raise at.refusal(node, f"its padding is {facts['auto_pad']}: give numbers")
    return {
        "kernel": tuple(facts["kernel_shape"]),
        "strides": tuple(facts.get("strides", [1] * axes)),
        "pads": tuple(facts.get("pads", [0] * 2 * axes)),
        "dilations": tuple(facts.get("dilations", [1] * axes)),
        "counts": bool(facts.get("count_include_pad", 0)),
    }


def _max_pool(at: _Lowering, node: onnx.NodeProto) -> None:
    source, window = at.read(node), _window(at, node)
    del window["counts"]
    at.give(node, MaxPool((source,), node.output[0], **window))


def _average_pool(at: _Lowering, node: onnx.NodeProto) -> None:
    source, window = at.read(node), _window(at, node)
    size = math.prod(window["kernel"])
    if size & (size - 1):
        raise at.refusal(node, f"a mean of {size} values: use a window whose size is a power of two")
    if any(window["pads"]) and not window["counts"]:
        raise at.refusal(node, "its padding is not counted: use count_include_pad=True, or no padding")
    if any(d != 1 for d in window.pop("dilations")):
        raise at.refusal(node, "its window is dilated")
    del window["counts"]
    at.give(node, SumPool((source,), node.output[0], **window))
    at.rounded.discard(node.output[0])


def _resize(at: _Lowering, node: onnx.NodeProto) -> None:
    facts, source = _attributes(node), at.read(node)
    mode, place = facts.get("mode", "nearest"), facts.get("coordinate_transformation_mode", "half_pixel")
    factors = _factors(at, node)
    if place == "align_corners":
        raise at.refusal(node, "align_corners=True has no exact integer form: use align_corners=False")
    if any(f != round(f) or f < 1 for f in factors):
        raise at.refusal(node, f"it scales by {factors}: use whole numbers")
    whole = tuple(round(f) for f in factors)
    if all(f == 1 for f in whole):
        at.names[node.output[0]] = source
    elif mode == "nearest":
        at.give(node, Repeat((source,), node.output[0], whole))
    elif mode == "linear" and place in ("half_pixel", "pytorch_half_pixel"):
        if any(f & (f - 1) for f in whole):
            raise at.refusal(node, f"it interpolates by {factors}: use powers of two")
        at.give(node, Interpolate((source,), node.output[0], whole))
        at.rounded.discard(node.output[0])
    else:
        raise at.refusal(
            node, f"mode {mode}, {place}: use linear upsampling with align_corners=False, or nearest"
        )


def _factors(at: _Lowering, node: onnx.NodeProto) -> list[float]:
    scales = at.constant(node, 2) if len(node.input) > 2 and node.input[2] else None
    if scales is None or not scales.size:
        before, after = at.static(node, node.input[0]), at.static(node, node.output[0])
        scales = np.array([1.0] + [b / a for a, b in zip(before[1:], after[1:], strict=True)])
    if len(scales) == at.dimensions + 2:
        if any(float(s) != 1 for s in scales[:2]):
            raise at.refusal(node, "it scales channels")
        scales = scales[2:]
    return [float(s) for s in scales]


def _concat(at: _Lowering, node: onnx.NodeProto) -> None:
    if _attributes(node)["axis"] not in (1, -at.dimensions - 1):
        raise at.refusal(node, "it concatenates along another axis than the channels")
    pieces: list[str] = []
    for name in node.input:
        if name in at.joined:
            pieces += at.joined[name]
        elif name in at.names:
            pieces.append(at.names[name])
        else:
            raise at.refusal(node, "one of its inputs is a constant")
    at.joined[node.output[0]] = tuple(pieces)


def _split(at: _Lowering, node: onnx.NodeProto) -> None:
    facts = _attributes(node)
    sizes = at.constant(node, 1)
    if facts.get("axis", 0) not in (1, -at.dimensions - 1):
        raise at.refusal(node, "it splits along another axis than the channels")
    if sizes is None:
        sizes = np.array([at.static(node, name)[1] for name in node.output])
    begin = 0
    for name, size in zip(node.output, (int(s) for s in sizes), strict=True):
        _take_channels(at, node, name, begin, begin + size)
        begin += size


def _take_channels(at: _Lowering, node: onnx.NodeProto, output: str, start: int, stop: int) -> None:
    """Channels of a tensor; of a concatenation the pieces themselves where the borders are theirs."""
    name = node.input[0]
    if name in at.joined:
        chosen, begin = [], 0
        for piece in at.joined[name]:
            end = begin + (at.channels if piece == IMAGE else at.grids[piece].channels)
            if start <= begin and end <= stop:
                chosen.append((piece, end - begin))
            begin = end
        if sum(size for _, size in chosen) == stop - start:
            pieces = tuple(piece for piece, _ in chosen)
            if len(pieces) == 1:
                at.names[output] = pieces[0]
            else:
                at.joined[output] = pieces
            return
    source = at.read(node)
    if (start, stop) == (0, at.grids[source].channels):
        at.names[output] = source
        return
    at.add(Slice((source,), output, 0, start, stop), rounded=source in at.rounded)
    at.names[output] = output


def _slice(at: _Lowering, node: onnx.NodeProto) -> None:
    starts, stops, axes, steps = (at.constant(node, place) for place in (1, 2, 3, 4))
    if starts is None or stops is None:
        raise at.refusal(node, "its borders are not known")
    chosen = range(len(starts)) if axes is None else [int(a) for a in axes]
    if steps is not None and any(int(s) != 1 for s in steps):
        raise at.refusal(node, "it takes every second element or fewer")
    rank = at.dimensions + 2
    borders = {a % rank: (int(b), int(e)) for a, b, e in zip(chosen, starts, stops, strict=True)}
    if list(borders) == [1] and borders[1][0] >= 0 and 0 < borders[1][1] < _INT32:
        _take_channels(at, node, node.output[0], *borders[1])
        return
    source = at.read(node)
    for number, (axis, (start, stop)) in enumerate(borders.items()):
        if axis == 0:
            raise at.refusal(node, "it takes images out of the batch")
        last = number == len(borders) - 1
        name = node.output[0] if last else f"{node.output[0]}.{number}"
        if stop == 0:
            raise at.refusal(node, "it leaves nothing")
        end = 0 if stop >= _INT32 - 1 else stop
        at.add(Slice((source,), name, max(0, axis - 1), start, end), rounded=source in at.rounded)
        source = name
    at.names[node.output[0]] = source


def _pad(at: _Lowering, node: onnx.NodeProto) -> None:
    source, facts = at.read(node), _attributes(node)
    pads, value, axes = at.constant(node, 1), at.constant(node, 2), at.constant(node, 3)
    if pads is None:
        raise at.refusal(node, "its size is not known")
    rank = at.dimensions + 2
    chosen = range(rank) if axes is None else [int(a) % rank for a in axes]
    begin, end = [0] * rank, [0] * rank
    for place, axis in enumerate(chosen):
        begin[axis], end[axis] = int(pads[place]), int(pads[len(chosen) + place])
    if any(begin[:2] + end[:2]):
        raise at.refusal(node, "it pads the batch or the channels")
    if not any(begin + end):
        at.names[node.output[0]] = source
        return
    mode = facts.get("mode", "constant")
    if mode not in ("constant", "edge") or (mode == "constant" and value is not None and float(value) != 0):
        raise at.refusal(node, f"it pads with '{mode}' values: use zeros, or 'replicate'")
    at.give(node, Pad((source,), node.output[0], (*begin[2:], *end[2:]), mode == "edge"))


def _add(at: _Lowering, node: onnx.NodeProto) -> None:
    left, right = at.read(node, 0), at.read(node, 1)
    one, other = at.grids[left], at.grids[right]
    if one.channels != other.channels:
        raise at.refusal(node, f"it adds {one.channels} and {other.channels} channels")
    exponents = [max(a, b) for a, b in zip(one.exponents, other.exponents, strict=True)]
    shifts = [tuple(e - o for e, o in zip(exponents, g.exponents, strict=True)) for g in (one, other)]
    at.give(node, Add((left, right), node.output[0], *shifts))
    at.rounded.discard(node.output[0])


def _same(at: _Lowering, node: onnx.NodeProto) -> None:
    name = node.input[0]
    if name in at.joined:
        at.joined[node.output[0]] = at.joined[name]
    elif name in at.names:
        at.names[node.output[0]] = at.names[name]
    elif name in at.weights:
        at.weights[node.output[0]] = at.weights[name]
    elif name in at.constants:
        at.constants[node.output[0]] = at.constants[name]
    else:
        raise at.refusal(node, "its input is computed from sizes")


def _constant(at: _Lowering, node: onnx.NodeProto) -> None:
    facts = _attributes(node)
    if "value" in facts:
        at.constants[node.output[0]] = numpy_helper.to_array(facts["value"])
    else:
        at.constants[node.output[0]] = np.array(next(iter(facts.values())))


def _flatten(at: _Lowering, node: onnx.NodeProto) -> None:
    source = at.read(node)
    before, after = at.static(node, node.input[0]), at.static(node, node.output[0])
    if before[1:] == after[1:]:
        at.names[node.output[0]] = source
        return
    if len(after) != 2 or after[1] != math.prod(before[1:]):
        raise at.refusal(node, f"it makes {after} of {before}: only flattening to (N, C · sizes) is here")
    at.give(node, Flatten((source,), node.output[0], math.prod(before[2:])))
    at.ranks[node.output[0]] = 2


_HANDLERS: dict[tuple[str, str], Handler] = {
    (DOMAIN, "Quant"): _quant,
    (DOMAIN, "Weight"): _take_weight,
    **{
        ("", name): handler
        for name, handler in (
            ("Add", _add),
            ("AveragePool", _average_pool),
            ("Clip", _clip),
            ("Concat", _concat),
            ("Constant", _constant),
            ("Conv", _convolution),
            ("ConvTranspose", _convolution),
            ("Dropout", _same),
            ("Flatten", _flatten),
            ("Gemm", _gemm),
            ("Identity", _same),
            ("LeakyRelu", _leaky),
            ("MatMul", _matmul),
            ("MaxPool", _max_pool),
            ("PRelu", _leaky),
            ("Pad", _pad),
            ("Relu", _relu),
            ("Reshape", _flatten),
            ("Resize", _resize),
            ("Slice", _slice),
            ("Split", _split),
            ("Transpose", _transpose),
        )
    },
}
