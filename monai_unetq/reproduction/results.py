"""What a comparison leaves beside its rows: one JSON document, its tables as Markdown, the paper's kind of figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import data_list, foreground, prepare
from ..files import write_json
from .rows import ACTIVATIONS, Kind, paper_rows
from .run import Comparison, alone, prediction_file, read_mask, read_pixels
from .tables import accuracy_rows, markdown, studies_markdown

__all__ = ["prepared", "write_results"]

_SHOWN: Mapping[Kind, str] = {"em": "membrane", "gm": "grey matter", "nih": "pancreas"}
"""What figures show: of EM the membranes, the thin class, which are the background of its labels."""

_WINDOW: Mapping[Kind, tuple[float, float] | None] = {"em": None, "gm": None, "nih": (0.0, 255.0)}
"""Grey values from black to white; None for the image's own."""


def prepared(kind: Kind, data: Path, out: Path) -> Path:
    """The prepared data set of a folder, prepared below ``out`` where the folder is a download.

    Args:
        kind: the data set.
        data: a folder with ``dataset.json``, or whatever ``datasets.prepare`` takes.
        out: the study's folder.

    Raises:
        FileNotFoundError: if the folder is missing or holds no such data.
        ValueError: if the data is bad; see ``prepare``.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"{data}: no such folder; give a downloaded data set, or one of 'unetq data'")
    if (data / "dataset.json").is_file():
        labels = json.loads((data / "dataset.json").read_text(encoding="utf-8")).get("labels", {})
        if foreground(kind) not in labels:
            raise ValueError(
                f"{data / 'dataset.json'}: 'labels' are {', '.join(labels)}, expected '{foreground(kind)}': "
                f"this is not a data set for 'unetq reproduce {kind}'"
            )
        return data.resolve()
    with alone(out / "data" / kind):
        return prepare(kind, data, out / "data").resolve()


def write_results(comparison: Comparison, figures: bool = True) -> str:
    """Write ``results.json``, ``results.md`` and the figures from all rows that there are, of whichever part.

    Args:
        comparison: what was run.
        figures: draw them too; without, those that there are are kept.

    Returns:
        the tables.
    """
    folder = comparison.folder
    with alone(folder):  # parts that end at the same time write one after the other
        document = comparison.document()
        text = markdown(document)
        if document["studies"]:
            text += "\n" + studies_markdown(document)
        write_json(folder / "results.json", document)
        if figures:
            _draw(comparison, document)
        for figure in sorted(folder.glob("*.png")):
            text += f"\n![{figure.stem}]({figure.name})\n"
        scratch = folder / "results.md.part"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(folder / "results.md")
    return text


def _draw(comparison: Comparison, document: Mapping[str, Any]) -> None:
    from ..report import accuracy_figure

    for activation in ACTIVATIONS[comparison.kind]:
        shown = _shown(comparison, activation)
        if shown is not None:
            figure = comparison.folder / f"comparison-{activation}.png"
            shown.draw(figure, _SHOWN[comparison.kind], _WINDOW[comparison.kind])
    rows = accuracy_rows(document)
    if any(row["changes"] for row in rows):
        accuracy_figure(rows, comparison.folder / "accuracy.png")


@dataclass(frozen=True)
class _Shown:
    """One plane of a test case, (H, W) each: image, truth, and what each row made of it."""

    case: str
    image: np.ndarray
    truth: np.ndarray
    predictions: Mapping[str, np.ndarray]

    def draw(self, path: Path, positive: str, window: tuple[float, float] | None) -> None:
        from ..report import comparison_figure

        comparison_figure(self.image, self.truth, self.predictions, path, positive=positive, window=window)


def _shown(comparison: Comparison, activation: str) -> _Shown | None:
    """The first test case, or its slice with the most foreground, and what each row of a column made of it."""
    rows = [row for row in paper_rows(comparison.kind) if row.activation == activation]
    done = [
        row for row in rows if (found := comparison.result(row)) is not None and found["status"] == "done"
    ]
    if not done:
        return None
    fold = comparison.folds[0]
    case = data_list(comparison.dataset, fold, "test")[0]
    label = read_mask(Path(case["label"]))
    image = read_pixels(Path(case["image"]))
    number = None
    if label.ndim == 3:
        number = int(label.sum(axis=(1, 2)).argmax())
    name = case["case"] if number is None or label.shape[0] == 1 else f"{case['case']}, slice {number}"
    predictions = {}
    for row in done:
        written = comparison.row_folder(row, fold) / "predictions"
        predictions[row.name] = _plane(read_mask(prediction_file(written, case)), number)
    truth = _plane(label, number)
    if comparison.kind == "em":
        truth, predictions = ~truth, {row: ~found for row, found in predictions.items()}
    return _Shown(name, _plane(image, number), truth, predictions)


def _plane(array: np.ndarray, number: int | None) -> np.ndarray:
    return array if number is None else array[number]
