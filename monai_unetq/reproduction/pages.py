"""A page of results: tables between two marks, made from JSON documents that stand beside it; all other text is a person's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json
from ..metrics import summarize
from .rows import ACTIVATIONS

__all__ = ["between", "interval", "write_page"]


def between(text: str, begin: str, end: str, tables: str) -> str:
    """A text with what stands between two marks replaced; the marks stay.

    Raises:
        ValueError: if a mark is missing.
    """
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the marks {begin!r} and {end!r} are missing")
    return f"{before}{begin}\n{tables}{end}{after}"


def write_page(
    name: str,
    source: Path,
    folder: Path,
    marks: tuple[str, str],
    markdown: Callable[[Mapping[str, Mapping[str, Any]]], str],
) -> dict[str, dict[str, Any]]:
    """Write the tables of ``folder/NAME.md`` anew from ``source/KIND.json``, which go to ``folder/NAME-KIND.json``.

    Args:
        name: of the page.
        source: what a study keeps; data sets without a document are left out of the tables.
        folder: of the page, which exists.
        marks: see ``between``.
        markdown: tables of the documents by data set.

    Returns:
        the documents.

    Raises:
        FileNotFoundError: if there is no page.
        ValueError: if a mark is missing; nothing is written then.
    """
    files = {kind: source / f"{kind}.json" for kind in ACTIVATIONS}
    documents: dict[str, dict[str, Any]] = {
        kind: json.loads(file.read_text(encoding="utf-8")) for kind, file in files.items() if file.exists()
    }
    page = folder / f"{name}.md"
    text = between(page.read_text(encoding="utf-8"), *marks, markdown(documents))
    for kind, document in documents.items():
        write_json(folder / f"{name}-{kind}.json", document)
    page.write_text(text, encoding="utf-8")
    return documents


def interval(values: Sequence[float], sign: str = "") -> str:
    """Mean and the half width of its 95 % Student interval, as ``2.00 ± 2.48``; the mean alone of one value.

    Args:
        values: at least one.
        sign: ``"+"`` shows it where it is positive, too.
    """
    found = summarize({str(number): value for number, value in enumerate(values)})
    mean = f"{found.mean:{sign}.2f}"
    return mean if found.count < 2 else f"{mean} ± {found.high - found.mean:.2f}"
