"""The comparison as Markdown: every row in its line, changes paired by hand, failures and gaps said plainly."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from monai_unetq.report import accuracy_figure
from monai_unetq.reproduction.rows import paper_rows, study_rows
from monai_unetq.reproduction.tables import accuracy_rows, markdown, paired_change, studies_markdown

SETTINGS = {
    "width": 16,
    "float_epochs": 24,
    "epochs": 12,
    "steps_per_epoch": 25,
    "batch_size": 4,
    "patch_size": [160, 128],
    "val_interval": 1,
    "cosine": True,
}


def done(
    name: str, activation: str, dice: dict[str, float], weights: int = 1000, membrane: bool = True
) -> dict[str, Any]:
    row = {
        "name": name,
        "activation": activation,
        "study": None,
        "status": "done",
        "error": None,
        "dice": dice,
        "weight_bytes": weights,
        "activation_bytes": 4 * weights,
        "validation": 90.0,
        "steps": 900,
        "training_seconds": 1800.0,
    }
    if membrane:
        row["membrane_dice"] = {unit: value / 2 for unit, value in dice.items()}
    return row


def failed(name: str, activation: str, error: str | None) -> dict[str, Any]:
    return {"name": name, "activation": activation, "study": None, "status": "failed", "error": error}


FULL = {"26": 90.0, "27": 92.0, "28": 94.0}


@pytest.fixture
def em() -> dict[str, Any]:
    """Three slices: Q6.0/Q0.4 loses 1, 2 and 3 points, a mean of 2 and a deviation of 1."""
    return {
        "kind": "em",
        "preset": "cpu",
        "settings": SETTINGS,
        "folds": [0],
        "seed": 7,
        "versions": {},
        "constant_dice": {"26": 88.0, "27": 88.5, "28": 89.0},
        "rows": [
            done("Full precision", "relu", FULL, 1_048_576),
            done("Q6.0/Q0.4", "relu", {"26": 89.0, "27": 90.0, "28": 91.0}, 131_072),
            failed(
                "BNN", "relu", "FloatingPointError: the loss | is nan at step 17 of 300, layer down.0\nmore"
            ),
            done("Full precision", "tanh", FULL, 1_048_576),
            done("int8/pow2-4", "tanh", {unit: value + 0.5 for unit, value in FULL.items()}, 131_072),
        ],
        "studies": {},
    }


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, header first and rule left out."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.replace("\\|", "¦")[1:-1].split("|")])
        elif found[-1]:
            found.append([])
    return [[lines[0], *lines[2:]] for lines in found if lines]


def line(table: list[list[str]], name: str) -> list[str]:
    (found,) = (cells for cells in table if cells[0] == name)
    return found[1:]


def test_every_row_has_a_line_in_every_table(em: dict[str, Any]) -> None:
    dice, membrane, size = tables(markdown(em))
    names = list(dict.fromkeys(row.name for row in paper_rows("em")))
    for table in (dice, membrane, size):
        assert [cells[0] for cells in table[1:]] == names
        assert {len(cells) for cells in table} == {len(table[0])}
        assert len(table[0]) <= 12
    assert dice[0] == [
        *("activations/weights", "ReLU", "change", "tanh", "change"),
        *("paper: ReLU", "paper: tanh"),
    ]


def test_dice_with_paired_change_beside_the_papers(em: dict[str, Any]) -> None:
    dice, membrane, _ = tables(markdown(em))
    assert line(dice, "Full precision") == ["92.00", "–", "92.00", "–", "94.05", "93.02"]
    # Student's t for 2 degrees of freedom and 95 % is 4.302653; its half width here 4.302653 * 1 / sqrt(3) = 2.484.
    assert line(dice, "Q6.0/Q0.4") == [
        *("90.00", "-2.00 [-4.48, +0.48]", "not run yet", "–"),
        *("91.03 (-3.02)", "90.93 (-2.09)"),
    ]
    assert line(membrane, "Q6.0/Q0.4") == ["45.00", "-1.00 [-2.24, +0.24]", "not run yet", "–"]
    assert line(dice, "int8/pow2-4") == ["not run yet", "–", "92.50", "+0.50 [+0.50, +0.50]", "–", "–"]
    assert line(dice, "TernaryNet") == ["not run yet", "–", "not run yet", "–", "–", "82.66 (-10.36)"]


def test_a_failed_row_says_why_in_its_cell_and_whole_below(em: dict[str, Any]) -> None:
    text = markdown(em)
    dice, membrane, size = tables(text)
    cell = "failed: FloatingPointError: the loss ¦ is nan a… (1)"
    assert line(dice, "BNN") == [cell, "–", "not run yet", "–", "78.53 (-15.52)", "–"]
    assert line(membrane, "BNN") == [cell, "–", "not run yet", "–"]
    assert line(size, "BNN") == ["–", "–", "–", "–", "0.56", "33.0"]
    assert text.count("(1) BNN, ReLU, failed:") == 1
    assert "```text\nFloatingPointError: the loss | is nan at step 17 of 300, layer down.0\nmore\n```" in text


def test_an_error_cannot_break_out_of_its_block(em: dict[str, Any]) -> None:
    em["rows"][2]["error"] = "bad\n```\n| a | b |"
    assert "````text\nbad\n```\n| a | b |\n````" in markdown(em)
    em["rows"][2]["error"] = None
    assert "failed: no reason was recorded (1)" in markdown(em)


def test_sizes_and_how_many_times_smaller(em: dict[str, Any]) -> None:
    size = tables(markdown(em))[2]
    assert line(size, "Full precision") == ["1.00 MiB", "1.0", "4.00 MiB", "1.0", "18.48", "1.0"]
    assert line(size, "Q6.0/Q0.4") == ["128.0 KiB", "8.0", "512.0 KiB", "8.0", "2.31", "8.0"]
    assert line(size, "int8/pow2-4") == ["128.0 KiB", "8.0", "512.0 KiB", "8.0", "–", "–"]


def test_sizes_that_differ_between_the_columns_are_both_given(em: dict[str, Any]) -> None:
    em["rows"].append(done("Q6.0/Q0.4", "tanh", FULL, 262_144))
    size = tables(markdown(em))[2]
    assert line(size, "Q6.0/Q0.4")[:2] == ["128.0 KiB / 256.0 KiB", "8.0 / 4.0"]


def test_without_full_precision_there_is_no_change(em: dict[str, Any]) -> None:
    em["rows"][0] = failed("Full precision", "relu", "MemoryError")
    dice, _, size = tables(markdown(em))
    assert line(dice, "Q6.0/Q0.4")[:2] == ["90.00", "–"]
    assert line(size, "Q6.0/Q0.4")[:2] == ["128.0 KiB", "–"]


def test_nothing_run_yet(em: dict[str, Any]) -> None:
    em["rows"] = []
    for cells in tables(markdown(em))[0][1:]:
        assert cells[1:5] == ["not run yet", "–", "not run yet", "–"]


def test_conditions(em: dict[str, Any]) -> None:
    text = markdown(em)
    assert text.startswith("### Cells in electron microscopy (EM)\n\n**Cell Dice** in percent\n\n|")
    assert text.endswith("All rows together took 2 h 0 min.\n")
    for part in (
        "Test: 3 slices in fold 0; preset `cpu`: width 16, 600 float steps for each activation function, then 300 "
        "further steps (with ReLU 600 for Full precision, Q4.0/Q0.2, BNN, TernaryNet, int6/int4 learned, int2/int2 "
        "learned, int4/ternary learned, int4/binary learned), batch 4, crops 160×128, seed 7.",
        "mean over slices of the paired difference",
        "one image of 200×200 pixels",
        "“all cell” scores 88.50 on these slices",
    ):
        assert part in text


def test_gm_with_one_person_has_no_interval_and_no_membranes(em: dict[str, Any]) -> None:
    rows = [
        done("Full precision", "relu", {"9604": 60.0}, membrane=False),
        done("BNN", "relu", {"9604": 57.5}, membrane=False),
    ]
    text = markdown({**em, "kind": "gm", "folds": [0, 3], "rows": rows})
    dice, size = tables(text)
    assert line(dice, "BNN") == ["57.50", "-2.50", "not run yet", "–", "31.44 (-24.88)", "–"]
    assert "Test: 1 person in folds 0, 3;" in text
    assert "one person gives no interval" in text
    assert "nan" not in text
    assert "all cell" not in text
    assert len(size) == len(dice)


def test_nih_has_one_column(em: dict[str, Any]) -> None:
    dice, _ = tables(markdown({**em, "kind": "nih", "rows": []}))
    assert dice[0] == ["activations/weights", "ReLU", "change", "paper: ReLU"]
    assert line(dice, "TernaryNet") == ["not run yet", "–", "73.90 (-1.79)"]


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("folds", "'folds'"),
        ("settings", "'settings'"),
        ("rows.0.status", r"'rows\[0\].status'"),
        ("settings.width", "'settings.width'"),
    ],
)
def test_a_missing_key_is_named(em: dict[str, Any], key: str, place: str) -> None:
    broken = copy.deepcopy(em)
    *parents, last = key.split(".")
    part: Any = broken
    for parent in parents:
        part = part[int(parent) if parent.isdigit() else parent]
    del part[last]
    with pytest.raises(ValueError, match=place):
        markdown(broken)


def test_an_unknown_status_is_named(em: dict[str, Any]) -> None:
    em["rows"][1]["status"] = "running"
    with pytest.raises(ValueError, match=r"rows\[1\]\.status is 'running'"):
        markdown(em)


def test_studies_compare_with_the_first_line_of_the_same_network(em: dict[str, Any]) -> None:
    rows = study_rows("dropout")
    em["studies"]["dropout"] = [
        done(rows[0].name, "relu", FULL),
        done(rows[1].name, "relu", {unit: value + 1 for unit, value in FULL.items()}),
        done(rows[2].name, "relu", FULL, 500),
        done(rows[3].name, "relu", {unit: value - 4 for unit, value in FULL.items()}, 500),
        failed(rows[4].name, "relu", "MemoryError"),
    ]
    text = studies_markdown(em)
    (table,) = tables(text)
    assert table[0][:4] == ["activations/weights", "variant", "cell Dice", "change"]
    assert [cells[:2] for cells in table[1:]] == [row.name.split(", ") for row in rows]
    assert [cells[2:4] for cells in table[1:]] == [
        ["92.00", "–"],
        ["93.00", "+1.00 [+1.00, +1.00]"],
        ["92.00", "–"],
        ["88.00", "-4.00 [-4.00, -4.00]"],
        ["failed: MemoryError (1)", "–"],
        ["not run yet", "–"],
    ]
    assert [cells[4:6] for cells in table[1:5]][3] == ["44.00", "-2.00 [-2.00, -2.00]"]
    assert [cells[6] for cells in table[1:]] == ["1000 B", "1000 B", "500 B", "500 B", "–", "–"]
    assert "dropout together with quantization costs accuracy" in text
    assert "MemoryError\n```" in text


def test_both_studies_and_none(em: dict[str, Any]) -> None:
    assert studies_markdown(em) == ""
    em["studies"] = {"dropout": [], "float-layers": []}
    first, second = tables(studies_markdown(em))
    assert len(first) == 1 + len(study_rows("dropout"))
    assert len(second) == 1 + len(study_rows("float-layers"))


def test_change_is_of_shared_units_only() -> None:
    change = paired_change({"a": 5.0, "b": 7.0, "c": 0.0}, {"a": 4.0, "b": 4.0, "d": 9.0})
    assert change is not None
    # Differences 1 and 3: mean 2, deviation sqrt(2), half width 12.7062 * sqrt(2) / sqrt(2).
    assert change == pytest.approx((2.0, 2.0 - 12.7062, 2.0 + 12.7062), abs=1e-4)
    one = paired_change({"a": 5.0}, {"a": 4.0})
    assert one is not None
    assert one[0] == 1.0
    assert math.isnan(one[1])
    assert math.isnan(one[2])
    assert paired_change({"a": 5.0}, {"b": 4.0}) is None


def test_accuracy_rows(em: dict[str, Any], tmp_path: Any) -> None:
    em["rows"].append(done("Q8.8/Q8.8", "tanh", FULL))
    em["rows"][3] = failed("Full precision", "tanh", "MemoryError")
    learned, broken = accuracy_rows(em)  # those of tanh have nothing to be compared with
    assert (learned["name"], learned["activation"], learned["weight_bytes"]) == ("Q6.0/Q0.4", "ReLU", 131_072)
    assert learned["changes"]["cell Dice"] == pytest.approx([-2.0, -4.484, 0.484], abs=1e-3)
    assert learned["changes"]["membrane Dice"] == pytest.approx([-1.0, -2.242, 0.242], abs=1e-3)
    assert learned["published"] == {"cell Dice": pytest.approx(-3.02)}
    assert (broken["name"], broken["weight_bytes"], broken["changes"]) == ("BNN", None, {})
    pytest.importorskip("matplotlib")
    assert accuracy_figure([learned, broken], tmp_path / "a.png").is_file()
