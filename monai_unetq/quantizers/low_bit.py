"""Binary, ternary and power-of-two quantization as pure functions: codes, values and gradients of the papers.

As in ``functional``, all of them compute in the tensor's own float type, let NaN through as NaN, and follow plain
operations only where no gradient is asked for, so that they can be traced and exported.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .functional import along_axis, in_cache, recorded

__all__ = [
    "power_of_two_codes",
    "power_of_two_multipliers",
    "power_of_two_weights",
    "sign_codes",
    "sign_quantize",
    "sign_weights",
    "ternary_codes",
    "ternary_tanh",
    "ternary_weights",
]

TERNARY_THRESHOLD = 0.7
"""Of the mean magnitude; Li et al., 2016, equation 6."""


# Binary


def sign_codes(tensor: Tensor) -> Tensor:
    """+1 where the tensor is 0 or more, -1 elsewhere, NaN where it is NaN; floats of the tensor's type."""
    # 0 · clamp(x) is NaN where x is, also 0 where it is infinite. A comparison and three passes over one array take
    # a tenth of the time of torch.where on a CPU.
    return torch.ge(tensor, 0).to(tensor.dtype).mul_(2).sub_(1).add_(tensor.clamp(-1, 1).mul_(0))


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(tensor, scale)
        ctx.share = share
        return _signs(tensor, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensor, scale = ctx.saved_tensors
        grad = grads[0]
        # hardtanh's gradient is 0 at its limits, and |x| = 1 counts as inside: the limit is the number after 1.
        limit = 1 + torch.finfo(tensor.dtype).eps
        inside = torch.ops.aten.hardtanh_backward(grad, tensor, -limit, limit).mul_(scale)
        if ctx.share:
            inside.add_(grad, alpha=ctx.share)
        slope = None
        if ctx.needs_input_grad[1]:
            if scale.dim():
                summed = [d for d, n in enumerate(scale.shape) if n == 1]
                slope = (grad * sign_codes(tensor)).sum(summed, keepdim=True)
            else:
                slope = torch.zeros_like(scale)
                for g, x in zip(*in_cache(grad, tensor), strict=True):
                    slope = slope + (g * sign_codes(x)).sum()
        return inside, slope, None


def _signs(tensor: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() or recorded():
        return sign_codes(tensor).mul_(scale)
    out = torch.empty_like(tensor)
    for x, y in zip(*in_cache(tensor, out), strict=True):
        y.copy_(sign_codes(x).mul_(scale))
    return out


def sign_quantize(tensor: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """scale · sign(tensor) with sign(0) = +1 (Courbariaux et al., 2016, equations 1 and 4; BNN has scale 1).

    The gradient of the tensor is straight through where |tensor| ≤ 1, times the scale: scale · g · 1{|x| ≤ 1}. The
    scale's, where it asks for one, is the exact Σ g · sign(x).

    Args:
        tensor: any shape, floating point.
        scale: 0-dim, or (C,) along ``axis``; positive.
        axis: the channel axis of a per-channel scale.

    Returns:
        the rounded tensor, same shape and dtype; ±inf become ±scale, NaN stays NaN.
    """
    along = along_axis(scale, tensor, axis).to(tensor.dtype)
    if not torch.is_grad_enabled():
        return _signs(tensor, along)
    out: Tensor = _Sign.apply(tensor, along, 0.0)
    return out


def sign_weights(tensor: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """``sign_quantize`` of a weight whose scale is its mean magnitude (XNOR-Net, Rastegari et al., ECCV 2016).

    The gradient is the one printed in section 3.1 there, g · (1/n + scale · 1{|w| ≤ 1}), n the number of weights that
    share a scale; 1/n is the share of the scale, which gets no gradient itself.

    Args:
        tensor: any shape, floating point.
        scale: 0-dim, or (C,) along ``axis``; the mean magnitude of the values that share it, rounded as it may be.
        axis: the channel axis of a per-channel scale.
    """
    along = along_axis(scale.detach(), tensor, axis).to(tensor.dtype)
    if not torch.is_grad_enabled():
        return _signs(tensor, along)
    out: Tensor = _Sign.apply(tensor, along, scale.numel() / max(tensor.numel(), 1))
    return out


# Ternary


def ternary_codes(tensor: Tensor, axis: int | None = None) -> Tensor:
    """sign(w) · 1{|w| > Δ} with Δ = 0.7 · mean|w| (Ternary Weight Networks, Li et al., 2016, equations 3 and 6).

    Args:
        tensor: weights, any shape, floating point.
        axis: where given, every index of this axis has its own Δ; else all share one.

    Returns:
        the codes -1, 0, 1, same shape and dtype; NaN where the tensor is NaN.
    """
    magnitude = tensor.abs()
    if axis is None:
        mean = magnitude.mean()
    else:
        mean = magnitude.mean([d for d in range(tensor.dim()) if d != axis % tensor.dim()], keepdim=True)
    above = torch.gt(magnitude, TERNARY_THRESHOLD * mean).to(tensor.dtype)
    return sign_codes(tensor).mul_(above)


def ternary_weights(tensor: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """scale · ``ternary_codes``; straight-through gradient (Li et al., 2016, section 2.3), everywhere.

    The scale's gradient, where it asks for one, is the exact Σ g · code.

    Args:
        tensor: weights, any shape, floating point.
        scale: 0-dim, or (C,) along ``axis``; positive.
        axis: where given, every index of this axis has its own threshold and scale; else all share one.
    """
    rounded = ternary_codes(tensor.detach(), axis) * along_axis(scale, tensor, axis).to(tensor.dtype)
    return _straight_through(tensor, rounded)


def ternary_tanh(tensor: Tensor, beta: float) -> Tensor:
    """½ · (tanh(β(2x - 1)) + tanh(β(2x + 1))) (TernaryNet, Heinrich et al., IJCARS 2018).

    Smooth, with values in (-1, 1). As β rises it tends to the step with the values -1, 0, 1 and thresholds ±½.
    Its derivative is β · (2 - tanh²(β(2x - 1)) - tanh²(β(2x + 1))).

    Args:
        tensor: any shape, floating point.
        beta: steepness, positive.
    """
    doubled = 2 * tensor
    return 0.5 * (torch.tanh(beta * (doubled - 1)) + torch.tanh(beta * (doubled + 1)))


# Powers of two


def power_of_two_codes(tensor: Tensor, scale: Tensor, qmax: int, axis: int | None = None) -> Tensor:
    """0, or ±k where the nearest value of the format is ±2^(k-1) · scale (Zhou et al., ICLR 2017, equation 4).

    With u = |w| / scale the code is 0 below ½, and k where 0.75 · 2^(k-1) ≤ u < 1.5 · 2^(k-1) (from ½ for k = 1),
    at most ``qmax``: the borders lie half-way between neighbouring values. Only comparisons: exact where the scale is
    a power of two.

    Args:
        tensor: weights, any shape, floating point.
        scale: 0-dim, or (C,) along ``axis``; the smallest magnitude.
        qmax: highest code, the number of powers of two.
        axis: the channel axis of a per-channel scale.

    Returns:
        the codes as floats of the tensor's type; NaN where the tensor is NaN.
    """
    return _staircase(tensor, scale, [1] * qmax, axis)


def _staircase(tensor: Tensor, scale: Tensor, rises: list[int], axis: int | None) -> Tensor:
    """sign(w) · the sum of the rises at the borders ½, 1.5, 3, 6, … that |w| / scale has reached."""
    units = tensor.abs() / along_axis(scale.detach(), tensor, axis).to(tensor.dtype)
    height = torch.zeros_like(units)
    for k, rise in enumerate(rises):
        height.add_(torch.ge(units, 0.75 * 2**k if k else 0.5).to(tensor.dtype), alpha=rise)
    return sign_codes(tensor).mul_(height)


def power_of_two_multipliers(qmax: int) -> list[int]:
    """What the codes 0…``qmax`` stand for in units of the scale: 0, 1, 2, 4, …"""
    return [0, *(1 << k for k in range(qmax))]


def power_of_two_weights(tensor: Tensor, scale: Tensor, qmax: int, axis: int | None = None) -> Tensor:
    """scale · 2^(k-1) with the sign of the tensor, k of ``power_of_two_codes``; straight-through gradient, everywhere.

    Args:
        tensor: weights, any shape, floating point.
        scale: 0-dim, or (C,) along ``axis``; the smallest magnitude; gets no gradient.
        qmax: highest code, the number of powers of two.
        axis: the channel axis of a per-channel scale.
    """
    values = power_of_two_multipliers(qmax)
    rises = [above - below for below, above in pairwise(values)]
    multiples = _staircase(tensor.detach(), scale, rises, axis)
    return _straight_through(
        tensor, multiples.mul_(along_axis(scale.detach(), tensor, axis).to(tensor.dtype))
    )


class _StraightThrough(torch.autograd.Function):
    """The second tensor's value; the gradient goes to both."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def _straight_through(tensor: Tensor, rounded: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return rounded
    out: Tensor = _StraightThrough.apply(tensor, rounded)
    return out
