"""What rounding does to each tensor of a network at each width: ‖Q(T) - T‖², as ``quantize`` and ``calibrate`` round."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..layers import QuantizedLayer
from ..plan import QuantPlan
from ..surgery import dequantize, quantize, quantized_layers, set_quantizers
from ..surgery.calibrate import calibrate, image_of
from ..surgery.observe import evaluating, observe
from .table import tensor_name

__all__ = ["Rounding", "float_twin", "rounded_twin", "rounding_noise"]


@dataclass(frozen=True)
class Rounding:
    """How tensors are rounded while sensitivities are measured; what the plan that is made of them should have.

    Attributes:
        widths: candidate bit widths, of ``intN`` formats.
        scale: see ``QuantPlan``.
        granularity: see ``QuantPlan``.
    """

    widths: tuple[int, ...] = (2, 3, 4, 6, 8)
    scale: Literal["power-of-two", "free"] = "power-of-two"
    granularity: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        if not self.widths or any(not 2 <= bits <= 16 for bits in self.widths):
            raise ValueError(f"widths are {self.widths}, expected bit widths between 2 and 16")


def float_twin(network: nn.Module) -> nn.Module:
    """A copy without quantizers, split as the network is."""
    return dequantize(copy.deepcopy(network))


def rounded_twin(network: nn.Module, bits: int, rounding: Rounding, images: Iterable[Any]) -> nn.Module:
    """A copy with every layer at one width, each tensor calibrated by itself."""
    twin = float_twin(network)
    images = list(images)
    example = image_of(images[0])[:1]
    plan = QuantPlan.uniform(
        twin, f"int{bits}", f"int{bits}", scale=rounding.scale, granularity=rounding.granularity
    )
    run = set(observe(twin, example).layers())  # heads of deep supervision often run in training only
    quantize(twin, replace(plan, layers={name: plan[name] for name in plan if name in run}), example)
    return calibrate(twin, images, tied=False)


@torch.no_grad()
def rounding_noise(
    network: nn.Module, images: Sequence[Tensor], rounding: Rounding
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Rounding noise of every weight and input, in a network that computes in float.

    Args:
        network: float or quantized; it is left as it is.
        images: batches (N, C, spatial…).
        rounding: see ``Rounding``.

    Returns:
        tensor's name → bits → ‖Q(T) - T‖², and tensor's name → ‖T‖²; of inputs the mean for one image.
    """
    noise: dict[str, dict[int, float]] = {}
    power: dict[str, float] = {}
    count = sum(len(batch) for batch in images)
    for bits in rounding.widths:
        twin = rounded_twin(network, bits, rounding, images)
        for name, layer in quantized_layers(twin).items():
            for part, weight, rounded in effective_weights(layer):
                tensor = tensor_name(name, part, "weight")
                noise.setdefault(tensor, {})[bits] = float((rounded - weight).double().square().sum())
                power[tensor] = float(weight.double().square().sum())
        sums: dict[str, list[float]] = {}
        set_quantizers(twin, False)
        with evaluating(twin), _seeing_inputs(twin, sums):
            for batch in images:
                twin(batch)
        for tensor, (error, square) in sums.items():
            noise.setdefault(tensor, {})[bits] = error / count
            power[tensor] = square / count
    return noise, power


def effective_weights(layer: QuantizedLayer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Part, float weight, and the weight that rounding makes of it, a paired batch norm's gain taken out again."""
    norm = layer.paired_norm
    training = norm is not None and norm.training
    if norm is not None:
        norm.training = True  # the rounded folded weight is brought back to the weight's own scale
    try:
        rounded = layer.pieces(layer.output_major(layer.effective_parameters()[0]))
    finally:
        if norm is not None:
            norm.training = training
    for part, weight in layer.weight_pieces().items():
        yield part, weight, rounded[part]


@contextmanager
def _seeing_inputs(network: nn.Module, sums: dict[str, list[float]]) -> Iterator[None]:
    """Add up rounding error and power of every input that passes, by tensor."""
    hooks = []

    def see(name: str, layer: QuantizedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensor = args[0] if args else kwargs["input"]
        sizes = [part.channels for part in layer.parts]
        pieces = tensor.split(sizes, tensor.dim() + 1 - layer.weight.dim()) if sizes else (tensor,)
        for (part, quantizer), piece in zip(layer.input_quantizers.items(), pieces, strict=True):
            quantizer.enabled = True
            error = float((quantizer(piece) - piece).double().square().sum())
            quantizer.enabled = False
            entry = sums.setdefault(tensor_name(name, part, "input"), [0.0, 0.0])
            entry[0] += error
            entry[1] += float(piece.double().square().sum())

    for name, layer in quantized_layers(network).items():
        hooks.append(
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: see(name, m, args, kwargs), with_kwargs=True
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
