"""What is proven of every tensor of a program: its exponents and bounds, operation by operation, in Python's integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from ..formats import QFormat
from .kernels import float_parts
from .program import (
    Add,
    Clip,
    Concat,
    Convolve,
    Flatten,
    Grid,
    Interpolate,
    Leaky,
    MaxPool,
    Operation,
    Pad,
    Repeat,
    Round,
    Shift,
    Slice,
    SumPool,
)

__all__ = ["LIMIT", "Constants", "assemble", "infer", "multipliers", "settled_bias"]

LIMIT = 1 << 60
"""Bounds stay below: rounding adds up to twice as much before it shifts, in int64."""


@dataclass(frozen=True)
class Constants:
    """The integers of one layer.

    Attributes:
        weight: int64, (O, I of the group, …), output channels first, all parts on one grid for each output channel.
        bias: int64, (O,), on the same grid.
    """

    weight: np.ndarray
    bias: np.ndarray


def multipliers(codes: np.ndarray, number_format: QFormat) -> np.ndarray:
    """What codes stand for in units of the scale, int64: themselves, or for ``pow2-B`` the powers of two."""
    codes = codes.astype(np.int64)
    if number_format.kind != "pow2":
        return codes
    return np.sign(codes) * (np.int64(1) << (np.abs(codes) - 1).clip(0, None)) * (codes != 0)


def assemble(
    operation: Convolve,
    weights: Mapping[str, np.ndarray],
    bias: np.ndarray | None,
    exponents: Sequence[int],
) -> Constants:
    """A layer's integers, parts shifted to where they meet, and the bias rounded to its grid by its bits.

    Args:
        operation: which layer, and how its parts are shifted.
        weights: part → int64 (O, I of the group, …), output channels first.
        bias: float32, (O,); None for none.
        exponents: (O,), of the accumulators.

    Raises:
        ValueError: if something is missing, does not fit, or a bias does not stand on the accumulator's grid.
    """
    where = f"layer '{operation.layer}'"
    pieces = []
    for part in operation.parts:
        codes = weights.get(part.part)
        if codes is None:
            raise ValueError(f"{where}: there is no weight of part '{part.part}'")
        if codes.shape[0] != len(exponents):
            raise ValueError(f"{where}: {codes.shape[0]} output channels, expected {len(exponents)}")
        rows = np.abs(codes).reshape(codes.shape[0], -1).max(axis=1, initial=0)
        if any(silent not in range(codes.shape[0]) for silent in operation.silent):
            raise ValueError(f"{where}: 'silent' names a channel that it has not")
        codes = codes.copy()
        codes[list(operation.silent)] = 0
        rows[list(operation.silent)] = 0
        if any(int(row) << shift >= LIMIT for row, shift in zip(rows, part.shifts, strict=True)):
            raise ValueError(f"{where}: its parts do not meet on one grid with in 61 bits")
        shifts = np.array(part.shifts, dtype=np.int64).reshape(-1, *[1] * (codes.ndim - 1))
        pieces.append(codes << shifts)
    weight = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
    if operation.bias != (bias is not None):
        raise ValueError(
            f"{where}: {'no bias is there' if operation.bias else 'a bias is there'}, unexpectedly"
        )
    if bias is None:
        return Constants(weight, np.zeros(len(exponents), np.int64))
    if bias.dtype != np.float32 or bias.shape != (len(exponents),):
        raise ValueError(
            f"{where}: its bias is {bias.dtype} {bias.shape}, expected float32 ({len(exponents)},)"
        )
    return Constants(weight, _bias(bias, operation.bias_exponents, exponents, where))


def settled_bias(bias: np.ndarray, grid: Sequence[int]) -> list[tuple[int, int]]:
    """A bias as it runs, (integer, exponent) for each output channel, the exponent the least that there is.

    Args:
        bias: float32, (O,).
        grid: (O,), exponents of the grid that it is rounded to, half to even; empty where it stays as it is.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    mantissas, powers = float_parts(bias)
    settled = []
    for channel, (mantissa, power) in enumerate(zip(mantissas.tolist(), powers.tolist(), strict=True)):
        if power > 255:
            raise ValueError(f"the bias of output channel {channel} is infinite")
        if grid and -power > grid[channel]:
            mantissa, power = _half_to_even(mantissa, -power - grid[channel]), -grid[channel]
        zeros = (mantissa & -mantissa).bit_length() - 1 if mantissa else 0
        settled.append((mantissa >> zeros, -(power + zeros)) if mantissa else (0, 0))
    return settled


