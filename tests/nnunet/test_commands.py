"""nnU-Net's own commands with the trainers: planned, trained, killed, continued, predicted, exported, installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monai_unetq.cli import main
from monai_unetq.surgery import plan_of_state
from tests.nnunet.datasets import FLAT, REGIONS, command, environment

SSQAT = ("-tr", "nnUNetTrainerSSQAT", "-p", "Mixed")
SHORT = ("--float-epochs", "1", "--iterations", "2", "--val-iterations", "1", "--calibration-batches", "2")


@pytest.fixture(scope="module")
def base(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folders, copied: plans are written here."""
    copied = tmp_path_factory.mktemp("commands") / "base"
    shutil.copytree(prepared, copied)
    for words in (
        ("-d", "901", "-c", "2d", "--budget", "weights=4.0bits", "--activations", "int6", "--norms", "int8", "-o", "Mixed",
         "--epochs", "1"),
        ("-d", "901", "-c", "2d", "--weights", "int4", "--activations", "int6", "-o", "Uniform", "--epochs", "1"),
        ("-d", "902", "-c", "3d_fullres", "-p", "nnUNetResEncUNetMPlans", "--weights", "Q1.7", "--activations", "Q4.4",
         "-o", "Fixed", "--epochs", "1"),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:  # in this process: each import of torch takes seconds
            patch.setenv("nnUNet_preprocessed", environment(copied)["nnUNet_preprocessed"])
            assert main(["nnunet", "plan", *words, *SHORT]) == 0
    return copied


@pytest.fixture(scope="module")
def trained(base: Path) -> Iterator[Path]:
    """The folder of two trained folds, of which the first was killed in its quantized phase and continued."""
    words = ("nnUNetv2_train", "901", "2d", "0", *SSQAT, "-device", "cpu")
    folder = base / "results" / FLAT / "nnUNetTrainerSSQAT__Mixed__2d"
    killed = subprocess.Popen(
        [str(Path(sys.executable).parent / words[0]), *words[1:]],
        env={**os.environ, **environment(base)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    latest, deadline = folder / "fold_0" / "checkpoint_latest.pth", time.monotonic() + 300
    try:
        while not (latest.exists() and _phase(latest) == "quantized"):
            assert killed.poll() is None and time.monotonic() < deadline, "no quantized checkpoint"
            time.sleep(0.1)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (folder / "fold_0" / "checkpoint_final.pth").exists()
    for more in (("--c", "--npz"), ("--npz",)):
        fold = "0" if "--c" in more else "1"
        done = command(base, *words[:3], fold, *words[4:], *more)
        assert done.returncode == 0, done.stdout
        assert "Validation complete" in done.stdout
    log = sorted((folder / "fold_0").glob("training_log_*.txt"))[-1].read_text()
    assert "Epoch 1" in log and "Epoch 0" not in log
    yield folder


def _phase(file: Path) -> str:
    return str(torch.load(file, weights_only=False)["monai_unetq"]["phase"])


def _images(base: Path, folder: Path, fold: int, out: Path) -> list[str]:
    """Copy the images of a fold's validation cases; their names."""
    names = sorted(file.stem for file in (folder / f"fold_{fold}" / "validation").glob("*.png"))
    out.mkdir()
    for name in names:
        shutil.copy(base / "raw" / FLAT / "imagesTr" / f"{name}_0000.png", out)
    return names


def test_predictions_are_those_of_the_trainers_validation(base: Path, trained: Path, tmp_path: Path) -> None:
    names = _images(base, trained, 0, tmp_path / "in")
    done = command(
        base, "nnUNetv2_predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-d", "901", "-c", "2d",
        "-f", "0", *SSQAT, "-device", "cpu", "-npp", "1", "-nps", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert names
    for name in names:
        expected, found = (
            np.asarray(Image.open(place / f"{name}.png"))
            for place in (trained / "fold_0" / "validation", tmp_path / "out")
        )
        assert np.array_equal(expected, found)
    done = command(
        base, "nnUNetv2_evaluate_folder", str(base / "raw" / FLAT / "labelsTr"), str(tmp_path / "out"),
        "-djfile", str(trained / "dataset.json"), "-pfile", str(trained / "plans.json"), "-np", "1", "--chill",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found, expected = (
        json.loads((place / "summary.json").read_text())["mean"]
        for place in (tmp_path / "out", trained / "fold_0" / "validation")
    )
    assert found == expected


def test_a_bundle_of_the_folder_predicts_the_same(
    base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    assert main(["nnunet", "bundle", str(trained), "--out", str(bundle), "-f", "0"]) == 0
    assert f"--bundle_root {bundle}" in capsys.readouterr().out
    names = _images(base, trained, 0, tmp_path / "in")
    done = command(
        base, "python", "-m", "monai.bundle", "run", "--config_file", str(bundle / "configs" / "inference.yaml"),
        "--bundle_root", str(bundle), "--images", str(tmp_path / "in"), nnUNet_extTrainer="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for name in names:
        found = np.asarray(Image.open(bundle / "predictions" / f"{name}.png"))
        assert np.array_equal(
            found, np.asarray(Image.open(trained / "fold_0" / "validation" / f"{name}.png"))
        )


def test_an_exported_model_is_installed_and_its_folds_are_ensembled(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    archive, other = tmp_path / "model.zip", {"nnUNet_results": str(tmp_path / "elsewhere")}
    (tmp_path / "elsewhere").mkdir()
    for words, changes in (
        (
            (
                "nnUNetv2_export_model_to_zip",
                "-d",
                "901",
                "-o",
                str(archive),
                "-c",
                "2d",
                "-f",
                "0",
                "1",
                *SSQAT,
            ),
            {},
        ),
        (("nnUNetv2_install_pretrained_model_from_zip", str(archive)), other),
    ):
        done = command(base, *words, **changes)
        assert done.returncode == 0, done.stdout
    _images(base, trained, 0, tmp_path / "in")
    done = command(
        base, "nnUNetv2_predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-d", "901", "-c", "2d",
        "-f", "0", "1", *SSQAT, "-device", "cpu", "-npp", "0", "-nps", "0", "--save_probabilities", **other,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    plans = [
        plan_of_state(
            torch.load(trained / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)[
                "network_weights"
            ]
        )
        for fold in (0, 1)
    ]
    assert None not in plans
    for file in sorted((tmp_path / "out").glob("*.npz")):  # of a case that fold 1 has trained on
        found, first = (
            np.load(place / file.name)["probabilities"]
            for place in (tmp_path / "out", trained / "fold_0" / "validation")
        )
        assert found.shape == first.shape and not np.allclose(found, first, atol=1e-3)
    assert len(list((tmp_path / "out").glob("*.npz"))) == len(list((tmp_path / "in").iterdir()))


def test_a_residual_3d_network_in_fixed_point(base: Path, tmp_path: Path) -> None:
    done = command(
        base, "nnUNetv2_train", "902", "3d_fullres", "0", "-tr", "nnUNetTrainerFixedPoint", "-p", "Fixed", "-device", "cpu"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    fold = base / "results" / REGIONS / "nnUNetTrainerFixedPoint__Fixed__3d_fullres" / "fold_0"
    assert (fold / "validation" / "summary.json").exists() and (fold / "model.unetq").exists()
    for which in ("best", "final"):
        weights = torch.load(fold / f"checkpoint_{which}.pth", weights_only=False)["network_weights"]
        assert plan_of_state(weights) is not None
    size = ("--size", "16", "16", "16")
    assert (
        main(["export", str(fold.parent), "--to", "integer", "--out", str(tmp_path / "integer"), *size]) == 0
    )
    assert main(["verify", str(tmp_path / "integer")]) == 0


def test_plain_quantization_aware_training(base: Path) -> None:
    done = command(
        base, "nnUNetv2_train", "901", "2d", "0", "-tr", "nnUNetTrainerQAT", "-p", "Uniform", "-device", "cpu"
    )
    assert done.returncode == 0, done.stdout
    fold = base / "results" / FLAT / "nnUNetTrainerQAT__Uniform__2d" / "fold_0"
    weights = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    plan = plan_of_state(weights)
    assert plan is not None and all(len(layer.weights) == 1 for layer in plan.layers.values())
    assert (fold / "validation" / "summary.json").exists() and (fold / "model.unetq").exists()
