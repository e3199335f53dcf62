"""The study of nnU-Net's trainers: the page in the repository is what its JSON gives, tables and intervals by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import SimpleITK

from monai_unetq.cli import main
from monai_unetq.datasets.splits import block_folds
from tests.benchmarks.scripts import load

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """The script as a module."""
    return load("nnunet")


def row(name: str, front: dict[str, float], back: dict[str, float], **more: Any) -> dict[str, Any]:
    """A row's result."""
    return {
        "row": name, "bytes": 4096, "steps": 40, "epoch_seconds": 10.0, "command_seconds": 20.0,
        "dice": {"front": front, "back": back}, **more,
    }  # fmt: skip


def test_the_page_in_the_repository_is_what_its_json_gives(study: ModuleType, tmp_path: Path) -> None:
    for name in ("nnunet.json", "nnunet.md"):
        shutil.copy(RESULTS / name, tmp_path)
    assert study.main(["--out", str(tmp_path), "--page", str(tmp_path)]) == 0
    for name in ("nnunet.json", "nnunet.md"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


def test_an_interval_is_of_the_mean_and_the_same_every_time(study: ModuleType) -> None:
    assert study.bootstrap([3.0]) == (3.0, 3.0, 3.0)
    values = list(np.random.default_rng(1).normal(80, 4, 400))
    mean, low, high = study.bootstrap(values)
    half = 1.96 * np.std(values) / 20
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1)
    assert study.bootstrap(values) == (mean, low, high)


def test_changes_are_paired_by_case(study: ModuleType) -> None:
    reference = row("float", {"a": 90.0, "b": 80.0}, {"a": 70.0})
    found = row("SS-QAT W4A6", {"b": 81.0, "a": 88.0}, {"a": 70.5, "b": 1.0})
    assert study.changes(found, reference, "front") == [1.0, -2.0]
    assert study.changes(found, reference, "back") == [0.5], "case b has no such class in the label"
    assert study.mean_changes(found, reference, ["front", "back"]) == [-0.75]


def test_a_table_has_change_size_and_steps(study: ModuleType) -> None:
    rows = [
        row("float", {"a": 90.0, "b": 80.0}, {"a": 70.0, "b": 60.0}, widths="", steps=100),
        row("float, trained on", {"a": 90.5, "b": 80.5}, {"a": 70.0, "b": 60.0}, widths=""),
        row("SS-QAT W4A6", {"a": 89.0, "b": 79.0}, {"a": 70.0, "b": 60.0}, widths="W4A6", bytes=1024),
    ]
    lines = study.table({"rows": rows})
    assert lines[2].startswith(
        "| float | 85.00 [80.00, 90.00] | 65.00 [60.00, 70.00] |  |  |  | 4 | 1 | 100 |"
    )
    assert lines[4].startswith(
        "| SS-QAT W4A6 | 84.00 [79.00, 89.00] | 65.00 [60.00, 70.00] | -1.00 [-1.00, -1.00] | "
    )
    assert lines[4].endswith(" +0.00 [+0.00, +0.00] | -0.75 [-0.75, -0.75] | 1 | 1/4.0 | 40 | 10 | 20 |")
    assert {len(line.split(" | ")) for line in lines if not line.startswith("|---")} == {11}
    said = study.verdict({"rows": rows})
    assert "-0.50 [-0.50, -0.50] to 'float': reached." in said
    assert said.endswith("-0.75 [-0.75, -0.75] to 'float, trained on': not reached.")
    assert study.verdict({"rows": rows[:1]}) == "" and study.contest({"rows": rows}) == ""
    plain = row("QAT W4A6", {"a": 90.0, "b": 80.0}, {"a": 70.0, "b": 60.0}, widths="W4A6")
    assert study.contest({"rows": [*rows, plain]}).endswith("W4A6 -0.50 [-0.50, -0.50].")


def test_dice_is_read_from_nnunets_summary(study: ModuleType) -> None:
    counts = {"TP": 6, "FP": 2, "FN": 2, "TN": 10}
    entry = {"prediction_file": "/x/em_16.png", "metrics": {"1": counts}}
    assert study.dice_of({"metric_per_case": [entry]}, "em") == {
        "cells": {"em_16": 75.0},
        "membranes": {"em_16": 83.333},
    }
    absent = dict.fromkeys(counts, 0)
    entry = {"prediction_file": "/x/h_1.nii.gz", "metrics": {"1": counts, "2": absent}}
    assert study.dice_of({"metric_per_case": [entry]}, "hippocampus") == {
        "anterior": {"h_1": 75.0},
        "posterior": {},
    }


