"""How a comparison reads as Markdown: our Dice beside the paper's, sizes, and what became of every row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..metrics import summarize
from ..report.tables import Table, format_bytes, markdown_lines, require
from .paper import FULL_PRECISION, paper_change, paper_row
from .rows import ACTIVATIONS, Kind, StudyName, paper_rows, study_rows
from .run import EXAMPLE_SIZE

__all__ = ["accuracy_rows", "markdown", "paired_change", "studies_markdown"]

_EMPTY = "–"
_MISSING = "not run yet"
_SHORT = 40  # characters of a failed row's error that fit into a cell
_TITLES: Mapping[Kind, str] = {
    "em": "Cells in electron microscopy (EM)",
    "gm": "Grey matter of the spinal cord (GM)",
    "nih": "Pancreas in CT (NIH)",
}
_DICE: Mapping[Kind, str] = {"em": "cell Dice", "gm": "grey matter Dice", "nih": "pancreas Dice"}
_UNITS: Mapping[Kind, str] = {"em": "slice", "gm": "person", "nih": "patient"}
_ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}
_STUDIES: Mapping[StudyName, tuple[str, str]] = {
    "dropout": ("Dropout", "The paper: dropout together with quantization costs accuracy."),
    "float-layers": (
        "Which layers stay float",
        "The paper: keeping the last layer in float matters more than keeping the first.",
    ),
}


def markdown(document: Mapping[str, Any]) -> str:
    """Write one data set's comparison: Dice beside the paper's, for EM the membranes, sizes, errors, conditions.

    Args:
        document: as ``Comparison.document`` makes it.

    Returns:
        A heading, tables with a line for every row of ``paper_rows``, run or not, and a paragraph of conditions.

    Raises:
        ValueError: the document lacks a required key.
    """
    kind: Kind = require(document, "kind")
    results = _by_name(require(document, "rows"), "rows")
    names = list(dict.fromkeys(row.name for row in paper_rows(kind)))
    notes = _Notes()
    parts = [f"### {_TITLES[kind]}"]
    for measure, title in _measures(kind).items():
        table = _dice_table(kind, measure, names, results, notes, paper=measure == "dice")
        parts += [f"**{title[0].upper()}{title[1:]}** in percent", markdown_lines(table)]
    parts += ["**Size**", markdown_lines(_size_table(kind, names, results))]
    parts += [*notes.paragraphs, _conditions(document, results.values())]
    return "\n\n".join(parts) + "\n"


def studies_markdown(document: Mapping[str, Any]) -> str:
    """Write a table for each study that the document has results of.

    Args:
        document: as ``Comparison.document`` makes it.

    Returns:
        For each study a heading and a line for every row of ``study_rows``, run or not; empty if there is no study.

    Raises:
        ValueError: the document lacks a required key.
    """
    kind: Kind = require(document, "kind")
    parts = []
    for study, rows in require(document, "studies").items():
        notes = _Notes()
        table = _study_table(study, _measures(kind), _by_name(rows, f"studies.{study}"), notes)
        title, finding = _STUDIES[study]
        parts += [f"### {title} ({kind.upper()})", markdown_lines(table), *notes.paragraphs]
        parts.append(
            f"{finding} Change: mean over {_UNITS[kind]}s of the paired difference to the first line of the same "
            "network, with its 95 % Student interval. Conditions as in the comparison."
        )
    return "\n\n".join(parts) + "\n" if parts else ""


def accuracy_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What :func:`monai_unetq.report.accuracy_figure` draws: changes to full precision, beside the paper's.

    Args:
        document: as ``Comparison.document`` makes it.

    Returns:
        For every row but full precision ``{"name", "activation", "weight_bytes", "changes": {title: [mean, low,
        high]}, "published": {title: change}}``, in Dice points. A failed row has no changes; one whose full precision
        is missing or failed is left out.

    Raises:
        ValueError: the document lacks a required key.
    """
    kind: Kind = require(document, "kind")
    results = _by_name(require(document, "rows"), "rows")
    rows = []
    for (name, activation), row in results.items():
        base = results.get((FULL_PRECISION, activation), {})
        if row is base or (row["status"] == "done" and base.get("status") != "done"):
            continue
        published = paper_change(name, kind, activation)
        rows.append(
            {
                "name": name,
                "activation": _ACTIVATIONS[activation],
                "weight_bytes": row.get("weight_bytes"),
                "changes": {
                    title: list(change)
                    for measure, title in _measures(kind).items()
                    if (change := paired_change(row.get(measure, {}), base.get(measure, {}))) is not None
                },
                "published": {} if published is None else {_DICE[kind]: published},
            }
        )
    return rows


