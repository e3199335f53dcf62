"""How the scale of a tensor is found from its values: min-max, percentile, least squared error, or a paper's formula."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..formats import QFormat
from .low_bit import ternary_codes

__all__ = ["RangeMethod", "RangeObserver", "find_scale", "round_to_power_of_two", "weight_scale"]

RangeMethod = Literal["minmax", "percentile", "mse"]

PERCENTILE = 99.9
"""Share of the values, in percent, that ``percentile`` keeps inside the range."""

_SHRINKS = torch.linspace(1.0, 0.02, 99)
_SMALLEST = 2.0**-40


def round_to_power_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two in the logarithm, exact."""
    return torch.ldexp(torch.ones_like(scale), torch.log2(scale).round())


def find_scale(rows: Tensor, number_format: QFormat, method: RangeMethod, power_of_two: bool) -> Tensor:
    """Scales for the rows of a matrix, one a row.

    Args:
        rows: (channels, values), float32; every row gets its own scale.
        number_format: one that leaves its scale open. For ``binary`` the scale is the mean magnitude, which has the
            least squared error (XNOR-Net, Rastegari et al., ECCV 2016, equation 6), for ``pow2-B`` that of
            ``weight_scale``, both whatever the method.
        method: ``"minmax"`` puts the largest magnitude on the last code, ``"percentile"`` the 99.9th
            percentile, ``"mse"`` searches the range with the least squared error.
        power_of_two: scales are powers of two. Min-max and percentile then round upward (no value is cut),
            ``"mse"`` compares the powers themselves.

    A row without a value to go by (all zero; all negative, for an unsigned format) gets the largest scale of
    the others, or 1: training may fill it.

    Returns:
        (channels,), float32, positive.

    Raises:
        ValueError: for an unknown method, or a row that holds NaN or infinity.
    """
    if method not in get_args(RangeMethod):
        raise ValueError(f"range method {method!r} is unknown, expected one of {get_args(RangeMethod)}")
    _check_finite(rows)
    rows = rows.detach().float()
    if number_format.kind == "pow2":
        return weight_scale(rows, number_format, power_of_two)
    if number_format.kind == "binary":
        mean = rows.abs().mean(dim=1)
        mean = _filled(mean, mean < _SMALLEST)
        return round_to_power_of_two(mean) if power_of_two else mean
    qmin, qmax = number_format.qmin, number_format.qmax
    if not qmin:
        rows = rows.clamp(min=0)  # negative values become 0 at any scale
    # What the scale must be so that each value still fits: positive values on qmax, negative ones on qmin.
    needed = torch.where(rows >= 0, rows / qmax, rows / min(qmin, -1))
    largest = needed.amax(dim=1)
    if method == "percentile":
        keep = min(needed.shape[1] - 1, int(needed.shape[1] * PERCENTILE / 100))
        kept = needed.sort(dim=1).values[:, keep]
        largest = torch.where(kept < _SMALLEST, largest, kept)  # nearly all zero: the others decide
    largest = _filled(largest, largest < _SMALLEST)
    if method != "mse":
        return torch.ldexp(torch.ones_like(largest), torch.log2(largest).ceil()) if power_of_two else largest
    if power_of_two:
        top = torch.log2(largest).ceil()
        candidates = [torch.ldexp(torch.ones_like(largest), top - k) for k in range(8)]
    else:
        candidates = [largest * float(shrink) for shrink in _SHRINKS]
    best, least = candidates[0], torch.full_like(largest, float("inf"))
    # One for all candidates: with large weights, fresh memory would take most of the time.
    rounded = torch.empty_like(rows)
    for candidate in candidates:
        column = candidate[:, None]
        torch.div(rows, column, out=rounded).round_().clamp_(qmin, qmax)
        error = rounded.mul_(column).sub_(rows).square_().mean(dim=1)
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best


