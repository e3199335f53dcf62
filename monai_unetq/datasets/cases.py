"""What a case is (image, label, name) and how cases are split in train, validation and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Case", "Split", "block_split"]


@dataclass(frozen=True, eq=False)
class Case:
    """One image with its label. Cases compare by identity.

    Attributes:
        name: unique within a data set, e.g. ``"07"``.
        image: float32, shape (1, H, W) or (1, D, H, W); values in [0, 1], CT in HU.
        label: uint8, of the same shape, 1 = foreground (EM: cell interior), 0 = background (membrane).
        spacing: mm per axis, in the order of the array's spatial axes; empty where it is unknown.
        group: the person, patient or block that the case belongs to; empty where it is unknown.
    """

    name: str
    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8]
    spacing: tuple[float, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Split:
    """Names of the cases to train on, to choose settings on, and to report on.

    Attributes:
        train: names of the training cases.
        validation: names of the cases on which checkpoints and settings are chosen.
        test: names of the cases that are only measured.

    Raises:
        ValueError: a part is empty, or a name stands twice, in two parts or in one.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        for part, names in parts.items():
            if not names:
                raise ValueError(f"the {part} part of the split is empty; give it at least one case")
        counts = Counter(name for names in parts.values() for name in names)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            where = "; ".join(
                f"{name!r} in {', '.join(part for part, names in parts.items() if name in names)}"
                for name in repeated
            )
            raise ValueError(
                f"the split names a case more than once ({where}); each case belongs to exactly one of "
                "train, validation and test"
            )


def block_split(names: Sequence[str]) -> Split:
    """Split names into three consecutive blocks, since neighbouring slices of one stack are correlated.

    The first two thirds (rounded down) are for training, the next eighth (rounded to the nearest, at least
    one) for validation and the rest for test: 24 names give 16, 3 and 5; 30 give 20, 4 and 6; 3 give 1, 1, 1.

    Args:
        names: unique names in the order of the stack.

    Returns:
        the split; its parts in order make up ``names``.

    Raises:
        ValueError: fewer than three names, or a name that stands twice.
    """
    count = len(names)
    if count < 3:
        raise ValueError(
            f"found {count} case(s) {list(names)}, expected at least 3: one each for train, validation and "
            "test. Add cases"
        )
    train = min(2 * count // 3, count - 2)
    validation = train + max(1, (count + 4) // 8)
    return Split(tuple(names[:train]), tuple(names[train:validation]), tuple(names[validation:]))
