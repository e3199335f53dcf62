"""Batch norm statistics of a quantized network: estimated again from batches, alone or with the scales that depend on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..layers import QuantizedLayer
from ..quantizers import RangeMethod
from .calibrate import image_of
from .observe import evaluating
from .quantize import quantized_layers
from .tie import tie_layer

__all__ = ["reestimate_norms", "settle_norms"]

ROUNDS = 3


@torch.no_grad()
def reestimate_norms(network: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Set the running statistics of every batch norm to their plain average over the batches, in place.

    The statistics kept during training lag behind the weights; the quantized network's own are better.

    Args:
        network: float or quantized; its mode is kept.
        batches: see ``calibrate``.

    Raises:
        ValueError: if there is no batch.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    device = next(network.parameters()).device
    batch = None
    try:
        with evaluating(network):
            for norm in norms:
                norm.train()
                norm.momentum = None  # cumulative average
            for number, batch in enumerate(batches):
                if number == 0:
                    for norm in norms:
                        if norm.num_batches_tracked is not None:
                            norm.num_batches_tracked.zero_()
                network(image_of(batch).to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if batch is None:
        raise ValueError(
            "reestimate_norms: no batch was given, expected at least one batch of training images"
        )
    return network


@torch.no_grad()
def settle_norms(network: nn.Module, batches: Iterable[Any], method: RangeMethod = "mse") -> nn.Module:
    """``reestimate_norms`` of a calibrated network until statistics and folded weights fit each other, in place.

    Where a grid must hold the folded weight w·γ/σ (of powers of two, or one for all channels), what rounding leaves of the
    weight depends on σ, and σ on what rounding leaves of the weight, there and in all layers before: at few bits σ falls,
    and the folded weights outgrow the scales that they were calibrated with; what is cut off gets no gradient. So
    statistics are estimated and the weights calibrated in turns, three times, and statistics twice at the end. Scales that
    take γ/σ into themselves (free ones, per channel) do not depend on it: there once is enough.

    Args:
        network: quantized and calibrated; its mode is kept.
        batches: see ``calibrate``; gone through up to five times.
        method: see ``calibrate``.

    Returns:
        the network.

    Raises:
        ValueError: if there is no batch.
    """
    folded = [layer for layer in quantized_layers(network).values() if _rounds_folded(layer)]
    if not folded:
        return reestimate_norms(network, batches)
    for _ in range(ROUNDS):
        reestimate_norms(network, batches)
        for layer in folded:
            layer.calibrate_weight(method)
            if all(quantizer.power_of_two for quantizer in layer.quantizers):
                tie_layer(layer)
    reestimate_norms(network, batches)
    return reestimate_norms(network, batches)  # later layers saw the first ones' statistics of before


def _rounds_folded(layer: QuantizedLayer) -> bool:
    """Whether a weight's grid holds the folded weight, see ``QuantizedLayer.norm_factors``."""
    norm = layer.paired_norm
    return norm is not None and any(
        layer.norm_factors(norm, quantizer)[1] is None for quantizer in layer.weight_quantizers.values()
    )
