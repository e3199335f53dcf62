"""Parts of a layer's input channels: how the halves of a split convolution are called and told apart.

Imports no torch: plans and packed files name parts too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "WHOLE",
    "Part",
    "PartKind",
    "check_part_names",
    "decode",
    "encode",
    "kind_of",
    "number_of",
    "parts_of",
    "state_key",
]

WHOLE = "input"
"""Name of a layer's only part; split convolutions name theirs ``skip``, ``skip.1``, …, ``up``."""

PartKind = Literal["skip", "up"]

_NAME = re.compile(r"(skip|up)(\.[1-9][0-9]*)?")


@dataclass(frozen=True)
class Part:
    """Consecutive input channels of a split convolution.

    Attributes:
        name: ``skip``, ``skip.1``, … for what came over a skip connection, ``up``, ``up.1``, … for what came from below.
        channels: how many.
        source: the layer that made them; empty where it is the network's input, or unknown.
    """

    name: str
    channels: int
    source: str = ""


def parts_of(found: Sequence[tuple[PartKind, int, str]]) -> tuple[Part, ...]:
    """Name the parts of a concatenation: the first of a kind is ``skip`` or ``up``, the next ones are numbered.

    Args:
        found: kind, channels and source of each part, in the order of the channels.
    """
    seen: Counter[str] = Counter()
    parts = []
    for kind, channels, source in found:
        number = seen[kind]
        parts.append(Part(f"{kind}.{number}" if number else kind, channels, source))
        seen[kind] += 1
    return tuple(parts)


def kind_of(name: str) -> PartKind:
    """``skip`` or ``up``, by a part's name."""
    return "skip" if name.startswith("skip") else "up"


def check_part_names(names: Iterable[str], where: str) -> None:
    """Raise a ValueError unless the names are those of a split convolution's parts, or the one of a whole layer."""
    names = list(names)
    if names == [WHOLE]:
        return
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{where}: there is no part {name!r}; expected skip, skip.1, …, up, up.1, …, "
                f"or '{WHOLE}' alone for a layer that is not split"
            )
    if len(names) < 2:
        raise ValueError(f"{where}: one part, {names}, expected at least two")
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: a part is named twice in {names}")
    for kind in get_args(PartKind):
        found = sorted(number_of(name) for name in names if kind_of(name) == kind)
        if found != list(range(len(found))):
            raise ValueError(f"{where}: {names} are not numbered {kind}, {kind}.1, {kind}.2, …")


def number_of(name: str) -> int:
    """Which of its kind a part is: 0 for ``skip``, 2 for ``skip.2``."""
    return int(name.partition(".")[2] or 0)


def encode(parts: Iterable[Part]) -> list[list[int]]:
    """Parts as numbers, in order: kind (0 for skip, 1 for up), which of its kind, channels."""
    kinds = get_args(PartKind)
    return [[kinds.index(kind_of(p.name)), number_of(p.name), p.channels] for p in parts]


def decode(rows: Iterable[Sequence[int]]) -> tuple[Part, ...]:
    """The parts of ``encode``; their sources are not known.

    Raises:
        ValueError: for numbers that are none of it.
    """
    kinds, parts = get_args(PartKind), []
    for kind, number, channels in rows:
        if kind not in range(len(kinds)) or number < 0 or channels < 1:
            raise ValueError(f"{[kind, number, channels]} is no part, expected kind 0 or 1, number, channels")
        parts.append(Part(f"{kinds[kind]}.{number}" if number else kinds[kind], channels))
    check_part_names([part.name for part in parts], "parts")
    return tuple(parts)


def state_key(name: str) -> str:
    """The part's name as a module's name, which takes no dot: ``skip.1`` → ``skip_1``."""
    return name.replace(".", "_")
