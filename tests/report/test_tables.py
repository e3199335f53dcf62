"""Tables of results: what stands in which cell."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import pytest

from monai_unetq.report import markdown_table, text_table
from monai_unetq.report.tables import format_bytes


def summary(mean: float, low: float | None, high: float | None, worst: float) -> dict[str, Any]:
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "worst": worst,
        "worst_case": "21",
        "count": 5,
        "values": {},
    }


def row(name: str, dice: dict[str, Any], ratio: float, file_bytes: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "weights": name,
        "activations": name,
        "metrics": {
            "dice": dice,
            "membrane_dice": summary(81.234, 80.0, 82.0, 78.0),
            "nsd": summary(88.456, 87.0, 89.0, 86.0),
            "hd95": summary(3.219, 3.0, 4.0, 5.0),
        },
        "weight_bytes": int(1215364 / ratio),
        "activation_bytes": 14_000_000,
        "file_bytes": file_bytes,
        "weight_ratio": ratio,
        "activation_ratio": 5.3333,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    rows = [
        row("float", summary(95.304, 94.1, 96.5, 93.0), 1.0, None),
        row("Q6.0/Q0.4", summary(94.9, 93.62, 96.18, 92.118), 8.0, 160_000),
    ]
    return {"rows": rows}


def markdown_cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_text_table_cells(results: dict[str, Any]) -> None:
    lines = text_table(results).splitlines()
    assert len(lines) == 4
    assert lines[0].split("  ")[0] == "format"
    assert lines[3].split() == [
        *("Q6.0/Q0.4", "94.90", "[93.62,", "96.18]", "81.23"),
        *("148.4", "KiB", "8.0x", "13.35", "MiB", "5.3x"),
    ]


def test_text_table_is_aligned_ascii(results: dict[str, Any]) -> None:
    text = text_table(results)
    assert text.isascii()
    assert len({len(line) for line in text.splitlines()}) == 1
    assert not text.endswith("\n")


def test_text_table_keeps_aligned_with_a_long_name(results: dict[str, Any]) -> None:
    results["rows"][0]["name"] = "a name longer than its header"
    assert len({len(line) for line in text_table(results).splitlines()}) == 1


def test_markdown_table_cells(results: dict[str, Any]) -> None:
    header, rule, _, cells = markdown_cells(markdown_table(results))
    assert len(header) == len(rule) == len(cells)
    assert rule == ["---"] + ["---:"] * (len(header) - 1)
    by_title = dict(zip(header, cells, strict=True))
    assert by_title["Dice [95 % interval]"] == "94.90 [93.62, 96.18]"
    assert by_title["NSD 1 px"] == "88.46"
    assert by_title["HD95 [px]"] == "3.22"
    assert by_title["worst Dice (case)"] == "92.12 (21)"
    assert by_title["packed file"] == "156.2 KiB"


def test_packed_file_column_only_where_there_is_one(results: dict[str, Any]) -> None:
    assert markdown_cells(markdown_table(results))[2][-1] == "-"  # float has no packed file
    results["rows"][1]["file_bytes"] = None
    del results["rows"][0]["file_bytes"]
    assert "packed file" not in markdown_table(results)


@pytest.mark.parametrize("end", [None, math.nan])
def test_one_case_shows_no_interval(results: dict[str, Any], end: float | None) -> None:
    results["rows"][0]["metrics"]["dice"].update(low=end, high=end)
    assert "95.30 [-]" in text_table(results)


def test_markdown_escapes_the_pipe(results: dict[str, Any]) -> None:
    results["rows"][0]["name"] = "a|b"
    assert r"| a\|b |" in markdown_table(results)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("rows",), "rows"),
        (("rows", 1, "name"), "rows[1].name"),
        (("rows", 1, "weight_bytes"), "rows[1].weight_bytes"),
        (("rows", 0, "activation_ratio"), "rows[0].activation_ratio"),
        (("rows", 1, "metrics"), "rows[1].metrics"),
        (("rows", 1, "metrics", "nsd"), "rows[1].metrics.nsd"),
        (("rows", 1, "metrics", "dice", "low"), "rows[1].metrics.dice.low"),
    ],
)
def test_a_missing_key_is_named_with_its_place(
    results: dict[str, Any], path: tuple[Any, ...], named: str
) -> None:
    broken = copy.deepcopy(results)
    part: Any = broken
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    with pytest.raises(ValueError) as error:
        text_table(broken)
    assert f"required key {named!r} is missing" in str(error.value)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="'rows' is empty"):
        markdown_table({"rows": []})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (151_920, "148.4 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (4_837_249 * 4, "18.45 MiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_importing_the_report_imports_nothing_heavy() -> None:
    code = (
        "import sys, monai_unetq.report; "
        "print([m for m in ('torch', 'monai', 'matplotlib', 'numpy', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
