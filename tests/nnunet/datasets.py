"""Two small data sets in nnU-Net's layout, planned and preprocessed by nnU-Net, with networks of a few channels.

``FLAT``: 2D, a disc, plain U-Net. ``REGIONS``: 3D, two nested regions and an ignore label, residual U-Net.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.dummy
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

__all__ = ["FLAT", "REGIONS", "command", "environment", "load", "pools_of_threads", "prepare"]

FLAT, REGIONS = "Dataset901_Flat", "Dataset902_Regions"
CASES = 10


def environment(base: Path) -> dict[str, str]:
    """nnU-Net's folders below one folder, and as few processes as it can do with."""
    return {
        "nnUNet_raw": str(base / "raw"),
        "nnUNet_preprocessed": str(base / "preprocessed"),
        "nnUNet_results": str(base / "results"),
        "nnUNet_def_n_proc": "1",
        "nnUNet_n_proc_DA": "0",
        "nnUNet_extTrainer": str(Path(__file__).parents[2] / "monai_unetq" / "nnunet" / "external"),
    }


def command(base: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run one of nnU-Net's commands, or ``unetq``, from this environment; its output is in ``stdout``."""
    program = Path(sys.executable).parent / words[0]
    return subprocess.run(
        [str(program), *words[1:]],
        env={**os.environ, **environment(base), **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


@contextmanager
def pools_of_threads() -> Iterator[None]:
    """nnU-Net's pools, called in this process, of threads: each process of theirs would import all packages again, 10 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: multiprocessing.dummy)
        yield


def load(base: Path, dataset: str, plans: str = "nnUNetPlans") -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans and dataset.json, as nnU-Net hands them to a trainer."""
    folder = base / "preprocessed" / dataset
    found = json.loads((folder / f"{plans}.json").read_text())
    return {**found, "continue_training": False}, json.loads((folder / "dataset.json").read_text())


def prepare(base: Path) -> None:
    """Draw both data sets, plan and preprocess them, and make the planned networks small."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    (base / "results").mkdir(parents=True)
    random = np.random.default_rng(0)
    _write(base, FLAT, (32, 32), {"background": 0, "disc": 1}, {}, random)
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    _write(base, REGIONS, (16, 16, 16), labels, {"regions_class_order": [1, 2]}, random)
    with pytest.MonkeyPatch.context() as patch, pools_of_threads():
        for key, value in {**environment(base), "nnUNet_n_proc_DA": "1"}.items():  # planners count on one
            patch.setenv(key, value)
        for number, planner, configuration in (
            (901, "ExperimentPlanner", "2d"), (902, "nnUNetPlannerResEncM", "3d_fullres"),
        ):  # fmt: skip
            extract_fingerprints([number], num_processes=1, show_progress_bar=False)
            name = plan_experiments([number], planner)
            preprocess([number], name, [configuration], num_processes=[1], show_progress_bar=False)
            folder = base / "preprocessed" / (FLAT if number == 901 else REGIONS)
            _shrink(folder / f"{name}.json", configuration)


def _shrink(file: Path, configuration: str) -> None:
    plans = json.loads(file.read_text())
    found = plans["configurations"][configuration]
    options = found["architecture"]["arch_kwargs"]
    options["features_per_stage"] = [4] * options["n_stages"]
    for key in ("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
        if key in options:
            options[key] = [1] * len(options[key])
    found["batch_size"] = 2
    file.write_text(json.dumps(plans))


def _write(
    base: Path,
    name: str,
    shape: tuple[int, ...],
    labels: Mapping[str, Any],
    more: Mapping[str, Any],
    random: np.random.Generator,
) -> None:
    folder = base / "raw" / name
    ending = ".nii.gz" if len(shape) == 3 else ".png"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(CASES):
        center = random.uniform(0.35, 0.65, len(shape)) * shape
        axes = np.indices(shape) - center.reshape(-1, *[1] * len(shape))
        distance = np.sqrt((axes**2).sum(0))
        radius = random.uniform(0.25, 0.35) * shape[0]
        label = (distance < radius).astype(np.uint8)
        if "ignore" in labels:
            label[distance < radius / 2] = 2
            label[..., :2] = 3
        image = 60 * (label > 0) + 60 * (label == 2) + random.normal(60, 12, shape)
        case = f"case_{number:02d}"
        for array, path in (
            (image.clip(0, 255).astype(np.uint8), folder / "imagesTr" / f"{case}_0000{ending}"),
            (label, folder / "labelsTr" / f"{case}{ending}"),
        ):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))
    document = {
        "channel_names": {"0": "drawn"},
        "labels": labels,
        "numTraining": CASES,
        "file_ending": ending,
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(document))