def _half_to_even(integer: int, shift: int) -> int:
    return (integer + (1 << (shift - 1)) - 1 + ((integer >> shift) & 1)) >> shift


def _bias(bias: np.ndarray, grid: Sequence[int], exponents: Sequence[int], where: str) -> np.ndarray:
    try:
        settled = settled_bias(bias, grid)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    found = []
    for channel, ((integer, own), exponent) in enumerate(zip(settled, exponents, strict=True)):
        if integer and own > exponent:
            raise ValueError(
                f"{where}: the bias of output channel {channel} is not on the accumulator's grid"
            )
        aligned = integer << (exponent - own) if integer else 0
        if abs(aligned) >= LIMIT:
            raise ValueError(
                f"{where}: the bias of output channel {channel} does not fit in 61 bits on the accumulator's grid"
            )
        found.append(aligned)
    return np.array(found, dtype=np.int64)


def infer(operation: Operation, inputs: Sequence[Grid], constants: Constants | None, channels: int) -> Grid:
    """Exponents and bounds of an operation's output.

    Args:
        operation: which one.
        inputs: what is known of its inputs, none for the image.
        constants: of a ``Convolve``.
        channels: of the image.

    Returns:
        the grid; for a ``Convolve`` its exponents are those of the input (the program says the output's).

    Raises:
        ValueError: if inputs do not fit together, or a bound does not fit in 61 bits.
    """
    grid = _infer(operation, inputs, constants, channels)
    if grid.bound >= LIMIT:
        raise ValueError(f"'{operation.output}' may reach {grid.bound}, which does not fit in 61 bits")
    return grid


def _infer(operation: Operation, inputs: Sequence[Grid], constants: Constants | None, channels: int) -> Grid:
    if isinstance(operation, Round):
        count = inputs[0].channels if inputs else channels
        bound = max(abs(operation.low), abs(operation.high))
        return Grid((operation.exponent,) * count, (bound,) * count)
    first = inputs[0]
    exponents, bounds = first.exponents, first.bounds
    if isinstance(operation, Convolve):
        assert constants is not None
        return _infer_convolution(operation, first, constants)
    if isinstance(operation, Shift):
        _check_channels(operation, first, operation.by)
        return _shifted(first, operation.by)
    if isinstance(operation, Clip):
        _check_channels(operation, first, operation.low or bounds, operation.high or bounds)
        lows, highs = operation.low or [None] * len(bounds), operation.high or [None] * len(bounds)
        clipped = (_clipped(b, low, high) for b, low, high in zip(bounds, lows, highs, strict=True))
        return Grid(exponents, tuple(clipped))
    if isinstance(operation, Leaky):
        _check_channels(operation, first, operation.positive, operation.negative)
        sides = [tuple(max(p, n) for p, n in zip(operation.positive, operation.negative, strict=True))]
        # A value of 1 stays 1 on a grid that is finer by the positive side's shift.
        raised = tuple(b << s for b, s in zip(bounds, sides[0], strict=True))
        return Grid(tuple(e + p for e, p in zip(exponents, operation.positive, strict=True)), raised)
    if isinstance(operation, SumPool):
        window = prod(operation.kernel)
        if window & (window - 1):
            raise ValueError(f"'{operation.output}': a window of {window}, expected a power of two")
        more = window.bit_length() - 1
        return Grid(tuple(e + more for e in exponents), tuple(b * window for b in bounds))
    if isinstance(operation, Interpolate):
        gain = prod(2 * f for f in operation.factors if f > 1)
        more = gain.bit_length() - 1
        return Grid(tuple(e + more for e in exponents), tuple(b * gain for b in bounds))
    if isinstance(operation, Add):
        _check_channels(operation, first, operation.left, operation.right)
        _check_channels(operation, inputs[1], operation.left)
        left, right = _shifted(first, operation.left), _shifted(inputs[1], operation.right)
        if left.exponents != right.exponents:
            raise ValueError(f"'{operation.output}': its two inputs do not meet on one grid")
        return Grid(left.exponents, tuple(a + b for a, b in zip(left.bounds, right.bounds, strict=True)))
    if isinstance(operation, Concat):
        return Grid(
            tuple(e for one in inputs for e in one.exponents), tuple(b for one in inputs for b in one.bounds)
        )
    if isinstance(operation, Slice) and operation.axis == 0:
        chosen = slice(operation.start, operation.stop or None)
        if not exponents[chosen]:
            raise ValueError(f"'{operation.output}': no channel is left of {first.channels}")
        return Grid(exponents[chosen], bounds[chosen])
    if isinstance(operation, Flatten):
        size = operation.size
        if size < 1:
            raise ValueError(f"'{operation.output}': 'size' is {size}, expected 1 or more")
        return Grid(
            tuple(e for e in exponents for _ in range(size)), tuple(b for b in bounds for _ in range(size))
        )
    assert isinstance(operation, (MaxPool, Repeat, Pad, Slice))
    return first


