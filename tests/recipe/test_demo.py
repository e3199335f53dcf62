"""The demo's whole way on a small stack: what it leaves, what it reuses, and that bad input leaves nothing."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from monai_unetq import recipe
from monai_unetq.datasets import membrane_phantom
from monai_unetq.deploy import inspect_packed, unpack
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.training import History, predict, train

SMALL: dict[str, Any] = {"width": 4, "steps": 12, "qat_steps": 10}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slices of 52 × 60 pixels: no size is divisible by 8."""
    folder = tmp_path_factory.mktemp("stack")
    for part in ("image", "label"):
        (folder / part).mkdir()
    for case in membrane_phantom(count=6, size=60, seed=2):
        Image.fromarray((case.image[0, :52] * 255).round().astype(np.uint8)).save(
            folder / f"image/{case.name}.png"
        )
        Image.fromarray(case.label[0, :52] * np.uint8(255)).save(folder / f"label/{case.name}.png")
    return folder


@pytest.fixture(scope="module")
def done(stack: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("results") / "demo"
    return out, recipe.demo(stack, out, **SMALL)


def test_demo_leaves_report_figures_results_model_and_plan(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (out / "report.html").read_text().startswith("<!")
    assert {p.name for p in (out / "figures").iterdir()} == {
        "segmentation.png",
        "training.png",
        "weights.png",
        "size.png",
    }
    assert [row["name"] for row in results["rows"]] == ["float", "Q6.0/Q0.4"]
    assert not list(out.rglob("*.part"))
    plan = QuantPlan.load(out / "plan.json")
    assert str(plan["encoder.1.conv1"].weight) == "Q0.4"
    assert str(plan["encoder.1.conv1"].input) == "UQ6.0"  # after ReLU, so unsigned


def test_what_is_reported_is_what_the_file_computes(stack: Path, done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    data = recipe.Data.em(stack)
    network = unpack(out / "model.unetq", FixedPointUNet(1, 1, width=4))
    test = data.part(data.split.test)
    metrics, _ = recipe.evaluate(network, test)
    assert metrics == results["rows"][1]["metrics"]
    assert set(metrics["dice"]["values"]) == set(data.split.test)
    assert predict(network, test[0].image).shape == test[0].label.shape
    held = inspect_packed(out / "model.unetq")
    assert all(layer["codes"] <= 16 for layer in held["layers"] if layer["weight"] == "Q0.4")
    assert results["layers"] == held["layers"]


def test_the_float_stage_is_reused_by_another_format(
    stack: Path, done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = done
    trained = []

    def watched(*arguments: Any) -> History:
        trained.append(arguments[5])
        return train(*arguments)

    # The function `demo` of the package hides its module of the same name.
    monkeypatch.setattr(importlib.import_module("monai_unetq.recipe.demo"), "train", watched)
    again = recipe.demo(stack, out, **SMALL)
    assert trained == []
    assert again["rows"] == results["rows"]
    other = recipe.demo(stack, out, weights="int4", activations="int6", **SMALL)
    assert trained == ["int6/int4"]
    assert other["rows"][0] == results["rows"][0]
    restored = recipe.demo(stack, out, **SMALL)  # leaves the module's folder as it was
    assert trained == ["int6/int4", "Q6.0/Q0.4"]
    assert restored["rows"] == results["rows"]


def test_a_damaged_stage_is_made_again(stack: Path, done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    packed = out / "stages" / "quantized" / "model.unetq"
    packed.write_bytes(packed.read_bytes()[:-7])
    assert recipe.demo(stack, out, **SMALL)["rows"] == results["rows"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "label/01.png").unlink(), "01"),
        (lambda folder: (folder / "image/02.png").write_bytes(b"nothing"), r"02\.png"),
    ],
)
def test_bad_data_leaves_nothing(stack: Path, tmp_path: Path, damage: Any, message: str) -> None:
    copy = tmp_path / "copy"
    for path in stack.rglob("*.png"):
        target = copy / path.relative_to(stack)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    damage(copy)
    with pytest.raises((ValueError, OSError), match=message):
        recipe.demo(copy, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_bad_arguments_leave_nothing(stack: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a number format"):
        recipe.demo(stack, tmp_path / "out", weights="Q4", **SMALL)
    with pytest.raises(OSError, match="missing"):
        recipe.demo(tmp_path / "missing", tmp_path / "out", **SMALL)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            recipe.demo(stack, tmp_path / "out", device="cuda", **SMALL)
    assert not (tmp_path / "out").exists()


def _command(stack: Path, out: Path, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "monai_unetq.cli", "demo", "--data", str(stack), "--out", str(out),
        "--width", "4", "--steps", str(steps), "--qat-steps", "10",
    ]  # fmt: skip


def test_the_command_can_be_interrupted_and_goes_on(stack: Path, tmp_path: Path) -> None:
    steps = 150
    out, undisturbed = tmp_path / "interrupted", tmp_path / "undisturbed"
    checkpoint = out / "stages" / "float" / "checkpoint.pt"
    process = subprocess.Popen(
        _command(stack, out, steps),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so do its children: tests may run there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command resumes the run" in errors
    assert not (out / "results.json").exists()

    again = subprocess.run(_command(stack, out, steps), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Q6.0/Q0.4" in again.stdout
    assert "report.html" in again.stdout
    assert "50/150" in again.stderr or "100/150" in again.stderr  # it began where it was
    recipe.demo(stack, undisturbed, width=4, steps=steps, qat_steps=10)
    rows = [json.loads((o / "results.json").read_text())["rows"] for o in (out, undisturbed)]
    assert rows[0] == rows[1]
    assert (out / "model.unetq").read_bytes() == (undisturbed / "model.unetq").read_bytes()


def test_a_missing_folder_is_one_line_and_no_output(tmp_path: Path) -> None:
    run = subprocess.run(_command(tmp_path / "none", tmp_path / "out", 10), capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("unetq: error:")
    assert str(tmp_path / "none") in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_real_slices_if_there(em_folder: Path) -> None:
    data = recipe.Data.em(em_folder)
    assert data.split.train[0] == data.cases[0].name
    assert {case.image.shape for case in data.cases} == {(1, 512, 512)}
    assert 0.7 < float(np.mean([case.label.mean() for case in data.cases])) < 0.85