def weight_scale(rows: Tensor, number_format: QFormat, power_of_two: bool) -> Tensor:
    """Scales for the rows of a weight in one of the formats whose papers give a formula for them, one a row.

    - ``binary``: mean|w| (XNOR-Net, Rastegari et al., ECCV 2016, equation 6). A row of zeros gets 2^-40: nothing that
      it could be rounded to is nearer to it.
    - ``ternary``: the mean of |w| over |w| > 0.7·mean|w| (Ternary Weight Networks, Li et al., 2016, equations 5, 6).
    - ``pow2-B``: 2^n2 with n2 = n1 + 1 - 2^(B-2), n1 = ⌊log2(4s/3)⌋, s = max|w| (Incremental Network Quantization,
      Zhou et al., ICLR 2017, equations 2 and 3): always a power of two.

    In the last two a row of zeros gets the largest scale of the others, or 1.

    Args:
        rows: (channels, values), floating point; every row gets its own scale.
        number_format: ``binary``, ``ternary`` or a ``pow2-B``.
        power_of_two: the scale is rounded to the power of two that is nearest in the logarithm.

    Returns:
        (channels,), of the rows' type, positive; NaN where a row holds NaN.
    """
    magnitude = rows.detach().abs()
    if number_format.kind == "binary":
        scale = magnitude.mean(dim=1)
        scale = torch.where(scale == 0, torch.full_like(scale, _SMALLEST), scale)
    elif number_format.kind == "ternary":
        codes = ternary_codes(magnitude, axis=0)
        count = codes.sum(dim=1)
        scale = (magnitude * codes).sum(dim=1) / count
        scale = _filled(scale, count == 0)
    else:
        # s = m·2^e with m in [½, 1): 4s/3 ≥ 2^e where m ≥ ¾, so that n1 is e there, else e - 1; exact.
        largest = magnitude.amax(dim=1)
        mantissa, exponent = torch.frexp(largest)
        lowest = exponent + (mantissa >= 0.75).to(exponent.dtype) - number_format.qmax
        scale = torch.ldexp(torch.ones_like(largest), lowest)
        return _filled(torch.where(largest.isfinite(), scale, largest), largest < _SMALLEST)
    return round_to_power_of_two(scale) if power_of_two else scale


def _filled(scale: Tensor, empty: Tensor) -> Tensor:
    """The scales, where a row is empty the largest of the others, or 1 if there is none."""
    top = torch.where(empty, torch.zeros_like(scale), scale).amax()
    return torch.where(empty, torch.where(top > 0, top, torch.ones_like(top)), scale)


def _check_finite(rows: Tensor) -> None:
    if not torch.isfinite(rows).all():
        raise ValueError("cannot find a scale: the tensor holds NaN or infinity")


class RangeObserver:
    """Collects an activation's values over calibration batches, in bounded memory, deterministically.

    Keeps every batch's extremes and a sample of it, drawn from a fixed seed (values at a fixed distance could
    all come from one column of the image). Beyond 2^20 values in all, every second one is dropped, and later
    batches are sampled as much more thinly.
    """

    PER_BATCH = 1 << 15
    IN_ALL = 1 << 20

    def __init__(self) -> None:
        self._samples: list[Tensor] = []
        self._thinned = 1

    def update(self, tensor: Tensor) -> None:
        """Take note of one batch's tensor, of any shape."""
        values = tensor.detach().reshape(-1).float()
        if not values.numel():
            return
        extremes = torch.stack([values.min(), values.max()])
        count = max(1, self.PER_BATCH // self._thinned)
        if values.numel() > count:
            generator = torch.Generator().manual_seed(len(self._samples))
            values = values[torch.randint(values.numel(), (count,), generator=generator).to(values.device)]
        self._samples.append(torch.cat([values, extremes]).cpu())
        if sum(s.numel() for s in self._samples) > self.IN_ALL:
            self._samples = [torch.cat([s[:-2:2], s[-2:]]) for s in self._samples]
            self._thinned *= 2

    def values(self) -> Tensor:
        """The sample of the values seen, (n,), float32.

        Raises:
            ValueError: if no values were seen.
        """
        if not self._samples:
            raise ValueError("no values seen: calibrate with at least one batch that reaches this layer")
        return torch.cat(self._samples)

    def scale(self, number_format: QFormat, method: RangeMethod, power_of_two: bool) -> Tensor:
        """The 0-dim scale that the values seen call for; see ``find_scale``.

        Raises:
            ValueError: if no values were seen.
        """
        return find_scale(self.values()[None], number_format, method, power_of_two)[0]
