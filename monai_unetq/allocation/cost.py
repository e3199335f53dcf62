"""Cost of a network's formats: bytes of weights and of activations, as stored at their true bit widths."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from ..formats import QFormat
from ..parts import WHOLE
from ..surgery.observe import observe
from ..surgery.quantize import quantized_layers

__all__ = ["Cost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """Bytes for one image.

    Attributes:
        weight_bytes: all parameters: rounded weights at their formats' bits, ternary ones five in a byte as ``pack``
            stores them (1.6 bits, the last byte of each tensor whole), the rest (biases, norms) as float32.
        activation_bytes: the inputs of all convolutions, transposed convolutions and linear layers at their
            formats' bits (ternary: 2, they are not packed), float ones as float32.
    """

    weight_bytes: int
    activation_bytes: int


def cost_of(network: nn.Module, example: Tensor) -> Cost:
    """What a network's weights and activations take, in bytes.

    Args:
        network: float or quantized.
        example: (1, C, spatial…), the image whose activations are counted.
    """
    quantized = quantized_layers(network)
    weight_bits = sum(p.numel() for p in network.parameters() if p.dim() > 0) * 32
    for layer in quantized.values():
        pieces = layer.pieces(layer.output_major(layer.weight))
        for part, quantizer in layer.weight_quantizers.items():
            count = pieces[part].numel()
            weight_bits += _weight_bits(quantizer.number_format, count) - 32 * count
        for quantizer in layer.quantizers:  # learned scales are formats, not weights
            weight_bits -= 32 * sum(p.numel() for p in quantizer.parameters() if p.dim() > 0)
    activation_bits = 0
    for call in observe(network, example).calls:
        values, found = prod(call.input_shape), quantized.get(call.layer)
        if found is None:
            activation_bits += 32 * values
            continue
        channels = {part.name: part.channels for part in found.parts} or {WHOLE: 1}
        for part, quantizer in found.input_quantizers.items():
            share = values * channels[part] // sum(channels.values())
            activation_bits += share * quantizer.number_format.bits
    return Cost(-(-weight_bits // 8), -(-activation_bits // 8))


def _weight_bits(number_format: QFormat, count: int) -> int:
    """What ``count`` weights of one tensor take when packed."""
    in_base_3 = number_format.kind == "ternary" and number_format.signed
    return 8 * -(-count // 5) if in_base_3 else number_format.bits * count
