"""Data to train and measure networks on: cases, their split, EM slices from files, a membrane phantom."""

from __future__ import annotations

from .cases import Case, Split, block_split
from .em import read_em
from .phantom import membrane_phantom

__all__ = ["Case", "Split", "block_split", "membrane_phantom", "read_em"]
