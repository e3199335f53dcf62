"""What the table of results holds and how its cells read: as text for a terminal, as Markdown, and as plain
cells that the HTML report is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "format_bytes", "full_table", "markdown_lines", "markdown_table", "require", "text_table"]

_EMPTY = "-"  # a cell without a value
_TITLES = {
    "name": "format",
    "dice": "Dice [95 % interval]",
    "membrane_dice": "membrane Dice",
    "nsd": "NSD 1 px",
    "hd95": "HD95 [px]",
    "worst": "worst Dice (case)",
    "weight_bytes": "weight size",
    "weight_ratio": "ratio",
    "activation_bytes": "activation memory",
    "activation_ratio": "ratio",
    "file_bytes": "packed file",
}
_SHORT = (
    "name", "dice", "membrane_dice", "weight_bytes", "weight_ratio", "activation_bytes", "activation_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as strings; the first column names the row, the others hold numbers.

    Attributes:
        header: the title of each column.
        rows: the cells, one tuple of the header's length for each row.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def text_table(results: Mapping[str, Any]) -> str:
    """Write the table for a terminal, in aligned columns and, up to the names of the formats, in ASCII.

    Args:
        results: the results as in ``results.json``; only ``rows`` is read.

    Returns:
        A header, a rule and one line for each row: format, Dice (%) and its 95 % interval, membrane Dice (%),
        weight size, activation memory, and how many times smaller than float each of the two is. No newline
        at the end.

    Raises:
        ValueError: a required key of ``rows`` is missing, or there is no row.
    """
    table = _table(results, _SHORT)
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *numbers])

    return "\n".join([line(table.header), line(["-" * width for width in widths]), *map(line, table.rows)])


def markdown_table(results: Mapping[str, Any]) -> str:
    """Write the table as GitHub-flavoured Markdown, with the boundary measures and the worst case.

    Args:
        results: the results as in ``results.json``; only ``rows`` is read.

    Returns:
        The columns of :func:`text_table`, and besides them normalized surface Dice (%), HD95 (px), the lowest
        Dice with the name of its case, and the size of the packed file if any row has one. No newline at the
        end.

    Raises:
        ValueError: a required key of ``rows`` is missing, or there is no row.
    """
    return markdown_lines(full_table(results))


def markdown_lines(table: Table) -> str:
    """Write any table as GitHub-flavoured Markdown: a line for each row, the first column to the left, the others to
    the right. No newline at the end."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(
        [line(table.header), line(["---"] + ["---:"] * (len(table.header) - 1)), *map(line, table.rows)]
    )


def full_table(results: Mapping[str, Any]) -> Table:
    """Make the cells of :func:`markdown_table`.

    Args:
        results: the results as in ``results.json``; only ``rows`` is read.

    Raises:
        ValueError: a required key of ``rows`` is missing, or there is no row.
    """
    packed = any(row.get("file_bytes") is not None for row in require(results, "rows"))
    return _table(results, [column for column in _TITLES if packed or column != "file_bytes"])


def format_bytes(count: int) -> str:
    """Print a size in B, KiB (1024 B) or MiB (1024 KiB): ``512 B``, ``148.4 KiB``, ``18.45 MiB``.

    Args:
        count: number of bytes, at least 0.
    """
    if count < 1024:
        return f"{count} B"
    if round(count / 1024, 1) < 1024:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.2f} MiB"


def require(mapping: Mapping[str, Any], key: str, where: str = "") -> Any:
    """Read a key that the results must have.

    Args:
        mapping: the part of the results that the key should be in.
        key: the key.
        where: the place of ``mapping`` in the results, such as ``rows[0].metrics``; empty for the whole.

    Raises:
        ValueError: the key is missing; the message gives its place and the keys that are there.
    """
    if key not in mapping:
        place = f"{where}.{key}" if where else key
        there = ", ".join(map(str, mapping)) or "none"
        raise ValueError(
            f"results: the required key {place!r} is missing (found there: {there}); "
            "they are incomplete or come from another version, make them again"
        )
    return mapping[key]


def _table(results: Mapping[str, Any], columns: Sequence[str]) -> Table:
    rows = require(results, "rows")
    if not rows:
        raise ValueError("results: 'rows' is empty, expected one row for each format")
    cells = [_cells(row, f"rows[{index}]") for index, row in enumerate(rows)]
    return Table(
        header=tuple(_TITLES[column] for column in columns),
        rows=tuple(tuple(row[column] for column in columns) for row in cells),
    )


def _cells(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """All cells of a row, by the keys of ``_TITLES``."""
    metrics = require(row, "metrics", where)

    def number(metric: str, key: str) -> Any:
        place = f"{where}.metrics"
        return require(require(metrics, metric, place), key, f"{place}.{metric}")

    ends = number("dice", "low"), number("dice", "high")
    known = all(end is not None and math.isfinite(end) for end in ends)  # one case has no interval
    interval = ", ".join(f"{end:.2f}" for end in ends) if known else _EMPTY
    file_bytes = row.get("file_bytes")
    return {
        "name": str(require(row, "name", where)),
        "dice": f"{number('dice', 'mean'):.2f} [{interval}]",
        "membrane_dice": f"{number('membrane_dice', 'mean'):.2f}",
        "nsd": f"{number('nsd', 'mean'):.2f}",
        "hd95": f"{number('hd95', 'mean'):.2f}",
        "worst": f"{number('dice', 'worst'):.2f} ({number('dice', 'worst_case')})",
        "weight_bytes": format_bytes(require(row, "weight_bytes", where)),
        "weight_ratio": f"{require(row, 'weight_ratio', where):.1f}x",
        "activation_bytes": format_bytes(require(row, "activation_bytes", where)),
        "activation_ratio": f"{require(row, 'activation_ratio', where):.1f}x",
        "file_bytes": _EMPTY if file_bytes is None else format_bytes(file_bytes),
    }
