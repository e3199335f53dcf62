"""``trace``: a quantized network as one ONNX graph that still says what is rounded where, for every export to begin with.

Between the standard operators stand two of our own (domain ``monai_unetq``), which every lowering replaces:

- ``Quant(x, scale)``: scale · clamp(round(x / scale), qmin, qmax), half to even. Attributes ``layer`` and ``part`` (whose
  input it is; ``output`` where it is what a layer gives), ``qmin``, ``qmax``, ``kind`` (of ``QFormat``).
- ``Weight(w)``: the rounded weight of ``layer``; its integers and scales are in ``Trace.layers``.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..formats import QFormat
from ..layers import QuantizedLayer
from ..plan import QuantPlan
from ..quantizers import Quantizer
from ..quantizers.low_bit import power_of_two_multipliers
from ..surgery import fold, plan_of
from ..surgery.quantize import quantized_layers

__all__ = ["DOMAIN", "OPSET", "Trace", "TracedLayer", "TracedWeight", "trace"]

DOMAIN = "monai_unetq"
OPSET = 18
OUTPUT = "output"
"""``part`` of a ``Quant`` behind a layer."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TracedWeight:
    """The weight of one part of a layer: codes × scale.

    Attributes:
        codes: int32, (O, I of the group, …), output channels first; for ``pow2-B`` the powers of two that codes stand for.
        scale: float32, (O,).
        number_format: what it was rounded to.
    """

    codes: np.ndarray
    scale: np.ndarray
    number_format: QFormat


@dataclass(frozen=True)
class TracedLayer:
    """A layer whose weight is rounded.

    Attributes:
        name: in the network.
        weights: part → weight, in the order of the input channels; one part, ``input``, where it is not split.
        transposed: whether the weight in the graph is (I, O of the group, …).
        groups: of the convolution.
    """

    name: str
    weights: dict[str, TracedWeight]
    transposed: bool
    groups: int

    def to_layout(self, rows: np.ndarray) -> np.ndarray:
        """What is (O, I of the group, …) in the order of the weight in the graph."""
        if not self.transposed:
            return rows
        grouped = rows.reshape(self.groups, -1, *rows.shape[1:])
        return np.ascontiguousarray(grouped.swapaxes(1, 2).reshape(-1, *grouped.shape[1:2], *rows.shape[2:]))


@dataclass(frozen=True)
class Trace:
    """A network's graph, its rounded weights and its plan.

    Attributes:
        model: opset 18, with nodes of ``DOMAIN``; the input is ``image``, the output ``logits``.
        layers: name → layer, those with rounded weights.
        plan: of the network.
        dynamic: axes of the image whose size is free.
    """

    model: onnx.ModelProto
    layers: dict[str, TracedLayer]
    plan: QuantPlan
    dynamic: tuple[int, ...]


@torch.no_grad()
def trace(network: nn.Module, example: Tensor, dynamic: bool = True) -> Trace:
    """Trace a quantized network, batch norm folded, in evaluation.

    Batch and spatial size are free where the network allows it, else the batch alone, else none.

    Args:
        network: quantized and calibrated; it is left as it is.
        example: an image (N, C, spatial…) that it accepts.
        dynamic: whether sizes may be free; else all are the example's.

    Raises:
        ValueError: if the network is not quantized, is still being calibrated or supervised, or returns more than one
            tensor.
        torch.onnx.OnnxExporterError: where PyTorch's exporter does not know an operation of the network.
    """
    plan = plan_of(network)
    copied = fold(copy.deepcopy(network).cpu().float(), example[:1].cpu().float()).eval()
    example = example.detach().cpu().float()
    if not isinstance(copied(example[:1]), Tensor):
        raise ValueError(
            f"{type(network).__name__} returns more than one tensor: switch its deep supervision off before export"
        )
    layers = {name: _prepare(name, layer) for name, layer in quantized_layers(copied).items()}
    model, free = _export(copied, example, dynamic)
    return Trace(model, {name: layer for name, layer in layers.items() if layer}, plan, free)


class _TracedLayer(QuantizedLayer):
    """A quantized layer whose rounding is recorded as ``Quant`` and ``Weight``; its parameters are the rounded ones."""

    traced_as: str
    rounds_weight: bool

    def _run_rounded(self, input: Tensor, *args: Any) -> Tensor:
        sizes = [part.channels for part in self.parts]
        axis = 1 if len(sizes) > 1 else 0
        pieces = input.split(sizes, axis) if sizes else [input]
        quantizers = self.input_quantizers
        rounded = [
            _record(self.traced_as, part, quantizer, piece)
            for (part, quantizer), piece in zip(quantizers.items(), pieces, strict=True)
        ]
        weight = self.weight
        if self.rounds_weight:
            weight = _symbolic("Weight", (weight,), {"layer": self.traced_as}, weight)
        return self._run(torch.cat(rounded, axis) if sizes else rounded[0], weight, self.bias, *args)

    def _round_output(self, output: Tensor) -> Tensor:
        if self.output_quantizer is None:
            return output
        return _record(self.traced_as, OUTPUT, self.output_quantizer, output)


