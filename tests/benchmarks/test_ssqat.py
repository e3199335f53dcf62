"""The study of SS-QAT: a run of seconds on a phantom, the page from its JSON, changes and budgets by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import monai_unetq as uq
from monai_unetq.datasets import write_phantom
from tests.benchmarks.scripts import BENCHMARKS, load

RESULTS = BENCHMARKS.parent / "docs" / "results"

SCRIPT = BENCHMARKS / "ssqat.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """The script as a module."""
    return load("ssqat")


def test_widths_are_read(study: ModuleType) -> None:
    assert study.bits_of("W3A4") == (3, 4)


def test_a_mixed_plan_may_take_what_the_uniform_one_takes(study: ModuleType) -> None:
    network, image = uq.networks.FixedPointUNet(1, 1, width=2), torch.zeros(1, 1, 16, 16)
    plan = study.uniform_plan(network, "W3A2", "free")
    # 3 bits but for the first (18) and last (18) weights; 2 but for the image: 256 of 27·256 input values.
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    found = [text.partition("=")[2].removesuffix("bits") for text in study.budget_of(network, plan, image)]
    assert float(found[0]) == pytest.approx(3 + 5 * 36 / weights, abs=2e-6)
    calls = uq.observe(network, image).calls
    values = sum(torch.Size(call.input_shape).numel() for call in calls)
    assert float(found[1]) == pytest.approx(2 + 6 * 256 / values, abs=2e-6)


def row(name: str, widths: str, fold: int, seed: int = 0, **measures: Any) -> dict[str, Any]:
    return {"row": name, "widths": widths, "fold": fold, "seed": seed, **measures}


def test_changes_are_paired_by_unit_within_a_fold(study: ModuleType) -> None:
    rows = [
        row("float", "float", 0, dice={"a": 90.0, "b": 80.0}),
        row("float", "float", 1, dice={"c": 50.0}),
        row("uniform", "W3A3", 0, dice={"a": 89.0, "b": 80.5}),
        row("uniform", "W3A3", 0, seed=1, dice={"a": 88.0, "b": 79.0}),
        row("uniform", "W3A3", 1, dice={"c": 53.0}),
        row("uniform", "W2A2", 0, dice={"a": 1.0, "b": 1.0}),
    ]
    document = {"rows": rows}
    assert study.changes(document, "uniform", "W3A3", "dice") == [-1.0, 0.5, -2.0, -1.0, 3.0]
    assert study.changes(document, "uniform", "W3A3", "dice", [1]) == [3.0]
    # Fold 0 loses 0.875 in two trainings, fold 1 gains 3 in one: both count the same.
    assert study.mean_change(document, "uniform", "W3A3", "dice", [0, 1]) == pytest.approx((3 - 0.875) / 2)


def compared(numbers: dict[str, float], fold: int) -> list[dict[str, Any]]:
    return [
        row(name, "float" if name == "float" else "W2A2", fold, dice={"a": value}, nsd={"a": value + 1})
        for name, value in numbers.items()
    ]


def test_the_better_peer_is_the_one_with_more_dice(study: ModuleType) -> None:
    ours = {"as shipped": 88.0, "+ all": 89.0, "+ equalization": 87.0, "uniform": 80.0}
    rows = compared({"float": 90.0, **ours, "Brevitas": 70.0, "modelopt, 1e-3": 75.5}, 0)
    rows.append(row("modelopt, 1e-3", "W2A2", 0, seed=1, dice={"a": 74.5}, nsd={"a": 72.0}))
    rows = [{**r, "nsd": {"a": 80.0}} if r["row"] == "Brevitas" else r for r in rows]
    lines = study.beside_the_peers({"gm": {"rows": rows}})
    assert lines[5] == (
        "| GM, W2A2 | -2.0 / -2.0 | -1.0 / -1.0 | -3.0 / -3.0 | -10.0 / -10.0 | -15.0 / -16.8 (2) modelopt, 1e-3 "
        "| 0.13 / 0.07 / 0.20 |"
    )
    # Boundary Dice: 89, 90 and 88 of ours beside 80 of Brevitas, which has less Dice.
    assert "`as shipped` by +9.0 on average over 1 lines" in lines[-3]
    assert "`+ all` by +10.0 on average over 1 lines (median +10.00), by +10.00 where least" in lines[-3]
    assert (
        "`+ equalization` by +8.0 on average over 1 lines (median +8.00), by +8.00 where least" in lines[-3]
    )


def test_two_rows_differ_on_average_over_lines_in_the_folds_that_both_have(study: ModuleType) -> None:
    rows = compared({"float": 90.0, "+ all": 89.0, "+ equalization": 87.0}, 0)
    rows += compared({"float": 90.0, "+ equalization": 0.0}, 1)
    rows.append(row("+ all", "W3A3", 0, dice={"a": 80.0}, nsd={"a": 82.0}))
    rows.append(row("+ equalization", "W3A3", 0, dice={"a": 84.0}, nsd={"a": 83.0}))
    found = study.row_beside_row({"gm": {"rows": rows}}, "+ all", "+ equalization")
    # W2A2: 2 and 2, in fold 0; W3A3: -4 and -1.
    assert found == "`+ all` beside `+ equalization` -1.00 Dice and +0.50 boundary Dice over 2 lines"
    assert study.row_beside_row({"gm": {"rows": rows}}, "as shipped", "+ all") == ""


def test_only_the_same_folds_are_compared(study: ModuleType) -> None:
    numbers = {"float": 90.0, "+ equalization": 88.0, "Brevitas": 80.0, "uniform": 85.0}
    rows = compared(numbers, 0) + compared({**numbers, "+ equalization": 90.0, "Brevitas": 70.0}, 2)
    rows += compared({"float": 90.0, "+ equalization": 0.0}, 1)  # no peer was trained there
    rows = [found for found in rows if (found["row"], found["fold"]) != ("uniform", 2)]
    line = study.beside_the_peers({"gm": {"rows": rows}})[5]
    assert (
        line == "| GM, W2A2, 2 folds |  |  | -1.0 / -1.0 (2) |  | -15.0 / -15.0 (2) Brevitas | – / – / 0.07 |"
    )


def test_the_ablation_has_lines_where_all_its_rows_were_trained(study: ModuleType) -> None:
    numbers = {
        "float": 90.0,
        "uniform": 80.0,
        "+ split, mixed": 81.0,
        "+ supervision": 79.5,
        "+ both (SS-QAT)": 84.0,
    }
    rows = [*compared(numbers, 0), row("uniform", "W3A3", 0, dice={"a": 1.0}, nsd={"a": 1.0})]
    assert study.ablation_table({"em": {"rows": rows}})[5:] == [
        "| EM, W2A2 | -10.0 / -10.0 | -9.0 / -9.0 | -10.5 / -10.5 | -6.0 / -6.0 |"
    ]
    assert study.ablation_table({"em": {"rows": rows[:3]}}) == []


def test_bounds_of_the_drop(study: ModuleType) -> None:
    rows = [
        row("float", "float", 0, dice={"a": 90.0}),
        row("float", "float", 1, dice={"b": 80.0}),
        row("+ equalization", "W3A4", 0, dice={"a": 89.0}),
        row("+ equalization", "W3A4", 1, dice={"b": 80.0}),
        row("+ equalization", "W2A4", 0, dice={"a": 89.0}),
        row("uniform", "W2A2", 0, dice={"a": 89.0}),
    ]
    # Drops of 1 and 0: mean 0.5, standard error 0.5, and t = 12.706 with one degree of freedom.
    assert study.bounds_table({"gm": {"rows": rows}})[5:] == [
        "| GM, W3A4, Dice | 0.5 |  |  | +6.85 (2 in 2 folds) |  |  |  |"
    ]


def test_candidates_stand_side_by_side(study: ModuleType) -> None:
    rows = [
        {"row": "float", "widths": "float", "dice": {"a": 90.0, "b": 80.0}, "nsd": {"a": 99.0}},
        {"row": "uniform", "widths": "W2A2", "learning_rate": 1e-3, "dice": {"a": 70.0, "b": 72.0}, "nsd": {"a": 95.0}},
        {"row": "uniform", "widths": "W2A2", "learning_rate": 1e-3, "dice": {"a": 60.0, "b": 62.0}, "nsd": {"a": 93.0}},
        {"row": "uniform", "widths": "W2A2", "learning_rate": 3e-4, "dice": {"a": 50.0, "b": 52.0}, "nsd": {"a": 91.0}},
        {"row": "Brevitas", "widths": "W2A4", "learning_rate": 1e-3, "dice": {"a": 1.0}, "nsd": {"a": 2.0}},
    ]  # fmt: skip
    lines = study.candidates_table({"validation": rows})
    assert "(float: 85.0 / 99.0)" in lines[1]
    assert lines[3:] == [
        "| widths | row | 0.0003 | 0.001 |",
        "|---|---|---:|---:|",
        "| W2A4 | Brevitas |  | 1.0 / 2.0 |",
        "| W2A2 | uniform | 51.0 / 91.0 | 66.0 / 94.0 (2 trainings) |",
    ]
    assert study.candidates_table({}) == []


def test_parts_are_compared_on_the_same_trainings(study: ModuleType) -> None:
    def scored(name: str, widths: str, seed: int, dice: float, validated: float) -> dict[str, Any]:
        validation = {"dice": validated, "nsd": validated + 1}
        return row(name, widths, 0, seed, dice={"a": dice, "b": dice}, nsd={"a": 99.0}, validation=validation)

    rows = [
        scored("float", "float", 0, 90.0, 80.0),
        scored("+ equalization", "W2A2", 0, 85.0, 76.0),
        scored("+ equalization", "W2A2", 1, 0.0, 0.0),  # the other row has no such seed
        scored("+ equalization, teacher", "W2A2", 0, 86.0, 75.0),
        scored("+ equalization", "W3A3", 0, 86.0, 75.0),
    ]
    assert study.parts_table({"rows": rows})[5:] == [
        "| W2A2 | + equalization | 1 | -4.0 / -4.0 | -5.0 / +0.0 |",
        "| W2A2 | + equalization, teacher | 1 | -5.0 / -5.0 | -4.0 / +0.0 |",
    ]


def test_a_run_of_seconds(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_phantom("em", tmp_path / "raw", dimensions=2, size=48, count=6)
    small = study.PRESETS["quick"]["em"]
    small = study.replace(small, width=2, steps_per_epoch=2, batch_size=2, patch_size=(32, 32))
    monkeypatch.setattr(study, "PRESETS", {"cpu": {"em": small}})
    base = tmp_path / "study" / "em" / "cpu" / "float-relu" / "fold0-seed0"
    base.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(uq.networks.FixedPointUNet(1, 1, width=2).state_dict(), base / "model.pt")
    rows = [
        "float, trained on",
        "+ teacher",
        "+ all",
        "as shipped",
        "as shipped, best epoch",
        "as shipped, free scales",
        "Brevitas",
        "Brevitas, equalized",
    ]
    arguments = [
        "em",
        "--dataset",
        str(dataset),
        "--study",
        str(tmp_path / "study"),
        "--out",
        str(tmp_path / "out"),
    ]
    arguments += ["--widths", "W3A4", "--epochs", "2", "--metric", "fisher"]
    assert study.main([*arguments, "--rows", "+ equalization", "--candidates", "1e-3", "3e-4"]) == 0
    arguments += ["--rows", *rows]
    assert study.main(arguments) == 0
    document = json.loads((tmp_path / "out" / "em.json").read_text())
    assert {row["row"] for row in document["rows"]} == {"float", *rows}
    tried = {row.get("learning_rate"): row for row in document["validation"]}
    assert tried.keys() == {None, 1e-3, 3e-4} and tried[None]["row"] == "float"
    assert tried[1e-3]["dice"].keys().isdisjoint(document["rows"][0]["dice"])  # other cases than the test's
    (ours,) = (row for row in document["rows"] if row["row"] == "+ all")
    assert ours["steps"] == 4 and ours["weight_bytes"] > 0 and ours["bops"] > 0
    assert ours["validation"].keys() == {"dice", "nsd"}
    assert set(ours["dice"]) == set(ours["membrane_dice"]) and set(ours["nsd"]) == set(ours["hd95"])
    packed = tmp_path / "out" / "em" / "W3A4" / "all" / "fold0-seed0" / "model.unetq"
    assert uq.inspect_packed(packed)["plan"]["layers"]["decoder.0.conv1"]["parts"] == [["skip", 8], ["up", 8]]
    for name, chosen, scale in (
        ("as shipped", False, "power-of-two"),
        ("as shipped, best epoch", True, "power-of-two"),
        ("as shipped, free scales", False, "free"),
    ):
        (recipe,) = (row for row in document["rows"] if row["row"] == name)
        assert (
            recipe["steps"] == 4
            and recipe["weight_bytes"] <= ours["weight_bytes"]
            and recipe["learning_rate"] == 3e-4
        )
        folder = tmp_path / "out" / "em" / "W3A4" / study._slug(name) / "fold0-seed0" / "recipe"
        assert json.loads((folder / "stage.json").read_text())["validated"] == chosen
        plan = uq.inspect_packed(folder / "model.unetq")["plan"]
        assert plan["layers"]["decoder.0.conv1"]["parts"] == [["skip", 8], ["up", 8]]
        assert uq.QuantPlan.from_json(plan).scale == scale
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("score.json")}
    study.main(arguments)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("score.json")}
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "ssqat.md").write_text(
        "\n".join(["before", study.MARKS[0], "stale", study.MARKS[1], "after", ""])
    )
    study.main(["page", "--out", str(tmp_path / "out"), "--page", str(pages)])
    text = (pages / "ssqat.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| W3A4 | + all | 1 |" in text and "| widths | row | 0.0003 | 0.001 |" in text
    assert json.loads((pages / "ssqat-em.json").read_text()) == document


def test_a_device_that_is_not_there(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["em", "--dataset", str(tmp_path), "--study", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="device 'cuda' is not there"):
        study.main([*arguments, "--device", "cuda"])
    assert not (tmp_path / "out").exists()


def test_batches_move_with_all_else_that_they_hold(study: ModuleType) -> None:
    batch: dict[str, Any] = {"image": torch.zeros(1), "label": torch.ones(1), "case": ["a"]}
    found = study.moved(batch, "meta")
    assert found["image"].device.type == found["label"].device.type == "meta" and found["case"] == ["a"]
    assert batch["image"].device.type == "cpu"


def test_the_page_is_made_from_the_documents_beside_it(study: ModuleType, tmp_path: Path) -> None:
    pages, out = tmp_path / "pages", tmp_path / "out"
    pages.mkdir()
    out.mkdir()
    shutil.copy(RESULTS / "ssqat.md", pages)
    for kind in ("em", "gm", "nih"):
        shutil.copy(RESULTS / f"ssqat-{kind}.json", out / f"{kind}.json")
    assert study.main(["page", "--out", str(out), "--page", str(pages)]) == 0
    assert (pages / "ssqat.md").read_text() == (RESULTS / "ssqat.md").read_text()