def test_blocks_of_slices_do_not_touch(study: ModuleType) -> None:
    names = [f"em_{number:02d}" for number in range(24)]
    folds, _ = block_folds(names)
    for fold in folds:
        found = study.held_out({"train": fold.train, "val": fold.validation, "test": fold.test})
        trained, validated = ({names.index(name) for name in found[part]} for part in ("train", "val"))
        assert trained and validated and all(abs(a - b) > 1 for a in trained for b in validated)
    first = study.held_out({"train": folds[0].train, "val": folds[0].validation, "test": folds[0].test})
    assert first == {"train": names[:15], "val": names[16:]}


def test_plans_are_made_smaller(study: ModuleType) -> None:
    setting = study.PRESETS["cpu"]["hippocampus"]
    architecture: dict[str, Any] = {"arch_kwargs": {"n_stages": 4, "features_per_stage": [32, 64, 128, 256]}}
    plans: dict[str, Any] = {
        "plans_name": "nnUNetPlans",
        "configurations": {
            "3d_fullres": {"patch_size": [8] * 3, "batch_size": 9, "architecture": architecture}
        },
    }
    found = study.study_plans(plans, setting)
    configuration = found["configurations"]["3d_fullres"]
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == list(setting.features)
    assert configuration["batch_size"] == setting.batch_size and plans["plans_name"] == "nnUNetPlans"
    assert configuration["study"]["epochs"] == setting.epochs
    same = study.study_plans(plans, study.PRESETS["full"]["hippocampus"])["configurations"]["3d_fullres"]
    assert {key: same[key] for key in ("patch_size", "batch_size", "architecture")} == plans[
        "configurations"
    ]["3d_fullres"]
    architecture["arch_kwargs"]["n_stages"] = 3
    with pytest.raises(ValueError, match="3 resolutions"):
        study.study_plans(plans, setting)


@pytest.mark.parametrize(("widths", "weights"), [("W4A6", None), ("M4A6", ["weights=4bits"])])
def test_requests_are_written(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widths: str, weights: list[str] | None
) -> None:
    setting = study.PRESETS["cpu"]["em"]
    folder = tmp_path / setting.dataset
    folder.mkdir()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (folder / f"{study.PLANS}.json").write_text(json.dumps({"configurations": {"2d": {}}}))
    assert main(study.plan_words(widths, setting)[1:]) == 0
    section = json.loads((folder / f"{study.PLANS}{widths}.json").read_text())["configurations"]["2d"][
        "monai_unetq"
    ]
    assert section["activations"] == "int6" and section.get("budget") == weights
    assert section["base_plans"] == study.PLANS and section["base_trainer"] == study.FLOAT_TRAINER
    assert (section["epochs"], section["iterations"]) == (setting.epochs, setting.iterations)


def test_segmentations_are_compared_voxel_for_voxel(study: ModuleType, tmp_path: Path) -> None:
    array = np.zeros((4, 4), np.uint8)
    for number, name in enumerate(("one", "same", "other")):
        (tmp_path / name).mkdir()
        array[0, 0] = number == 2
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(tmp_path / name / "case.png"))
    assert study.same_files(tmp_path / "one", tmp_path / "same", ".png") == ""
    assert study.same_files(tmp_path / "one", tmp_path / "other", ".png") == "1 of 1 cases differ"
    assert study.same_files(tmp_path / "one", tmp_path, ".png") == "1 files beside 0"


def test_finished_rows_are_not_trained_again(study: ModuleType, tmp_path: Path) -> None:
    kept = row("QAT W4A4", {"a": 1.0}, {"a": 1.0})
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "qat-w4a4.json").write_text(json.dumps(kept))
    found = study.Study("em", tmp_path, study.PRESETS["cpu"]["em"])
    assert study.train(found, next(r for r in study.ROWS if r.name == "QAT W4A4")) == kept


def test_epochs_are_timed_over_all_logs(study: ModuleType, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"training_log_{number}.txt").write_text("Epoch time: 2.5 s\nother\nEpoch time: 1.0 s\n")
    assert study.epoch_seconds(tmp_path) == 7.0


def test_arguments(study: ModuleType, tmp_path: Path) -> None:
    options = study.parser().parse_args(["--out", str(tmp_path), "--rows", "SS-QAT W4A6", "--datasets", "em"])
    assert options.rows == ["SS-QAT W4A6"] and options.datasets == ["em"] and options.preset == "cpu"
    with pytest.raises(SystemExit):
        study.parser().parse_args(["--out", str(tmp_path), "--rows", "W4A6"])
