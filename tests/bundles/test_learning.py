"""Every bundle learns its phantom, in float and in fixed point, clearly better than any constant answer."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import run

from monai_unetq.datasets import data_list, write_phantom
from tests.bundles.test_bundles import ROOT, Kind, read

# Epochs of 20 steps in float, then half as many with rounding; width 8, crops of 64 pixels, at most a minute each on one core.
SETTINGS: dict[str, dict[str, Any]] = {
    "em": {"epochs": 6, "val_interval": 3, "batch_size": 4},
    "gm": {"epochs": 4, "val_interval": 2, "batch_size": 4},
    "nih": {"epochs": 6, "val_interval": 3, "batch_size": 4},
}
KEYS = {"em": "mean_dice", "gm": "grey_matter_dice", "nih": "pancreas_dice"}


def constant_dice(kind: str, cases: list[dict[str, str]]) -> float:
    """The better of "everything" and "nothing", in percent, by the bundle's key metric: a mean over cases."""
    fractions = np.array([float((read(Path(case["label"])) > 0).mean()) for case in cases])
    everything = 2 * fractions / (1 + fractions)
    if kind != "em":
        return 100 * float(everything.mean())  # nothing scores 0
    nothing = 2 * (1 - fractions) / (2 - fractions)
    return 50 * max(float(everything.mean()), float(nothing.mean()))  # the other class scores 0


@pytest.mark.parametrize("kind", ["em", "gm", "nih"])
def test_float_and_fixed_point_beat_every_constant_answer_by_ten(kind: Kind, tmp_path: Path) -> None:
    bundle = ROOT / "bundles" / f"{kind}_unet"
    dataset = write_phantom(kind, tmp_path / "raw", size=96)
    common: dict[str, Any] = {
        "bundle_root": str(bundle),
        "dataset_dir": str(dataset),
        "device": "cpu",
        "width": 8,
    }
    training = {**common, "patch_size": [64, 64], "steps_per_epoch": 20, **SETTINGS[kind]}
    training["train#calibration#sampler#num_samples"] = 16
    configs = bundle / "configs"
    run(config_file=str(configs / "train.yaml"), output_dir=str(tmp_path / "float"), **training)
    run(
        config_file=[str(configs / "train.yaml"), str(configs / "fixed_point.yaml")],
        output_dir=str(tmp_path / "fixed"),
        float_model=str(tmp_path / "float" / "model.pt"),
        **{**training, "epochs": training["epochs"] // 2},
    )
    constant = constant_dice(kind, data_list(dataset, 0, "test"))
    for model in (tmp_path / "float" / "model.pt", tmp_path / "fixed" / "model.unetq"):
        out = model.parent / "eval"
        run(config_file=str(configs / "evaluate.yaml"), model=str(model), output_dir=str(out), **common)
        with (out / "metrics.csv").open() as file:
            measured = {row[0]: 100 * float(row[1]) for row in csv.reader(file)}
        assert measured[KEYS[kind]] > constant + 10, (model, measured, constant)
