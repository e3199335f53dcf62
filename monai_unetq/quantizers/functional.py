"""Fake quantization as pure functions: round to a grid, with a straight-through gradient.

All of them compute in the tensor's own float type, round half to even, saturate (infinities too) and let NaN
through as NaN. They are a few vectorized passes over pieces that stay in the cache: torch's native
``fake_quantize_*`` kernels take many times as long on a CPU, turn NaN into the lowest code, and per channel send
+inf there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "fake_quantize",
    "learned_fake_quantize",
    "learned_fake_quantize_parts",
    "literal_fake_quantize",
    "recorded",
    "to_codes",
]


_PIECE = 1 << 17
"""Values that are worked on at a time on a CPU: 512 KiB of float32, so that a few passes stay in the cache."""


def recorded() -> bool:
    """Whether the operations are being recorded, to run again on tensors of other sizes: no pieces then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def along_axis(scale: Tensor, tensor: Tensor, axis: int | None) -> Tensor:
    """``scale`` of shape (C,) in a shape that broadcasts along ``axis`` of ``tensor``; a 0-dim scale as it is."""
    if axis is None or scale.dim() == 0:
        return scale
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return scale.view(shape)


def to_codes(tensor: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    """Integer codes, clamp(round(tensor / scale), qmin, qmax), as floats of the tensor's type.

    Args:
        tensor: any shape, floating point.
        scale: 0-dim, or (C,) along ``axis``; positive.
        qmin: lowest code.
        qmax: highest code.
        axis: the channel axis of a per-channel scale.

    Returns:
        the codes, same shape and dtype as ``tensor``; NaN where the tensor is NaN.
    """
    scale = along_axis(scale, tensor, axis).to(tensor.dtype)
    return torch.mul(tensor, scale.reciprocal()).round_().clamp_(qmin, qmax)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(tensor, scale)
        ctx.limits = (qmin, qmax)
        return _rounded(tensor, scale, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensor, scale = ctx.saved_tensors
        return _inside(grads[0], tensor, scale, *ctx.limits), None, None, None


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: Tensor, qmin: int, qmax: int, gain: float) -> Tensor:
        quantized = _rounded(tensor, scale, qmin, qmax)
        ctx.save_for_backward(tensor, scale, quantized)
        ctx.limits = (qmin, qmax)
        ctx.gain = gain
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensor, scale, quantized = ctx.saved_tensors
        grad = grads[0]
        if scale.dim() == 0 and tensor.device.type == "cpu" and not (recorded() or torch.is_grad_enabled()):
            inside = torch.empty_like(tensor)
            slope = _straight_through([grad], tensor, quantized, scale, ctx.limits, inside)
        else:
            inside = _inside(grad, tensor, scale, *ctx.limits)
            summed = [d for d, n in enumerate(scale.shape) if n == 1] if scale.dim() else None
            slope = _slopes(grad, inside, tensor, quantized).sum(summed, keepdim=bool(scale.dim()))
        return inside, (slope * (ctx.gain / scale)).to(scale.dtype), None, None, None


class _LearnedFakeQuantizeParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        sizes: list[int],
        axis: int,
        limits: Sequence[tuple[int, int]],
        apart: Sequence[bool],
        *scales: Tensor,
    ) -> tuple[Tensor, ...]:
        quantized = torch.empty_like(tensor)
        pieces = quantized.split(sizes, axis)
        for piece, out, scale, ends in zip(tensor.split(sizes, axis), pieces, scales, limits, strict=True):
            _rounded(piece, scale, *ends, out)
        ctx.save_for_backward(tensor, quantized, *scales)
        ctx.sizes, ctx.axis, ctx.limits, ctx.apart = sizes, axis, limits, apart
        ctx.set_materialize_grads(False)
        return quantized, *(piece.clone() for piece, wanted in zip(pieces, apart, strict=True) if wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensor, quantized, *scales = ctx.saved_tensors
        whole = torch.zeros_like(tensor) if grads[0] is None else grads[0]
        beside = iter(grads[1:])
        inside = None if torch.is_grad_enabled() else torch.empty_like(tensor)
        gradients, slopes = [], []
        for number, (grad, x, q) in enumerate(
            zip(*(t.split(ctx.sizes, ctx.axis) for t in (whole, tensor, quantized)), strict=True)
        ):
            scale, limits = scales[number], ctx.limits[number]
            by_itself = next(beside) if ctx.apart[number] else None
            both = [grad] if by_itself is None else [grad, by_itself]
            if inside is None:  # to be differentiated once more
                total = both[0] if len(both) == 1 else both[0] + both[1]
                gradients.append(_inside(total, x, scale, *limits))
                slope = _slopes(total, gradients[-1], x, q).sum()
            else:
                here = inside.split(ctx.sizes, ctx.axis)[number]
                slope = _straight_through(both, x, q, scale, limits, here)
            slopes.append((slope * (_gain(x, scale, limits[1]) / scale)).to(scale.dtype))
        gradient = torch.cat(gradients, ctx.axis) if inside is None else inside
        return gradient, None, None, None, None, *slopes


def _straight_through(
    grads: Sequence[Tensor], tensor: Tensor, quantized: Tensor, scale: Tensor, limits: tuple[int, int], inside: Tensor
) -> Tensor:  # fmt: skip
    """Write the tensor's gradient into ``inside``; return the slope of the scale. The gradients given are summed.

    On a CPU, for one scale, in pieces that stay in the cache.
    """
    slope, ends = torch.zeros_like(scale), _ends(scale, *limits)
    for x, q, i, *some in zip(*in_cache(tensor, quantized, inside, *grads), strict=True):
        g = some[0] if len(some) == 1 else some[0] + some[1]
        torch.ops.aten.hardtanh_backward.grad_input(g, x, *ends, grad_input=i)
        slope = slope + torch.mul(g, q).addcmul_(i, x, value=-1).sum()
    return slope


def _slopes(grad: Tensor, inside: Tensor, tensor: Tensor, quantized: Tensor) -> Tensor:
    """What every value adds to the slope of its scale s, times s.

    d quantized / d scale is round(x/s) - x/s inside the range and the code itself outside. The difference is taken value
    by value: of two sums over all values float32 would leave little (at 8 bits a fifth of it was lost, at 12 all).
    """
    return torch.addcmul(grad * quantized, inside, tensor, value=-1)


def _gain(tensor: Tensor, scale: Tensor, qmax: int) -> float:
    """1 / √(N·qmax), N the number of values that share a scale (LSQ, section 2.2)."""
    sharing = tensor.numel() // scale.numel()
    return float(1.0 / (max(sharing, 1) * max(qmax, 1)) ** 0.5)


def _rounded(tensor: Tensor, scale: Tensor, qmin: int, qmax: int, out: Tensor | None = None) -> Tensor:
    """scale · clamp(round(tensor / scale), qmin, qmax), in the tensor's memory format, or written into ``out``."""
    inverse = scale.reciprocal()
    if out is None and (scale.dim() or recorded()):
        return torch.mul(tensor, inverse).round_().clamp_(qmin, qmax).mul_(scale)
    out = torch.empty_like(tensor) if out is None else out
    for x, y in zip(*in_cache(tensor, out), strict=True):
        torch.mul(x, inverse, out=y).round_().clamp_(qmin, qmax).mul_(scale)
    return out


def _inside(grad: Tensor, tensor: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """``grad`` where the tensor rounds to a code in [qmin, qmax], else 0: the straight-through gradient."""
    if scale.dim() == 0 and scale.device.type == "cpu" and not torch.compiler.is_compiling():
        # One vectorized pass; on other devices reading the ends would wait for the device.
        return torch.ops.aten.hardtanh_backward(grad, tensor, *_ends(scale, qmin, qmax))
    return grad * ((tensor > (qmin - 0.5) * scale) & (tensor < (qmax + 0.5) * scale))


def _ends(scale: Tensor, qmin: int, qmax: int) -> tuple[float, float]:
    """Between them values round to a code in [qmin, qmax]."""
    return ((qmin - 0.5) * scale).item(), ((qmax + 0.5) * scale).item()


def in_cache(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors in pieces that a processor's cache holds, where all lie in one dense order, or each image of them; else
    whole.

    Passes over pieces cost a fraction of passes over a whole activation, which go through memory each time.
    """
    whole: list[tuple[Tensor, ...]] = [(t,) for t in tensors]
    first = tensors[0]
    if first.device.type != "cpu" or recorded():
        return whole
    dense = torch.ops.aten.is_non_overlapping_and_dense
    if all(t.stride() == first.stride() and dense(t) for t in tensors):
        return [t.as_strided((t.numel(),), (1,)).split(_PIECE) for t in tensors]
    # Some channels of an activation: dense within each image.
    if first.dim() > 1 and all(t.stride()[1:] == first.stride()[1:] and dense(t[:1]) for t in tensors):
        return [
            tuple(piece for i in t.unbind() for piece in i.as_strided((i.numel(),), (1,)).split(_PIECE))
            for t in tensors
        ]
    return whole


def fake_quantize(tensor: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    """Round to the grid ``scale × {qmin … qmax}``; straight-through gradient, zero outside the range.

    Args:
        tensor: any shape, floating point.
        scale: 0-dim, or (C,) along ``axis``; positive; gets no gradient.
        qmin: lowest code.
        qmax: highest code.
        axis: the channel axis of a per-channel scale.

    Returns:
        the rounded tensor, same shape and dtype. ±inf saturate, NaN stays NaN.
    """
    along = along_axis(scale.detach(), tensor, axis).to(tensor.dtype)
    if not torch.is_grad_enabled():  # tracing and export follow plain operations only
        return _rounded(tensor, along, qmin, qmax)
    out = _FakeQuantize.apply(tensor, along, qmin, qmax)
    return out


def learned_fake_quantize(
    tensor: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """``fake_quantize`` whose scale is trained too (LSQ, Esser et al., ICLR 2020, equations 1 to 3).

    What rounds to one of the codes counts as inside the range, here as in ``fake_quantize`` (and in torch's
    ``_fake_quantize_learnable_*``); the paper's range ends at the outermost codes themselves, half a step
    earlier. The gradient of the scale is multiplied by 1 / √(N·qmax), N the number of values that share the
    scale (section 2.2). It is NaN where a value is infinite or NaN.

    Args:
        tensor: any shape, floating point.
        scale: 0-dim, or (C,) along ``axis``; positive; differentiable.
        qmin: lowest code.
        qmax: highest code.
        axis: the channel axis of a per-channel scale.
    """
    along = along_axis(scale, tensor, axis).to(tensor.dtype)
    if not torch.is_grad_enabled():
        return _rounded(tensor, along, qmin, qmax)
    out = _LearnedFakeQuantize.apply(tensor, along, qmin, qmax, _gain(tensor, scale, qmax))
    return out


def learned_fake_quantize_parts(
    tensor: Tensor,
    scales: Sequence[Tensor],
    limits: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    axis: int,
    apart: Sequence[bool],
) -> tuple[Tensor, ...]:
    """``learned_fake_quantize`` of parts that stand side by side, each at its own scale, without cutting and joining them.

    For training on a CPU: the same values and gradients as cut, rounded and joined, in fewer passes over memory.

    Args:
        tensor: any shape, float32 or float64.
        scales: of each part, 0-dim; positive; differentiable.
        limits: of each part, lowest and highest code.
        sizes: of each part along ``axis``.
        axis: where the parts are.
        apart: parts that are also wanted by themselves.

    Returns:
        the rounded tensor, and a copy of each part that is wanted apart.
    """
    scales = [scale.to(tensor.dtype) for scale in scales]
    out: tuple[Tensor, ...] = _LearnedFakeQuantizeParts.apply(
        tensor, list(sizes), axis, tuple(limits), tuple(apart), *scales
    )
    return out


class _LiteralFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, integer_bits: int, fraction_bits: int, signed: bool) -> Tensor:
        ctx.save_for_backward((tensor.abs() < 2.0**integer_bits) & (signed or tensor >= 0))
        return _literal(tensor, integer_bits, fraction_bits, signed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


def _literal(tensor: Tensor, integer_bits: int, fraction_bits: int, signed: bool) -> Tensor:
    magnitude = tensor.abs()
    whole = magnitude.floor()
    fraction = magnitude - whole
    step = 2.0**-fraction_bits
    whole.clamp_(max=2**integer_bits - 1)
    # quantize(x, 0) is round(clamp(x, 0)) with clamp to 2^0 - 1 = 0: no fraction bits, no fraction.
    fraction = (fraction / step).round_() * step if fraction_bits else torch.zeros_like(fraction)
    out = torch.sign(tensor) * (whole + fraction)
    if not signed:
        out = out.clamp(min=0.0)
    # |x| = inf has no fraction; it saturates.
    top = 2.0**integer_bits - 1 + (1 if fraction_bits else 0)
    return torch.where(torch.isinf(tensor), torch.clamp(tensor, -top if signed else 0.0, top), out)


def literal_fake_quantize(
    tensor: Tensor, integer_bits: int, fraction_bits: int, signed: bool = True
) -> Tensor:
    """The formula as printed in AskariHemmat et al., 2019, section 3.1; for comparison, not for use.

    ``sign(x)·(quantize(⌊|x|⌋, i) + quantize(|x| - ⌊|x|⌋, f))`` with
    ``quantize(x, n) = round(clamp(x, n) << n) >> n``: sign-magnitude, and magnitudes of 2^i and more wrap
    in the fraction (1.3 → 0.3125 in Q0.4).

    Args:
        tensor: any shape, floating point.
        integer_bits: i.
        fraction_bits: f.
        signed: False sends negative values to 0.

    Returns:
        the rounded tensor; straight-through gradient, zero where |x| ≥ 2^i.
    """
    if not torch.is_grad_enabled():
        return _literal(tensor, integer_bits, fraction_bits, signed)
    out = _LiteralFakeQuantize.apply(tensor, integer_bits, fraction_bits, signed)
    return out
