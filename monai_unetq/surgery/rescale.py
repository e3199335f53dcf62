"""``rescale``: move factors of two between layers so that static formats fit the network.

A static format such as Q6.0 leaves no scale to calibrate. But a network with ReLU is the same function when a
layer's result is multiplied by g > 0 (a paired batch norm's γ and β, or the weight and bias of a layer without
one) and the layers that read it take the factor out again: a paired one through its batch norm's statistics,
another one through its weight. (Cross-layer equalization,
Nagel et al., ICCV 2019, section 4.1, moves the same factors for another purpose; with batch norm they need not
cancel in the weights.) The gains are powers of two, chosen so that the share of the signal's power that rounding
leaves, multiplied over all weights and inputs on its way, is largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..formats import QFormat
from ..layers import QuantizedLayer
from ..quantizers import Quantizer, RangeMethod, fake_quantize
from .observe import Trace
from .quantize import quantized_layers

__all__ = ["rescale"]

# Operations with f(g·x) = g·f(x) for g > 0.
_HOMOGENEOUS = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "max_pool1d", "max_pool2d", "max_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cat",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "view", "reshape", "permute", "transpose", "slice", "select", "clone", "contiguous",
    "detach", "alias", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad3d",
    "replication_pad3d", "add", "add_", "split", "split_with_sizes", "flatten", "squeeze", "unsqueeze",
}  # fmt: skip
_EXPONENTS = sorted(range(-8, 13), key=abs)  # of equal gains the one nearest to 1
_SWEEPS = 4
_WORST = 1 - 1e-6
_FIXED = "fixed"


@dataclass(frozen=True)
class _Groups:
    """Layers whose results meet somewhere and must share a gain; ``source`` is the group each layer reads."""

    group_of: dict[str, str]
    source_of: dict[str, str]


@torch.no_grad()
def rescale(
    network: nn.Module,
    trace: Trace,
    inputs: Mapping[str, Mapping[str, Tensor]],
    method: RangeMethod = "mse",
) -> dict[str, int]:
    """Rescale quantized layers by powers of two, in place, for the formats that the network has.

    In float arithmetic the network computes the same function before and after; its rounding error shrinks.

    Args:
        network: quantized, with ReLU (or another homogeneous activation) between the layers. Where other
            operations follow a layer, its gain stays 1.
        trace: one observed pass of the network as it is now.
        inputs: layer name → part of its input → sample of the values that reach it, any shape.
        method: how calibrated weight scales are found again; see ``calibrate``.

    Returns:
        layer name → exponent of its result's gain, for the layers whose gain is not 1.
    """
    layers = quantized_layers(network)
    groups = _group(trace, layers)
    weight_error = {n: _all_errors(m.weight_quantizers, m.folded_weights()) for n, m in layers.items()}
    input_error = {n: _all_errors(m.input_quantizers, inputs[n]) for n, m in layers.items()}

    def cost(gains: Mapping[str, int]) -> float:
        total = 0.0
        for name in layers:
            source = gains[groups.source_of[name]]
            own = gains[groups.group_of[name]] if name in groups.group_of else 0
            total += input_error[name](source) + weight_error[name](own - source)
        return total

    gains = dict.fromkeys([*groups.group_of.values(), *groups.source_of.values()], 0)
    free = [group for group in gains if group != _FIXED]
    for _ in range(_SWEEPS):
        before = dict(gains)
        # All groups together first: that is where a whole network leaves its range.
        moved = min(_EXPONENTS, key=lambda e: cost({g: v + e if g in free else v for g, v in gains.items()}))
        gains = {g: v + moved if g in free else v for g, v in gains.items()}
        for group in free:
            gains[group] = min(_EXPONENTS, key=lambda e, g=group: cost({**gains, g: e}))  # type: ignore[misc]
        if gains == before:
            break
    applied = {}
    for name, layer in layers.items():
        own = gains[groups.group_of[name]] if name in groups.group_of else 0
        _apply(layer, 2.0 ** gains[groups.source_of[name]], 2.0**own)
        layer.calibrate_weight(method)
        if own:
            applied[name] = own
    return applied


def _apply(layer: QuantizedLayer, source: float, own: float) -> None:
    """The layer's input comes times ``source``, its result is to go times ``own``."""
    for quantizer in layer.input_quantizers.values():
        if quantizer.number_format.has_free_scale:
            quantizer.set_scale(quantizer.scale * source)
    norm = layer.paired_norm
    if norm is None:
        layer.weight.mul_(own / source)
        if layer.bias is not None:
            layer.bias.mul_(own)
        return
    assert norm.running_mean is not None and norm.running_var is not None
    if layer.bias is not None:
        layer.bias.mul_(source)
    norm.running_mean.mul_(source)
    variance = (norm.running_var + norm.eps) * source**2
    norm.running_var.copy_((variance - norm.eps).clamp(min=0))
    if norm.weight is not None:
        # σ² + ε cannot become less than ε: where it would have to, γ takes the rest.
        norm.weight.mul_(own * (norm.eps / variance).sqrt().clamp(min=1.0))
    if norm.bias is not None:
        norm.bias.mul_(own)


