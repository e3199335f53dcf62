"""The median of paired ratios, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["median_interval"]

RESAMPLES = 2000


def median_interval(ratios: Sequence[float] | NDArray[np.floating]) -> tuple[float, float, float]:
    """The median and the ends of its 95 % interval by the bootstrap (percentiles of 2000 resamples, always the same ones)."""
    found = np.asarray(ratios, dtype=np.float64)
    drawn = np.random.default_rng(0).choice(found, (RESAMPLES, len(found)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(found)), float(low), float(high)
