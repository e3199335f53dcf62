"""Which networks the comparison trains: the 2019 paper's rows, ours beside them, and the two studies' variants.

A row is a set of keys of the bundles' ``fixed_point.yaml``; nothing here trains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..datasets import KindName
from .paper import FULL_PRECISION

__all__ = ["ACTIVATIONS", "STUDIES", "Kind", "Row", "StudyName", "paper_rows", "study_rows"]

Kind = KindName
StudyName = Literal["dropout", "float-layers"]
STUDIES: tuple[StudyName, ...] = get_args(StudyName)

ACTIVATIONS: Mapping[Kind, tuple[str, ...]] = {
    "em": ("relu", "tanh"),
    "gm": ("relu", "tanh"),
    "nih": ("relu",),
}
"""The paper's columns: activation functions for each data set."""

_FLOAT = {"weights": "float", "activations": "float", "input": "float", "first": "float", "last": "float"}
_LEARNED = {"scale": "free", "learned": True}
# XNOR-Net leaves the last layer in float, and the 2019 paper finds that it matters.
_LAST = {**_LEARNED, "last": "float"}


@dataclass(frozen=True)
class Row:
    """One network of a comparison.

    Attributes:
        name: of the row, activations/weights as the paper writes them.
        activation: the network's activation function, the column.
        formats: keys of ``fixed_point.yaml`` and their values.
        dropout: share of the values dropped in the quantized part of the training.
        length: of the quantized part, in ``Settings.epochs``. With ReLU the rows of few bits take twice as long, and
            with them int6/int4 learned and full precision, which all others are compared with.
        learning_rate: at the beginning of that part; the bundles' own, and less where the formats are so close to float
            that the float network only has to be fitted to them.
        study: the study that the row belongs to; None for the comparison itself.
    """

    name: str
    activation: str
    formats: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    length: int = 1
    learning_rate: float = 1e-3
    study: StudyName | None = None

    @property
    def slug(self) -> str:
        """The name of the row's folder."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.name} {self.activation}").strip("-")
        return name if self.study is None else f"{self.study}-{name}"


def _formats(activations: str, weights: str, **others: Any) -> dict[str, Any]:
    return {"activations": activations, "weights": weights, **others}


_COMPARED: Mapping[str, Mapping[str, Any]] = {
    FULL_PRECISION: _FLOAT,
    "Q8.8/Q8.8": _formats("Q8.8", "Q8.8"),
    "Q8.0/Q0.8": _formats("Q8.0", "Q0.8"),
    "Q6.0/Q0.4": _formats("Q6.0", "Q0.4"),
    "Q4.0/Q0.2": _formats("Q4.0", "Q0.2"),
    "BNN": _formats("binary", "binary", **_LAST),
    "TernaryNet": _formats("ternary", "ternary", **_LAST),
    "int8/pow2-4": _formats("int8", "pow2-4"),
    "int6/int4 learned": _formats("int6", "int4", **_LEARNED),
    "int4/int4 learned": _formats("int4", "int4", **_LEARNED),
    "int2/int2 learned": _formats("int2", "int2", **_LEARNED),
    "int4/ternary learned": _formats("int4", "ternary", **_LEARNED),
    "int4/binary learned": _formats("int4", "binary", **_LEARNED),
}


_CLOSE_TO_FLOAT = {
    FULL_PRECISION,
    "Q8.8/Q8.8",
    "Q8.0/Q0.8",
    "Q6.0/Q0.4",
    "int6/int4 learned",
    "int4/int4 learned",
}

_LONGER = {
    FULL_PRECISION,
    "Q4.0/Q0.2",
    "BNN",
    "TernaryNet",
    "int6/int4 learned",
    "int2/int2 learned",
    "int4/ternary learned",
    "int4/binary learned",
}


def paper_rows(kind: Kind) -> tuple[Row, ...]:
    """The rows of one data set's comparison: all of one activation function, then all of the next."""
    return tuple(
        Row(name, activation, formats, 0.0, _length(name, activation), _learning_rate(name))
        for activation in ACTIVATIONS[kind]
        for name, formats in _COMPARED.items()
    )


def _length(name: str, activation: str) -> int:
    return 2 if name in _LONGER and activation == "relu" else 1


def _learning_rate(name: str) -> float:
    return 3e-4 if name in _CLOSE_TO_FLOAT else 1e-3


def study_rows(study: StudyName) -> tuple[Row, ...]:
    """The rows of a study of the paper's training findings (section 4.3), ReLU networks.

    ``dropout`` trains the float and the quantized network with and without dropout. ``float-layers`` keeps the first
    layer, the last one, both or none of them in float while all others are quantized.
    """
    rows: list[Row] = []
    if study == "dropout":
        for name in (FULL_PRECISION, "Q6.0/Q0.4", "Q4.0/Q0.2"):
            for share in (0.0, 0.2):
                title = f"{name}, dropout {share}"
                rate = _learning_rate(name)
                rows.append(Row(title, "relu", _COMPARED[name], share, 1, rate, study))
        return tuple(rows)
    for name, weights in (("Q6.0/Q0.4", "Q0.4"), ("int4/ternary learned", "ternary")):
        for first, last in ((weights, weights), ("float", weights), (weights, "float"), ("float", "float")):
            kept = [part for part, chosen in (("first", first), ("last", last)) if chosen == "float"]
            title = f"{name}, float: {' and '.join(kept) or 'none'}"
            formats = {**_COMPARED[name], "first": first, "last": last}
            rows.append(Row(title, "relu", formats, 0.0, 1, _learning_rate(name), study))
    return tuple(rows)
