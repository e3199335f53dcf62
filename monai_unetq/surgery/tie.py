"""``tie``: scales of a split convolution's parts that meet on one grid, so that it can run as one integer convolution."""

from __future__ import annotations

import torch
from torch import nn

from ..layers import QuantizedLayer
from .quantize import quantized_layers

__all__ = ["tie", "tie_layer"]

STORED_BITS = 8
"""Of the weights that engines execute."""


@torch.no_grad()
def tie(network: nn.Module) -> nn.Module:
    """Raise weight scales of split convolutions as far as it takes to run each as one INT8 convolution, in place.

    Part p contributes on the grid s_p·s_wp[o], input step × weight step of output channel o. One convolution over the
    concatenated integers needs one grid t[o], on which the codes of part p are multiplied by s_p·s_wp[o]/t[o], a power of
    two that must leave them within 8 bits. So t[o] is at least s_p·s_wp[o]·2^(b_p - 8), and what is finer is raised to
    it: nothing at 4 bits and parts whose scales are within 2^4, everything to the coarsest part at 8 bits.

    Args:
        network: quantized, its scales calibrated.

    Returns:
        the network. Layers whose scales are given by their formats or weights stay as they are.
    """
    for layer in quantized_layers(network).values():
        tie_layer(layer)
    return network


def tie_layer(layer: QuantizedLayer) -> None:
    """``tie`` for one layer; nothing to do where it is not split."""
    weights, inputs = layer.weight_quantizers, layer.input_quantizers
    everyone = [*weights.values(), *inputs.values()]
    if len(weights) < 2 or not all(q.rounds for q in everyone):
        return
    if not all(
        q.number_format.kind == "int" and q.number_format.bits <= STORED_BITS for q in weights.values()
    ):
        return
    grids = {part: (inputs[part].scale * q.scale).double() for part, q in weights.items()}
    room = {part: STORED_BITS - q.number_format.bits for part, q in weights.items()}
    finest = torch.stack([grid * 2.0 ** -room[part] for part, grid in grids.items()]).amax(0)
    for part, quantizer in weights.items():
        # Whole already where scales are powers of two; the nearest whole number where they are free.
        shift = torch.log2(grids[part] / finest).round().clamp(0, room[part])
        quantizer.set_scale((finest * 2.0**shift / inputs[part].scale.double()).float())