def _record(layer: str, part: str, quantizer: Quantizer, tensor: Tensor) -> Tensor:
    number_format = quantizer.number_format
    if not quantizer.rounds:
        return tensor
    attributes = {
        "layer": layer, "part": part, "qmin": number_format.qmin, "qmax": number_format.qmax, "kind": number_format.kind,
    }  # fmt: skip
    return _symbolic("Quant", (tensor, quantizer.scale), attributes, tensor)


def _symbolic(operator: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], like: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
    )


def _prepare(name: str, layer: QuantizedLayer) -> TracedLayer | None:
    """Give a layer of the copy its rounded parameters and the class that records; what its weight is, where it rounds."""
    weight, bias = layer.effective_parameters()
    pieces, found = layer.weight_pieces(), {}
    rounds = all(quantizer.rounds for quantizer in layer.weight_quantizers.values())
    if rounds:
        for part, quantizer in layer.weight_quantizers.items():
            found[part] = _traced_weight(quantizer, pieces[part])
    layer.weight = nn.Parameter(weight.contiguous())
    layer.bias = None if bias is None else nn.Parameter(bias.clone())
    traced = cast(_TracedLayer, layer)
    traced.__class__ = type("Traced" + type(layer).__name__, (_TracedLayer, type(layer)), {})
    traced.traced_as, traced.rounds_weight = name, rounds
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return TracedLayer(name, found, transposed, int(getattr(layer, "groups", 1))) if rounds else None


def _traced_weight(quantizer: Quantizer, weight: Tensor) -> TracedWeight:
    codes = quantizer.codes(weight).cpu().numpy()
    if quantizer.number_format.kind == "pow2":
        table = np.array(power_of_two_multipliers(quantizer.number_format.qmax), dtype=np.int64)
        codes = (table[np.abs(codes)] * np.sign(codes)).astype(np.int32)
    scale = np.broadcast_to(quantizer.scale.detach().cpu().numpy(), (codes.shape[0],)).astype(np.float32)
    return TracedWeight(codes.astype(np.int32), scale.copy(), quantizer.number_format)


def _export(network: nn.Module, example: Tensor, dynamic: bool) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """The graph with as many free axes as the exporter takes, and which these are."""
    error: Exception | None = None
    for shapes in _choices(network, example) if dynamic else [{}]:
        # A size of 1 would be taken for a constant.
        image = example.repeat_interleave(2, 0) if 0 in shapes and example.shape[0] == 1 else example
        try:
            with _quietly():
                program = torch.onnx.export(
                    network, (image,), dynamo=True, dynamic_shapes=(shapes,) if shapes else None, opset_version=OPSET,
                    input_names=["image"], output_names=["logits"], verbose=False,
                )  # fmt: skip
        except Exception as found:  # whatever stops the exporter, fewer free axes may not
            error = found
            continue
        assert program is not None
        model: onnx.ModelProto = program.model_proto
        dimensions = model.graph.input[0].type.tensor_type.shape.dim
        return model, tuple(axis for axis, size in enumerate(dimensions) if size.dim_param)
    assert error is not None
    raise error


def _choices(network: nn.Module, example: Tensor) -> Iterator[dict[int, Any]]:
    """What may be free, in the order to be tried: axis → the exporter's word for its size.

    The exporter leaves a name for a size, too, that has one value only, as where patches are told their places. So the
    network is asked, without computing anything, along which axes it takes twice the size. Where branches of different
    rounding meet (nnU-Net's residual encoder), the exporter only finds them equal if it is told that sizes are multiples
    of what the network lets them grow by.
    """
    free, sizes = torch.export.Dim, list(example.shape)
    asked = _takes(network, sizes)  # else it makes tensors of its own, and cannot be asked

    def grows(axis: int, by: int) -> bool:
        return _takes(network, [*sizes[:axis], sizes[axis] + by, *sizes[axis + 1 :]])

    axes = [axis for axis in range(2, example.dim()) if not asked or grows(axis, sizes[axis])]
    if axes:
        yield dict.fromkeys((0, *axes), free.AUTO)
    steps = {}
    for axis in axes if asked else ():
        powers = [2**n for n in range(sizes[axis].bit_length() - 1) if sizes[axis] % 2**n == 0]
        step = next((step for step in powers if grows(axis, step)), None)
        if step is not None:
            steps[axis] = step * free(f"size{axis}", min=2)
    if steps:
        yield {0: free.AUTO, **steps}
    yield {0: free.AUTO}
    yield {}


def _takes(network: nn.Module, sizes: list[int]) -> bool:
    """Whether a network runs on an image of these sizes."""
    try:
        with _quietly(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            network(torch.empty(sizes))
    except Exception:  # whatever a network says of a size that it does not take
        return False
    return True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of its own progress and plans, and torch of a size that a network does not take."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch._subclasses", "onnxscript", "onnx_ir")
    ]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.CRITICAL)  # errors are raised, too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