def _errors(number_format: QFormat, values: Tensor) -> Callable[[int], float]:
    """-log(1 - relative squared rounding error) of values · 2^e as a function of e; 0 for a scale that is not fixed.

    The logarithm, because one tensor that loses everything (error 1) cannot be made up for by the others.
    """
    if number_format.step is None or number_format.kind == "literal":
        return lambda exponent: 0.0
    values = values.detach().float().flatten()
    power = float(values.square().mean()) or 1.0
    step = torch.tensor(number_format.step)
    table: dict[int, float] = {}

    def error(exponent: int) -> float:
        if exponent not in table:
            scaled = values * 2.0**exponent
            rounded = fake_quantize(scaled, step.to(values.device), number_format.qmin, number_format.qmax)
            share = float((rounded - scaled).square().mean()) / (power * 4.0**exponent)
            table[exponent] = -math.log1p(-min(share, _WORST))
        return table[exponent]

    return error


def _all_errors(quantizers: Mapping[str, Quantizer], values: Mapping[str, Tensor]) -> Callable[[int], float]:
    """The errors of a tensor's parts, added; all of them take the same exponent."""
    errors = [_errors(quantizer.number_format, values[part]) for part, quantizer in quantizers.items()]
    return lambda exponent: sum(error(exponent) for error in errors)


def _group(trace: Trace, layers: Mapping[str, QuantizedLayer]) -> _Groups:
    """Which layers' results meet (and share a gain), followed through the homogeneous operations."""
    parent: dict[str, str] = {_FIXED: _FIXED}

    def find(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            name = parent[name]
        return name

    def union(names: list[str]) -> str:
        roots = [find(name) for name in names]
        root = _FIXED if _FIXED in roots or not roots else roots[0]
        for other in roots:
            parent[other] = root
        return root

    gained = [n for n, layer in layers.items() if layer.paired_norm is None or layer.paired_norm.affine]
    produced = {call.output: call.layer for call in trace.calls}
    source: dict[int, str] = {}
    for tensor, name in produced.items():
        source[tensor] = find(name) if name in gained else _FIXED
    for op in trace.operations:
        if op.layer in layers:
            continue  # inside a layer: its result stands above
        met = [source.get(t, _FIXED) for t in op.inputs]
        homogeneous = op.name in _HOMOGENEOUS and op.constant == 0
        merged = union(met) if homogeneous else union([*met, _FIXED])
        for tensor in op.outputs:
            if tensor not in produced:
                source[tensor] = merged
            elif not homogeneous:
                union([source[tensor], _FIXED])
    for tensor in trace.network_outputs:
        union([source.get(tensor, _FIXED), _FIXED])
    source_of = {}
    for name, layer in layers.items():
        met = [source.get(call.input, _FIXED) for call in trace.calls_of(name)]
        if layer.paired_norm is not None and not layer.paired_norm.affine:
            met.append(_FIXED)  # no γ, see _apply
        # A layer that runs twice, or has no batch norm and runs on several sources, gets one gain for all.
        source_of[name] = union(met)
    for call in trace.calls:
        if call.layer not in layers:  # float layers take no factor out
            union([source.get(call.input, _FIXED), _FIXED])
    return _Groups(
        {name: find(name) for name in gained}, {name: find(source) for name, source in source_of.items()}
    )
