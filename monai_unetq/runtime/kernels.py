"""Integer arithmetic on numpy arrays: rounding shifts, float images by their bits, convolution, pooling, interpolation.

Nothing here computes with floats: a float32 image is only ever looked at as the integers that its bits are. Tensors
are (C, N, spatial…), channels first, so that what differs between channels is a loop over contiguous pieces.

Convolution is a sum over K = taps × input channels of one input row times one weight, for all output channels, by
``np.einsum`` on pieces that stay in the cache: its inner loop is a vectorized multiply-add, for int16 as for int32.
numpy's integer ``matmul`` is not vectorized and reaches 0.3 to 0.7·10⁹ MACs/s on one core; this reaches 13·10⁹ where
partial sums are proven to fit int16 (4-bit weights with 6-bit activations), 7·10⁹ in int32, 2·10⁹ in int64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

__all__ = [
    "ConvolutionPlan",
    "clip_channels",
    "convolve",
    "float_parts",
    "integer_dtype",
    "interpolate",
    "max_pool",
    "pad_spatial",
    "plan_convolution",
    "round_float_bits",
    "round_float_literally",
    "round_literally",
    "round_shift",
    "round_to",
    "sum_pool",
]

ROWS, COLUMNS = 128, 2048
"""A piece of K × pixels that is worked on at a time: 512 KiB of int16."""

_MANTISSA_BITS = 23
_INFINITE = 1 << 20
_FAR = 38
"""A left shift that takes every number but 0 out of any format, and leaves 24-bit mantissas within int64."""


def integer_dtype(bound: int, least: int = 16) -> np.dtype:
    """The narrowest signed type of at least ``least`` bits that holds ±``bound`` (not the type's lowest value).

    Raises:
        ValueError: if int64 does not.
    """
    for bits in (16, 32, 64):
        if bits >= least and bound < 1 << (bits - 1):
            return np.dtype(f"int{bits}")
    raise ValueError(f"{bound} does not fit int64")


# Rounding


def round_shift(values: np.ndarray, shift: int) -> np.ndarray:
    """values / 2^shift, rounded half to even; shift ≥ 0, below the type's bits - 1, and |values| + 2^shift fits."""
    if shift == 0:
        return values
    odd = (values >> shift) & 1
    return (values + odd + ((1 << (shift - 1)) - 1)) >> shift


def round_to(values: np.ndarray, exponent: int, to: int, low: int, high: int, bound: int) -> np.ndarray:
    """clamp(round half to even(values · 2^(to - exponent)), low, high).

    Args:
        values: any shape, int32 or int64, of magnitudes up to ``bound``.
        exponent: values are integer × 2^-exponent.
        to: exponent of the result.
        low: least integer of the result.
        high: largest integer of the result.
        bound: less than a quarter of what the type holds.

    Returns:
        same shape and type.
    """
    shift = exponent - to
    if shift >= 0:
        # Beyond, everything is less than half a step.
        shift = min(shift, bound.bit_length() + 1)
        # Saturate first: what is left cannot overflow when it is rounded. Rounding is monotone.
        return _clamp(round_shift(_clamp(values, low << shift, high << shift, bound), shift), low, high)
    up = min(-shift, 32)  # formats have 24 bits at most
    return _clamp(_clamp(values, (low >> up) - 1, (high >> up) + 1, bound) << up, low, high)


def _clamp(values: np.ndarray, low: int, high: int, bound: int | None = None) -> np.ndarray:
    if bound is not None:  # limits may lie beyond the type; values do not
        low, high = max(low, -bound - 1), min(high, bound + 1)
        low, high = min(low, bound + 1), max(high, -bound - 1)
    return values.clip(low, high)


def round_literally(values: np.ndarray, exponent: int, to: int, low: int, high: int) -> np.ndarray:
    """The paper's printed formula: whole and fraction of |x| are rounded apart, so magnitudes wrap.

    Args:
        values: int64, magnitudes below 2^61.
        exponent: values are integer × 2^-exponent.
        to: fraction bits of the result, 0 or more.
        low: -high, or 0 where negative values become 0.
        high: (2^i - 1 + 1) << to with i whole bits; 2^i - 1 without fraction bits.
    """
    magnitude = np.abs(values)
    if exponent >= 62:
        whole, fraction = np.zeros_like(magnitude), magnitude
    elif exponent >= 0:
        whole = magnitude >> exponent
        fraction = magnitude - (whole << exponent)
    else:  # multiples of a power of two: whole numbers, of which only the saturated size matters
        whole, fraction = magnitude.clip(0, 1 << 25) << min(-exponent, 32), np.zeros_like(magnitude)
    top = (high >> to) - (1 if to else 0)
    rounded = whole.clip(0, top) << to
    if to and exponent > 0:
        shift = exponent - to
        bits = min(shift, 62)
        if shift >= 0:
            rounded = rounded + round_shift(fraction.clip(0, (1 << 62) - 1), bits)
        else:
            rounded = rounded + (fraction << -shift)
    return (np.sign(values) * rounded).clip(low, high)


def round_float_bits(values: np.ndarray, exponent: int, low: int, high: int) -> np.ndarray:
    """clamp(round half to even(values · 2^exponent), low, high), found from the values' bits.

    Args:
        values: float32, any shape; never computed with.
        exponent: of the result.
        low: least integer, at least -2^24; infinities saturate.
        high: largest integer, at most 2^24.

    Returns:
        int64, same shape.

    Raises:
        ValueError: if a value is NaN.
    """
    mantissa, power = float_parts(values)
    return _round_by(mantissa, power + exponent).clip(low, high)


def round_float_literally(values: np.ndarray, to: int, low: int, high: int) -> np.ndarray:
    """``round_literally`` of a float32 array, found from its bits; int64.

    Raises:
        ValueError: if a value is NaN.
    """
    mantissa, power = float_parts(values)
    sign, magnitude = np.sign(mantissa), np.abs(mantissa)
    whole = (magnitude << power.clip(0, 30)) >> (-power).clip(0, 62)
    fraction = np.where(power < 0, magnitude - (whole << (-power).clip(0, 38)), 0)
    top = (high >> to) - (1 if to else 0)
    rounded = whole.clip(0, top) << to
    if to:
        rounded = rounded + _round_by(fraction, power + to)
    rounded = np.where(power == _INFINITE, high, rounded)
    return (sign * rounded).clip(low, high)


def _round_by(values: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """values · 2^shift, rounded half to even, of magnitudes below 2^24; shifts beyond 38 to the left are 38."""
    up, down = shift.clip(0, _FAR), (-shift).clip(0, 26)  # 26 to the right leave less than half of one
    half = np.where(down > 0, (np.int64(1) << (down - 1).clip(0, None)) - 1, 0)
    odd = np.where(down > 0, (values >> down) & 1, 0)
    return ((values + odd + half) >> down) << up


def float_parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mantissa (with sign) and power of two of float32 values, int64; infinities have the power 2^20.

    Raises:
        ValueError: if a value is NaN.
    """
    if values.dtype != np.float32:
        raise ValueError(f"found {values.dtype}, expected float32")
    bits = np.ascontiguousarray(values).view(np.int32).astype(np.int64)
    field = (bits >> _MANTISSA_BITS) & 0xFF
    mantissa = bits & ((1 << _MANTISSA_BITS) - 1)
    if ((field == 0xFF) & (mantissa != 0)).any():
        raise ValueError("a value is NaN")
    mantissa = mantissa | ((field > 0).astype(np.int64) << _MANTISSA_BITS)
    power = field.clip(1, None) - (127 + _MANTISSA_BITS)
    power = np.where(field == 0xFF, np.int64(_INFINITE), power)
    return np.where(bits < 0, -mantissa, mantissa), power


# Convolution


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows of K: weights (O of the group, rows), and which (tap, first and last input channel) they are."""

    weights: np.ndarray
    rows: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Pass:
    """A correlation for one phase of the output: input index = step · output index + base, for each tap."""

    phase: tuple[int, ...]
    bases: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[_Piece, ...], ...]  # for each group


@dataclass(frozen=True)
class ConvolutionPlan:
    """A convolution, cut into pieces whose partial sums are proven to fit a narrow type.

    Attributes:
        outputs: O.
        groups: of the convolution.
        bias: (O,) in the accumulator's type.
        partial: type of inputs, weights and partial sums.
        transposed: whether it is a transposed convolution.
        step: input pixels for one output pixel, for each axis (1 where transposed).
        stride: output phases for each axis (1 unless transposed).
        kernel, pads, dilations, output_padding: as given.
    """

    outputs: int
    groups: int
    bias: np.ndarray
    partial: np.dtype
    transposed: bool
    step: tuple[int, ...]
    stride: tuple[int, ...]
    kernel: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    output_padding: tuple[int, ...]
    passes: tuple[_Pass, ...]

    def sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output.

        Raises:
            ValueError: if there is none.
        """
        n, out = len(sizes), []
        for axis, size in enumerate(sizes):
            reach = self.dilations[axis] * (self.kernel[axis] - 1)
            around = self.pads[axis] + self.pads[n + axis]
            if self.transposed:
                out.append(self.stride[axis] * (size - 1) + reach + 1 + self.output_padding[axis] - around)
            else:
                out.append((size + around - reach - 1) // self.step[axis] + 1)
        if any(size < 1 for size in out):
            raise ValueError(f"an image of size {tuple(sizes)} is too small for a kernel of {self.kernel}")
        return tuple(out)


def plan_convolution(
    weight: np.ndarray,
    bias: np.ndarray,
    input_bounds: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    accumulator: np.dtype,
) -> ConvolutionPlan:
    """Cut a convolution into pieces.

    Args:
        weight: int64, (O, I of the group, …), output channels first, transposed or not.
        bias: int64, (O,).
        input_bounds: (I,), largest magnitude of each input channel.
        strides, pads, dilations, groups, output_padding: of the convolution; pads begin of each axis, then end.
        transposed: whether it is a transposed convolution.
        accumulator: int32 or int64, proven to hold every sum.
    """
    kernel = weight.shape[2:]
    taps = list(product(*map(range, kernel)))
    ones = (1,) * len(kernel)
    passes: list[tuple[tuple[int, ...], list[int], list[tuple[int, ...]]]] = []
    if transposed:
        for phase in product(*map(range, strides)):
            offsets = [
                tuple(
                    p + b - d * t
                    for p, b, d, t in zip(phase, pads[: len(kernel)], dilations, tap, strict=True)
                )
                for tap in taps
            ]
            chosen = [
                i for i, o in enumerate(offsets) if all(v % s == 0 for v, s in zip(o, strides, strict=True))
            ]
            bases = [tuple(v // s for v, s in zip(offsets[i], strides, strict=True)) for i in chosen]
            passes.append((phase, chosen, bases))
    else:
        bases = [
            tuple(d * t - b for d, t, b in zip(dilations, tap, pads[: len(kernel)], strict=True))
            for tap in taps
        ]
        passes.append(((0,) * len(kernel), list(range(len(taps))), bases))
    bounds = np.array([min(b, 1 << 62) for b in input_bounds], dtype=np.int64).reshape(groups, -1)
    flat = weight.reshape(*weight.shape[:2], -1)  # (O, I of the group, taps)
    rows = [np.ascontiguousarray(flat[:, :, chosen].transpose(0, 2, 1)) for _, chosen, _ in passes]
    partial = _partial_type(rows, bounds, groups, accumulator)
    cut = tuple(
        _Pass(phase, tuple(bases), _pieces(matrix, bounds, groups, partial))
        for (phase, _, bases), matrix in zip(passes, rows, strict=True)
    )
    return ConvolutionPlan(
        weight.shape[0],
        groups,
        bias.astype(accumulator),
        partial,
        transposed,
        ones if transposed else tuple(strides),
        tuple(strides) if transposed else ones,
        kernel,
        tuple(pads),
        tuple(dilations),
        tuple(output_padding),
        cut,
    )


def _partial_type(
    rows: Sequence[np.ndarray], bounds: np.ndarray, groups: int, accumulator: np.dtype
) -> np.dtype:
    """The narrowest type in which 8 rows (or all there are) can be summed up."""
    top = max((int(np.abs(matrix).max()) for matrix in rows if matrix.size), default=0)
    reach = int(bounds.max()) if bounds.size else 0
    for bits in (16, 32):
        limit = 1 << (bits - 1)
        if bits < accumulator.itemsize * 8 and top < limit and reach < limit:
            worst = max((_worst(matrix, bounds, groups) for matrix in rows if matrix.size), default=0)
            if worst < limit:
                return np.dtype(f"int{bits}")
    return accumulator


def _worst(matrix: np.ndarray, bounds: np.ndarray, groups: int) -> int:
    """Largest sum of 8 consecutive rows, for any output channel."""
    sizes = _magnitudes(matrix, bounds, groups)
    edges = range(0, sizes.shape[1], 8)
    return int(np.add.reduceat(sizes, list(edges), axis=1).max())


def _magnitudes(matrix: np.ndarray, bounds: np.ndarray, groups: int) -> np.ndarray:
    """|weight| · bound, (O, K)."""
    outputs, taps, inputs = matrix.shape
    # Capped, so that sums of them stay within int64; what reaches the caps fits no narrow type.
    sizes = np.abs(matrix).clip(0, 1 << 31).reshape(groups, outputs // groups, taps, inputs)
    capped = (sizes * bounds.clip(0, 1 << 31)[:, None, None, :]).clip(0, 1 << 40)
    return capped.reshape(outputs, taps * inputs)


def _pieces(
    matrix: np.ndarray, bounds: np.ndarray, groups: int, partial: np.dtype
) -> tuple[tuple[_Piece, ...], ...]:
    outputs, taps, inputs = matrix.shape
    limit = (1 << (8 * partial.itemsize - 1)) - 1
    sizes = _magnitudes(matrix, bounds, groups).reshape(groups, outputs // groups, taps * inputs)
    flat = matrix.reshape(groups, outputs // groups, taps * inputs)
    found = []
    for group in range(groups):
        pieces, start = [], 0
        while start < taps * inputs:
            window = sizes[group, :, start : start + ROWS].cumsum(axis=1).max(axis=0)
            stop = start + max(1, int(np.searchsorted(window, limit, side="right")))
            weights = np.ascontiguousarray(flat[group, :, start:stop].astype(partial))
            pieces.append(_Piece(weights, tuple(_segments(start, stop, inputs))))
            start = stop
        found.append(tuple(pieces))
    return tuple(found)


def _segments(start: int, stop: int, inputs: int) -> Iterator[tuple[int, int, int]]:
    while start < stop:
        tap, first = divmod(start, inputs)
        last = min(inputs, first + stop - start)
        yield tap, first, last
        start += last - first


def convolve(image: np.ndarray, plan: ConvolutionPlan) -> np.ndarray:
    """The convolution of an image.

    Args:
        image: (I, N, spatial…), integers within the bounds that the plan was made for.
        plan: of ``plan_convolution``.

    Returns:
        (O, N, spatial…), in the accumulator's type.

    Raises:
        ValueError: if the image is smaller than the kernel.
    """
    sizes = plan.sizes(image.shape[2:])
    out = np.empty((plan.outputs, image.shape[1], *sizes), plan.bias.dtype)
    for one in plan.passes:
        own = tuple(-(-(size - p) // s) for size, p, s in zip(sizes, one.phase, plan.stride, strict=True))
        if min(own, default=1) < 1:
            continue
        region = tuple(slice(p, None, s) for p, s in zip(one.phase, plan.stride, strict=True))
        out[(slice(None), slice(None), *region)] = _correlate(image, plan, one, own)
    return out


def _correlate(image: np.ndarray, plan: ConvolutionPlan, one: _Pass, sizes: tuple[int, ...]) -> np.ndarray:
    """(O, N, …) of one phase. Shifted images are runs of one flat array: rows wrap around, into pixels beyond the
    output that are cut off in the end.
    """
    inputs, batch = image.shape[:2]
    shape, buffers, offsets = _planes(image, plan, one, sizes)
    length = batch * prod(shape)
    total = np.repeat(plan.bias[:, None], length, axis=1)
    run = length - max((offset for _, offset in offsets), default=0)
    per_group, outputs = inputs // plan.groups, plan.outputs // plan.groups
    scratch = np.empty((ROWS, min(COLUMNS, run)), plan.partial)
    partial = np.empty((outputs, min(COLUMNS, run)), plan.partial)
    for group, pieces in enumerate(one.pieces):
        channel = group * per_group
        sums = total[group * outputs : (group + 1) * outputs]
        for start in range(0, run, COLUMNS):
            columns = min(COLUMNS, run - start)
            target = sums[:, start : start + columns]
            for piece in pieces:
                row = 0
                for tap, first, last in piece.rows:
                    buffer, offset = offsets[tap]
                    begin = start + offset
                    scratch[row : row + last - first, :columns] = buffers[buffer][
                        channel + first : channel + last, begin : begin + columns
                    ]
                    row += last - first
                product_ = partial[:, :columns]
                np.einsum("ok,kp->op", piece.weights, scratch[:row, :columns], out=product_)
                np.add(target, product_, target)
    region = tuple(slice(size) for size in sizes)
    return total.reshape(plan.outputs, batch, *shape)[(slice(None), slice(None), *region)]


def _planes(
    image: np.ndarray, plan: ConvolutionPlan, one: _Pass, sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], list[np.ndarray], list[tuple[int, int]]]:
    """The image with zeros around it, its pixels sorted by their position within a step, each (I, flat).

    Returns:
        spatial shape of each plane, the planes, and for each tap its plane and where in it the tap begins.
    """
    step = plan.step
    taps = [
        ([b % s for b, s in zip(base, step, strict=True)], [b // s for b, s in zip(base, step, strict=True)])
        for base in one.bases
    ]
    least = [min((q[axis] for _, q in taps), default=0) for axis in range(len(step))]
    most = [max((q[axis] for _, q in taps), default=0) for axis in range(len(step))]
    shape = tuple(m - low + size for m, low, size in zip(most, least, sizes, strict=True))
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    planes: dict[tuple[int, ...], int] = {}
    buffers: list[np.ndarray] = []
    offsets: list[tuple[int, int]] = []
    for remainder, quotient in taps:
        key = tuple(remainder)
        if key not in planes:
            planes[key] = len(buffers)
            buffers.append(_plane(image, key, step, least, shape, plan.partial))
        where = sum((q - low) * s for q, low, s in zip(quotient, least, strides, strict=True))
        offsets.append((planes[key], where))
    return shape, buffers, offsets


def _plane(
    image: np.ndarray,
    remainder: tuple[int, ...],
    step: tuple[int, ...],
    least: list[int],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """Pixels step · (q + least) + remainder of an image, q from 0 on; zeros outside of it."""
    plane = np.zeros((*image.shape[:2], *shape), dtype)
    source, target = [slice(None), slice(None)], [slice(None), slice(None)]
    for axis, size in enumerate(shape):
        extent = image.shape[2 + axis]
        begin = step[axis] * least[axis] + remainder[axis]
        skip = max(0, -(begin // step[axis]))  # first q whose pixel lies in the image
        first = begin + step[axis] * skip
        count = max(0, min(size - skip, -(-(extent - first) // step[axis])))
        target.append(slice(skip, skip + count))
        source.append(slice(first, first + step[axis] * (count - 1) + 1 if count else first, step[axis]))
    plane[tuple(target)] = image[tuple(source)]
    return plane.reshape(image.shape[0], -1)


# Other operations


def clip_channels(values: np.ndarray, low: Sequence[int], high: Sequence[int]) -> np.ndarray:
    """clamp(values, low, high), (C,) each or empty for no limit; values (C, …)."""
    out = np.empty_like(values)
    for channel, piece in enumerate(values):
        if low:
            piece = np.maximum(piece, low[channel])
        out[channel] = np.minimum(piece, high[channel]) if high else piece
    return out


def max_pool(
    values: np.ndarray,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> np.ndarray:
    """Largest value of each window; values (C, N, …), pads begin of each axis, then end."""
    padded = pad_spatial(values, pads, int(np.iinfo(values.dtype).min))
    out: np.ndarray | None = None
    for window in _windows(padded, kernel, strides, dilations):
        out = window.copy() if out is None else np.maximum(out, window, out=out)
    assert out is not None
    return out


def sum_pool(
    values: np.ndarray, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int]
) -> np.ndarray:
    """Sum of each window, zeros outside; values (C, N, …) in a type that holds the sums."""
    padded = pad_spatial(values, pads, 0)
    out: np.ndarray | None = None
    for window in _windows(padded, kernel, strides, [1] * len(kernel)):
        out = window.copy() if out is None else np.add(out, window, out=out)
    assert out is not None
    return out


def _windows(
    values: np.ndarray, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Iterator[np.ndarray]:
    """For each place in the window the pixels that stand there, (C, N, output size)."""
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(values.shape[2:], kernel, strides, dilations, strict=True)
    ]
    if any(size < 1 for size in sizes):
        raise ValueError(f"an image of size {values.shape[2:]} is too small for a window of {tuple(kernel)}")
    for tap in product(*map(range, kernel)):
        slices = [
            slice(d * t, d * t + s * (n - 1) + 1, s)
            for d, t, s, n in zip(dilations, tap, strides, sizes, strict=True)
        ]
        yield values[(slice(None), slice(None), *slices)]


def pad_spatial(values: np.ndarray, pads: Sequence[int], constant: int | None) -> np.ndarray:
    """A constant, or (None) the nearest pixel, around (C, N, …); pads begin of each axis, then end; negative ones crop."""
    if not any(pads):
        return values
    n = values.ndim - 2
    crop = tuple(
        slice(max(0, -pads[axis]), values.shape[2 + axis] - max(0, -pads[n + axis])) for axis in range(n)
    )
    cropped = values[(slice(None), slice(None), *crop)]
    widths = [(0, 0), (0, 0), *((max(0, pads[axis]), max(0, pads[n + axis])) for axis in range(n))]
    if constant is None:
        return np.pad(cropped, widths, mode="edge")
    return np.pad(cropped, widths, constant_values=constant)


def interpolate(values: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Linear upsampling by powers of two, ``align_corners=False``, times 2 · factor for each axis whose factor is not 1.

    Output pixel p of each s lies (2p + 1 - s) / 2s input pixels beyond its own; at the border the last one goes on.

    Args:
        values: (C, N, …) in a type that holds the result.
        factors: one for each spatial axis.
    """
    for axis, factor in enumerate(factors, 2):
        if factor == 1:
            continue
        size = values.shape[axis]
        out = np.empty((*values.shape[:axis], size * factor, *values.shape[axis + 1 :]), values.dtype)
        lead = (slice(None),) * axis
        for phase in range(factor):
            beyond = 2 * phase + 1 - factor
            target = out[(*lead, slice(phase, None, factor))]
            np.multiply(values, 2 * factor - abs(beyond), target)
            inner, edge = (
                ((slice(1, None), slice(None, -1)), slice(0, 1))
                if beyond < 0
                else ((slice(None, -1), slice(1, None)), slice(size - 1, size))
            )
            own, other = inner
            target[(*lead, own)] += values[(*lead, other)] * abs(beyond)
            target[(*lead, edge)] += values[(*lead, edge)] * abs(beyond)
        values = out
    return values
