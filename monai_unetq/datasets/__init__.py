"""Data to train and measure networks on: cases and their splits, data sets prepared from downloads in the layout
of nnU-Net, phantoms."""

from __future__ import annotations

from .cases import Case, Split, block_split
from .em import read_em
from .layout import data_list, folds, image_list
from .phantoms import abdomen_phantom, cord_phantom, membrane_phantom
from .prepare import KindName, foreground, prepare, write_phantom

__all__ = [
    "Case",
    "KindName",
    "Split",
    "abdomen_phantom",
    "block_split",
    "cord_phantom",
    "data_list",
    "folds",
    "foreground",
    "image_list",
    "membrane_phantom",
    "prepare",
    "read_em",
    "write_phantom",
]
