"""What a downloaded data set holds before it is prepared: its cases, how each is read, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813

__all__ = ["Pair", "Pixels", "Source", "Survey", "listing", "refuse"]

Pixels: TypeAlias = "npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | sitk.Image"
"""An image or label as it is written: (H, W) for PNG, a SimpleITK image with its geometry for NIfTI."""
Pair: TypeAlias = tuple[Pixels, Pixels]
"""Image and label of one case."""

PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Source:
    """One case before it is prepared.

    Attributes:
        name: the case's name in the prepared data set.
        read: reads and checks image and label; raises ValueError or OSError that names the file.
        files: what it is read from; the case is prepared again when one of them changes.
        made: how it is taken from its files (a page of a stack, the arguments of a phantom).
        group: the person or patient; empty for slices of one stack.
        site: where it was recorded; empty where that is unknown.
    """

    name: str
    read: Callable[[], Pair]
    files: tuple[Path, ...] = ()
    made: str = ""
    group: str = ""
    site: str = ""


@dataclass(frozen=True)
class Survey:
    """What a source folder holds.

    Attributes:
        cases: in their order (that of the stack for slices).
        problems: what is wrong with the folder, each with the file's name; more may appear when cases are
            read.
        ending: of the prepared files, ``".png"`` or ``".nii.gz"``.
        description: a sentence for dataset.json.
        reference: what to cite.
        licence: of the data.
    """

    cases: tuple[Source, ...]
    problems: tuple[str, ...] = ()
    ending: str = ".nii.gz"
    description: str = ""
    reference: str = ""
    licence: str = ""


def refuse(source: object, problems: Iterable[str]) -> None:
    """Raise one error for all problems of a source; nothing if there are none.

    Args:
        source: what they were found in.
        problems: one text each.

    Raises:
        ValueError: there is a problem; up to ten are shown.
    """
    listed = list(problems)
    if not listed:
        return
    more = f"\n  … and {len(listed) - PROBLEMS_SHOWN} more" if len(listed) > PROBLEMS_SHOWN else ""
    lines = "".join(f"\n  - {problem}" for problem in listed[:PROBLEMS_SHOWN])
    raise ValueError(f"{source}: {len(listed)} problem(s), nothing was prepared{lines}{more}")


def listing(names: Iterable[object], most: int = 8) -> str:
    """The first names with commas between, and how many there are if there are more."""
    listed = [str(name) for name in names]
    shown = ", ".join(listed[:most]) or "nothing"
    return shown if len(listed) <= most else f"{shown}, … ({len(listed)} in all)"