def paired_change(row: Mapping[str, float], base: Mapping[str, float]) -> tuple[float, float, float] | None:
    """Mean over units of a row's difference to another, and its 95 % Student interval.

    Args:
        row: a measure of each unit, by name.
        base: what it is compared with. Units that only one of them has are left out.

    Returns:
        Mean and ends; the ends are nan for one unit. None where they share no unit.
    """
    shared = {unit: value - base[unit] for unit, value in row.items() if unit in base}
    if not shared:
        return None
    summary = summarize(shared)
    return summary.mean, summary.low, summary.high


_Results = Mapping[tuple[str, str], Mapping[str, Any]]  # a row's results by its name and activation function


@dataclass
class _Notes:
    """The errors of failed rows, numbered as they are met."""

    numbers: dict[tuple[str, str], int] = field(default_factory=dict)
    paragraphs: list[str] = field(default_factory=list)

    def cell(self, row: Mapping[str, Any]) -> str:
        """What a failed row's cell says; its whole error becomes a paragraph."""
        error = str(row.get("error") or "no reason was recorded").strip()
        key = row["name"], row["activation"]
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers) + 1
            fence = "```"
            while fence in error:
                fence += "`"
            self.paragraphs.append(
                f"({self.numbers[key]}) {key[0]}, {_ACTIVATIONS[key[1]]}, failed:\n\n{fence}text\n{error}\n{fence}"
            )
        first = error.splitlines()[0]
        short = first if len(first) <= _SHORT else first[: _SHORT - 1].rstrip() + "…"
        return f"failed: {short} ({self.numbers[key]})"


def _measures(kind: Kind) -> dict[str, str]:
    """The titles of what is measured, by its key."""
    return {"dice": _DICE[kind], **({"membrane_dice": "membrane Dice"} if kind == "em" else {})}


def _by_name(rows: Sequence[Mapping[str, Any]], where: str) -> _Results:
    found = {}
    for index, row in enumerate(rows):
        place = f"{where}[{index}]"
        if require(row, "status", place) not in ("done", "failed"):
            raise ValueError(f"results: {place}.status is {row['status']!r}, expected 'done' or 'failed'")
        found[str(require(row, "name", place)), str(require(row, "activation", place))] = row
    return found


def _dice_table(
    kind: Kind, measure: str, names: Sequence[str], results: _Results, notes: _Notes, paper: bool
) -> Table:
    """Means and changes of a measure in the columns of the activation functions, then the paper's Dice if asked for."""
    activations = ACTIVATIONS[kind]
    header = ["activations/weights"]
    for activation in activations:
        header += [_ACTIVATIONS[activation], "change"]
    published = activations if paper else ()
    rows = []
    for name in names:
        cells = [name]
        for activation in activations:
            cells += _dice_cells(name, activation, measure, FULL_PRECISION, results, notes)
        rows.append((*cells, *(_paper_cell(name, kind, activation) for activation in published)))
    return Table((*header, *(f"paper: {_ACTIVATIONS[activation]}" for activation in published)), tuple(rows))


def _size_table(kind: Kind, names: Sequence[str], results: _Results) -> Table:
    header = (
        *("activations/weights", "weights", "times smaller", "activation memory", "times smaller"),
        *("paper: MB", "times smaller"),
    )
    full = paper_row(FULL_PRECISION)
    rows = []
    for name in names:
        cells = [name]
        for key in ("weight_bytes", "activation_bytes"):
            cells += _size_cells(name, key, ACTIVATIONS[kind], results)
        paper = paper_row(name)
        if paper is None or full is None:
            cells += [_EMPTY, _EMPTY]
        else:
            cells += [f"{paper.megabytes:.2f}", f"{full.megabytes / paper.megabytes:.1f}"]
        rows.append(tuple(cells))
    return Table(header, tuple(rows))


def _study_table(study: StudyName, measures: Mapping[str, str], results: _Results, notes: _Notes) -> Table:
    header = ["activations/weights", "variant"]
    for title in measures.values():
        header += [title, "change"]
    first: dict[str, str] = {}  # of each network, the row that its variants are compared with
    rows = []
    for row in study_rows(study):
        network, _, variant = row.name.partition(", ")
        base = first.setdefault(network, row.name)
        cells = [network, variant]
        for measure in measures:
            cells += _dice_cells(row.name, row.activation, measure, base, results, notes)
        rows.append((*cells, _size_cells(row.name, "weight_bytes", (row.activation,), results)[0]))
    return Table((*header, "weights"), tuple(rows))


