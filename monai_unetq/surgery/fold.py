"""``fold``: batch norm becomes part of the convolution in front of it, in float and quantized networks."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import PAIRED_NORMS, PairedNorm, QuantizedLayer, folded_log2_scale, is_quantizable
from .observe import TRANSPOSED, example_for, observe, shares_weight
from .supervise import refuse_supervised

__all__ = ["FoldedNorm", "fold", "fold_pairs", "take_norm_out"]

logger = logging.getLogger(__name__)


class FoldedNorm(nn.Identity):
    """What is left of a batch norm that was folded into the layer in front of it."""


@torch.no_grad()
def fold(network: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Fold every batch norm that can be folded into the layer in front of it, in place; evaluation only.

    A quantized pair is baked as it runs in evaluation: not one quantized weight changes. In a float network
    (or for layers that the plan keeps float) w·γ/√(σ²+ε) and β + (b - μ)·γ/√(σ²+ε) become weight and bias. The
    batch norm becomes an identity (``FoldedNorm``) in its place.

    Args:
        network: float or quantized.
        example: an input that the network accepts; needed where float layers remain and none can be found out.

    Returns:
        the network, in evaluation mode.

    Raises:
        ValueError: if a quantized activation is still being observed (calibration did not end), or the network
            fails on the example or has supervision heads; nothing is folded then.
    """
    refuse_supervised(network, "fold")
    floats = {}
    if any(type(module) in PAIRED_NORMS for module in network.modules()):
        floats = observe(network, example_for(network) if example is None else example).paired_norms()
    fold_pairs(network)
    modules = dict(network.named_modules())
    for layer_name, norm_name in floats.items():
        if not shares_weight(network, modules[layer_name]):
            _fold_float(modules[layer_name], modules[norm_name])
    for name, module in modules.items():
        if type(module) in PAIRED_NORMS:
            logger.warning(
                "batch norm '%s' cannot be folded: no plain convolution has it as its only consumer", name
            )
    return network


@torch.no_grad()
def fold_pairs(network: nn.Module) -> nn.Module:
    """``fold`` for quantized pairs only: float layers and their batch norms stay as they are.

    Raises:
        ValueError: if a quantized activation is still being observed, or quantizers are off; nothing is folded
            then.
    """
    layers = {name: m for name, m in network.named_modules() if isinstance(m, QuantizedLayer)}
    for name, layer in layers.items():
        if any(quantizer.observer is not None for quantizer in layer.quantizers):
            raise ValueError(f"layer '{name}' is being calibrated: finish calibrate before fold")
        if not all(quantizer.enabled for quantizer in layer.quantizers):
            raise ValueError(f"layer '{name}' has its quantizers off: set_quantizers(network, True) first")
    network.eval()
    for layer in layers.values():
        if layer.paired_norm is not None:
            _fold_pair(layer, layer.paired_norm)
    return network


def _fold_pair(layer: QuantizedLayer, norm: PairedNorm) -> None:
    quantizers, seen = layer.weight_quantizers, layer.folded_weights()
    weight, _ = layer.effective_parameters()
    bias = layer.folded_bias(norm)
    # The printed formula does not round its own top value to itself.
    codes = {p: q.codes(seen[p]) for p, q in quantizers.items() if q.number_format.kind == "literal"}
    for quantizer in quantizers.values():
        _, after = layer.norm_factors(norm, quantizer)
        if after is not None:
            quantizer.log2_scale.copy_(folded_log2_scale(quantizer, after))
    layer.pair_with(None)
    _set_parameters(layer, weight, bias)
    if codes:
        layer.set_codes(codes)
    take_norm_out(norm)


def _fold_float(layer: Any, norm: nn.Module) -> None:
    # A subclass may do more than its base, and a weight that is no parameter is computed anew in every forward.
    if not is_quantizable(layer) or "weight" not in layer._parameters:
        return
    if type(norm) not in PAIRED_NORMS or not isinstance(norm, _BatchNorm):
        return
    if norm.running_mean is None or norm.running_var is None:
        return
    gain = torch.rsqrt(norm.running_var + norm.eps)
    gain = gain if norm.weight is None else gain * norm.weight
    old = torch.zeros_like(gain) if layer.bias is None else layer.bias
    shift = (old - norm.running_mean) * gain
    weight = layer.weight
    if isinstance(layer, TRANSPOSED):
        grouped = weight.unflatten(0, (layer.groups, -1))
        factor = gain.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        folded = (grouped * factor).flatten(0, 1)
    else:
        folded = weight * gain.view(-1, *[1] * (weight.dim() - 1))
    _set_parameters(layer, folded, shift if norm.bias is None else shift + norm.bias)
    take_norm_out(norm)


def _set_parameters(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(bias.clone())


def take_norm_out(norm: nn.Module) -> None:
    """Make a batch norm the identity that stands in its place after folding, in place."""
    norm._parameters.clear()
    norm._buffers.clear()
    norm.__class__ = FoldedNorm
