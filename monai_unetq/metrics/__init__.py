"""Measures of a segmentation against its label, and their summary over the cases of a test set."""

from __future__ import annotations

from .segmentation import METRICS, Summary, score, summarize

__all__ = ["METRICS", "Summary", "score", "summarize"]