def _dice_cells(
    name: str, activation: str, measure: str, base: str, results: _Results, notes: _Notes
) -> tuple[str, str]:
    """A row's mean of a measure, and its change to the row named ``base`` of the same activation function."""
    row = results.get((name, activation))
    if row is None:
        return _MISSING, _EMPTY
    if row["status"] == "failed":
        return notes.cell(row), _EMPTY
    values = require(row, measure, f"row {name!r}")
    mean = f"{summarize(values).mean:.2f}"
    other = results.get((base, activation))
    if name == base or other is None or other["status"] == "failed":
        return mean, _EMPTY
    change = paired_change(values, require(other, measure, f"row {base!r}"))
    if change is None:
        return mean, _EMPTY
    middle, low, high = change
    return mean, f"{middle:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "")


def _paper_cell(name: str, kind: Kind, activation: str) -> str:
    paper = paper_row(name)
    dice = None if paper is None else paper.dice(kind, activation)
    if dice is None:
        return _EMPTY
    change = paper_change(name, kind, activation)
    return f"{dice:.2f}" + ("" if change is None else f" ({change:+.2f})")


def _size_cells(name: str, key: str, activations: Iterable[str], results: _Results) -> tuple[str, str]:
    """A size, and how many times smaller than full precision it is; both sizes where the activation functions differ."""
    sizes: list[str] = []
    ratios: list[str] = []
    for activation in activations:
        size = results.get((name, activation), {}).get(key)
        if size is None:
            continue
        full = results.get((FULL_PRECISION, activation), {}).get(key)
        sizes.append(format_bytes(size))
        ratios.append(_EMPTY if full is None else f"{full / size:.1f}")
    return " / ".join(dict.fromkeys(sizes)) or _EMPTY, " / ".join(dict.fromkeys(ratios)) or _EMPTY


def _conditions(document: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    kind: Kind = document["kind"]
    settings = require(document, "settings")

    def setting(key: str) -> Any:
        return require(settings, key, "settings")

    rows = list(rows)
    done = [row for row in rows if row["status"] == "done"]
    units = max((len(row["dice"]) for row in done), default=0)
    unit = _UNITS[kind]
    height, width = setting("patch_size")
    steps = setting("steps_per_epoch")
    sentences = [
        f"Test: {units} {unit}{'' if units == 1 else 's'} in {_folds(require(document, 'folds'))}; preset "
        f"`{require(document, 'preset')}`: width {setting('width')}, {setting('float_epochs') * steps} float steps for "
        f"each activation function, then {_further(kind, setting('epochs') * steps)}, batch {setting('batch_size')}, crops {height}×{width}, seed {require(document, 'seed')}.",
        f"Change: mean over {unit}s of the paired difference to full precision of the same activation function"
        + (", with its 95 % Student interval." if units > 1 else f"; one {unit} gives no interval."),
        "In the paper's columns: its Dice and, in brackets, the change to its full precision; its MB are 2^20 bytes.",
        f"Activation memory: the tensors between the layers for one image of {EXAMPLE_SIZE}×{EXAMPLE_SIZE} pixels.",
        "The epoch is chosen on validation only.",
    ]
    constant = document.get("constant_dice")
    if kind == "em" and constant:
        sentences.append(
            f"The cell Dice saturates: the constant answer “all cell” scores {summarize(constant).mean:.2f} on these "
            f"{unit}s, and 0 on the membranes."
        )
    seconds = sum(row.get("training_seconds", 0.0) for row in rows)
    if seconds:
        sentences.append(f"All rows together took {_duration(seconds)}.")
    return " ".join(sentences)


def _further(kind: Kind, steps: int) -> str:
    """The lengths of the rows' own trainings, in words."""
    lengths: dict[int, list[str]] = {}
    for row in paper_rows(kind):
        if row.length > 1:
            lengths.setdefault(row.length, []).append(row.name)
    longer = [f"{length * steps} for {', '.join(lengths[length])}" for length in sorted(lengths)]
    return f"{steps} further steps" + (f" (with ReLU {'; '.join(longer)})" if longer else "")


def _folds(folds: Sequence[int]) -> str:
    return f"fold{'' if len(folds) == 1 else 's'} {', '.join(map(str, folds))}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"
