"""Measures of a segmentation against its label, their summary over the cases of a test set, and spectral measures of
images and features."""

from __future__ import annotations

from .segmentation import METRICS, Summary, score, summarize
from .spectral import band_power, band_ratio, band_share, edge_strength

__all__ = [
    "METRICS",
    "Summary",
    "band_power",
    "band_ratio",
    "band_share",
    "edge_strength",
    "score",
    "summarize",
]