def _infer_convolution(operation: Convolve, image: Grid, constants: Constants) -> Grid:
    weight, bias = constants.weight, constants.bias
    outputs, inputs = weight.shape[:2]
    groups, kernel = operation.groups, weight.shape[2:]
    where = f"layer '{operation.layer}'"
    if image.channels != inputs * groups or outputs % groups:
        raise ValueError(
            f"{where}: {image.channels} channels in, {outputs} out, its weight takes {inputs} in each of {groups} groups"
        )
    if len(kernel) != len(operation.strides):
        raise ValueError(f"{where}: a kernel of {kernel}, strides {list(operation.strides)}")
    # The taps that meet in one output pixel: all, or where transposed those of one phase.
    if operation.transposed:
        classes = [
            [[t for t in range(k) if d * t % s == r] for r in range(s)]
            for k, d, s in zip(kernel, operation.dilations, operation.strides, strict=True)
        ]
    else:
        classes = [[list(range(k))] for k in kernel]
    worst = [0] * outputs
    magnitudes = np.abs(weight)
    for taps in product(*classes):
        if not all(taps):
            continue
        chosen = magnitudes[np.ix_(range(outputs), range(inputs), *taps)].reshape(outputs, inputs, -1)
        for output, size in enumerate(_reach(chosen, image.bounds, groups)):
            worst[output] = max(worst[output], size)
    bounds = tuple(size + abs(int(b)) for size, b in zip(worst, bias, strict=True))
    return Grid((0,) * outputs, bounds)


def _reach(magnitudes: np.ndarray, bounds: Sequence[int], groups: int) -> list[int]:
    """Σ |weight| · bound for each output channel, exactly."""
    outputs, inputs, taps = magnitudes.shape
    top = int(magnitudes.max(initial=0)) * max(taps, 1)
    kind: type = np.int64 if top * max(bounds) * inputs < LIMIT else object
    sums = magnitudes.sum(axis=2) if top < LIMIT else magnitudes.astype(object).sum(axis=2)
    grouped = sums.astype(kind).reshape(groups, outputs // groups, inputs)
    reach: np.ndarray = np.array(bounds, dtype=kind).reshape(groups, 1, inputs)
    return [int(value) for value in (grouped * reach).sum(axis=2).reshape(-1)]


def _shifted(grid: Grid, by: Sequence[int]) -> Grid:
    if min(by) < 0 or max(by) > 62:
        raise ValueError(f"a shift of {min(by)} to {max(by)}, expected 0 to 62")
    exponents = tuple(e + s for e, s in zip(grid.exponents, by, strict=True))
    return Grid(exponents, tuple(b << s for b, s in zip(grid.bounds, by, strict=True)))


def _clipped(bound: int, low: int | None, high: int | None) -> int:
    ends = [-bound, bound]
    if low is not None:
        ends = [max(end, low) for end in ends]
    if high is not None:
        ends = [min(end, high) for end in ends]
    return max(abs(end) for end in ends)


def _check_channels(operation: Operation, grid: Grid, *values: Sequence[int]) -> None:
    for entry in values:
        if len(entry) != grid.channels:
            raise ValueError(
                f"'{operation.output}' is for {len(entry)} channels, its input has {grid.channels}"
            )
    if isinstance(operation, Leaky) and not all(0 <= v <= 62 for entry in values for v in entry):
        raise ValueError(f"'{operation.output}': shifts {values}, expected 0 to 62")
