"""A trained nnU-Net folder as a module and as a MONAI bundle, where MONAI's own bridge does not fit nnunetv2 2.8.

The module is nnU-Net's predictor: its preprocessing, sliding window, mirroring and ensemble of folds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from ..files import write_json
from ..recipe import versions
from .install import external_folder

__all__ = ["TrainedFolder", "case_name", "cases", "write_bundle"]

CHECKPOINT = "checkpoint_final.pth"
VARIABLE = "nnUNet_extTrainer"
PLANES_APART = 999.0
"""Spacing of the axis that a 2D image does not have: more than any in the plane, as nnU-Net's readers have it."""

READERS = ("SimpleITKIO", "NibabelIO", "NaturalImage2DIO")
"""nnU-Net's readers whose arrays are those of MONAI's, axes reversed."""


class TrainedFolder(nn.Module):
    """nnU-Net's predictor of a trained folder, as a network for MONAI's inferers and bundles.

    The input is the image as MONAI loads it (``LoadImaged`` with ``ensure_channel_first``, no other transform): (N, C, X, Y)
    or (N, C, X, Y, Z), a ``MetaTensor`` where the voxels have a size. The output is the label map, uint8, (N, 1, X, Y[, Z]).
    nnU-Net preprocesses inside.

    Args:
        folder: of a trainer, with ``plans.json``, ``dataset.json`` and ``fold_0``, …; or the ``models`` of a bundle.
        folds: to be ensembled; all that are finished by default.
        checkpoint: file of each fold.
        mirroring: test-time augmentation, as nnU-Net has it.
        device: where to compute.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        NotImplementedError: for the second stage of a cascade, which needs the first one's segmentation, and for images
            that nnU-Net reads in a way of its own.
    """

    def __init__(
        self,
        folder: str | Path,
        folds: Sequence[int | str] | None = None,
        checkpoint: str = CHECKPOINT,
        mirroring: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        place = Path(folder)
        found = _folds(place, folds, checkpoint)
        predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False)
        with _trainers_known():
            predictor.initialize_from_trained_model_folder(str(place), found, checkpoint)
        if predictor.configuration_manager.previous_stage_name is not None:
            raise NotImplementedError(
                f"{place}: is the second stage of a cascade and needs the first one's segmentation; use nnUNetv2_predict"
            )
        reader = predictor.plans_manager.plans["image_reader_writer"]
        if reader not in READERS:
            raise NotImplementedError(
                f"{place}: reads images with {reader}, which MONAI does not do in the same way (expected one of "
                f"{', '.join(READERS)}); use nnUNetv2_predict"
            )
        if max(predictor.label_manager.all_labels) > 255:
            raise NotImplementedError(f"{place}: has labels above 255; use nnUNetv2_predict")
        self.network = predictor.network
        self.patch_size = tuple(map(int, predictor.configuration_manager.patch_size))
        self._predictor = (predictor,)  # in a tuple: it is no module
        self._checkpoint = place / f"fold_{found[0]}" / checkpoint

    def settings(self) -> dict[str, Any]:
        """What nnU-Net does to images before the network, and what its outputs mean; for JSON.

        Returns:
            ``configuration`` is that of the plans, whole, with what it inherits; ``nnunet_configuration`` its name. The
            others are of the plans and the data set.
        """
        predictor = self._predictor[0]
        plans, document = predictor.plans_manager, predictor.dataset_json
        configuration = predictor.configuration_manager.configuration
        whole = torch.load(self._checkpoint, map_location="cpu", weights_only=False, mmap=True)
        return {
            "nnunet_configuration": whole["init_args"]["configuration"],
            "configuration": configuration,
            "image_reader_writer": plans.plans["image_reader_writer"],
            "spacing": configuration["spacing"],
            "normalization_schemes": configuration["normalization_schemes"],
            "intensities": plans.foreground_intensity_properties_per_channel,
            "transpose_forward": plans.transpose_forward,
            "transpose_backward": plans.transpose_backward,
            "patch_size": list(self.patch_size),
            "channel_names": document.get("channel_names") or document["modality"],
            "labels": document["labels"],
            "regions_class_order": document.get("regions_class_order"),
        }

    def preprocess(self, files: Sequence[str | Path]) -> Tensor:
        """A case as nnU-Net gives it to the network, resampled and normalized.

        Args:
            files: one for each channel, in order.

        Returns:
            (C, spatial…), float32; of a volume for a network in 2D, its middle slice.
        """
        predictor = self._predictor[0]
        preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
        data, _, _ = preprocessor.run_case(
            [str(file) for file in files], None, predictor.plans_manager, predictor.configuration_manager,
            predictor.dataset_json,
        )  # fmt: skip
        found = torch.as_tensor(np.asarray(data), dtype=torch.float32)
        return found if found.dim() == len(self.patch_size) + 1 else found[:, found.shape[1] // 2]

    def forward(self, image: Tensor) -> Tensor:
        """The segmentation of each image of the batch; shapes as in the class."""
        predictor = self._predictor[0]
        found = []
        for number, one in enumerate(image):
            # SimpleITK's order of axes, which nnU-Net has, is the reverse of MONAI's.
            array = np.asarray(one.detach().cpu(), dtype=np.float32)
            array = array.transpose(0, *range(array.ndim - 1, 0, -1))
            flat = array.ndim == 3
            spacing = _spacing(image, number, array.ndim - 1)[::-1]
            labels = predictor.predict_single_npy_array(
                array[:, None] if flat else array, {"spacing": [PLANES_APART, *spacing] if flat else spacing}
            )
            labels = labels[0] if flat else labels
            found.append(torch.from_numpy(np.ascontiguousarray(labels.T, dtype=np.uint8)))
        result = torch.stack(found)[:, None].to(image.device)
        return MetaTensor(result, meta=image.meta) if isinstance(image, MetaTensor) else result


def cases(images: str | Path | Sequence[str | Path], ending: str) -> list[dict[str, Any]]:
    """nnU-Net's input files, grouped: one entry for each case, with its channels in order.

    Args:
        images: a folder of ``CASE_0000.ending``, ``CASE_0001.ending``, …, or such files.
        ending: with the dot.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file's name has no channel.
    """
    files = (
        sorted(Path(images).glob(f"*{ending}"))
        if isinstance(images, (str, Path)) and Path(images).is_dir()
        else [Path(f) for f in ([images] if isinstance(images, (str, Path)) else images)]
    )
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(
            f"{missing[0] if missing else images}: found no image, expected CASE_0000{ending}"
        )
    grouped: dict[str, list[str]] = {}
    for file in sorted(files):
        name, _, channel = file.name.removesuffix(ending).rpartition("_")
        if not name or len(channel) != 4 or not channel.isdecimal():
            raise ValueError(f"{file}: expected a name such as CASE_0000{ending}, its channel at the end")
        grouped.setdefault(str(file.parent / name), []).append(str(file))
    return [{"image": channels} for channels in grouped.values()]


def case_name(meta: Mapping[str, Any], transform: Any) -> dict[str, Any]:
    """What ``SaveImage`` calls a segmentation (``output_name_formatter``): the case's name, without the channel."""
    name = Path(str(meta["filename_or_obj"])).name
    return {"subject": re.sub(r"_\d{4}\.[^_]*$", "", name), "idx": None}


_READ = ("network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes")
"""What nnU-Net's predictor reads of a checkpoint; the rest is for training."""


def write_bundle(folder: Path, out: Path, folds: Sequence[int | str] | None = None) -> Path:
    """Write a trained folder as a MONAI bundle, that ``python -m monai.bundle run`` infers with.

    Args:
        folder: of a trainer.
        out: the bundle's folder; new or empty.
        folds: all that are finished by default.

    Returns:
        the bundle's folder.

    Raises:
        FileNotFoundError: if the trained folder lacks a file.
        FileExistsError: if the bundle's folder holds something.
    """
    folder = folder.resolve()
    found = _folds(folder, folds, CHECKPOINT)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty folder; give another --out, or remove it")
    document = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    scratch.chmod(0o755)
    try:
        for part in ("configs", "models", "docs"):
            (scratch / part).mkdir()
        for name in ("plans.json", "dataset.json"):
            shutil.copyfile(folder / name, scratch / "models" / name)
        for fold in found:
            (scratch / "models" / f"fold_{fold}").mkdir()
            whole = torch.load(folder / f"fold_{fold}" / CHECKPOINT, map_location="cpu", weights_only=False)
            torch.save({key: whole[key] for key in _READ}, scratch / "models" / f"fold_{fold}" / CHECKPOINT)
        settings = _INFERENCE.replace("ENDING", document["file_ending"])
        (scratch / "configs" / "inference.yaml").write_text(settings, encoding="utf-8")
        write_json(scratch / "configs" / "metadata.json", _metadata(folder, document))
        (scratch / "docs" / "README.md").write_text(_README.replace("NAME", folder.name), encoding="utf-8")
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _folds(folder: Path, folds: Sequence[int | str] | None, checkpoint: str) -> list[int | str]:
    """The folds that are asked for, checked; or all that are finished."""
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file, expected the folder of a trainer, TRAINER__PLANS__CONFIGURATION"
            )
    if folds is None:
        finished = sorted(
            file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}")
        )
        if not finished:
            raise FileNotFoundError(f"{folder}: found no fold with a {checkpoint}, expected at least one")
        numbered = [int(fold) for fold in finished if fold.isdecimal()]
        return [*numbered] or [*finished]  # as nnU-Net does: "all" is no fold to ensemble with others
    for fold in folds:
        if not (folder / f"fold_{fold}" / checkpoint).is_file():
            raise FileNotFoundError(
                f"{folder / f'fold_{fold}' / checkpoint}: no such file; is the fold finished?"
            )
    return list(folds)


@contextmanager
def _trainers_known() -> Iterator[None]:
    """Within it, nnU-Net finds the trainers, whether or not its variable is set."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = os.pathsep.join(filter(None, [before, str(external_folder())]))
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _spacing(image: Tensor, number: int, dimensions: int) -> list[float]:
    """Voxel size along each axis of an image, in MONAI's order; 1 where it says nothing."""
    affine = getattr(image, "affine", None)
    if affine is None:
        return [1.0] * dimensions
    matrix = affine[number] if affine.ndim == 3 else affine
    return [float(matrix[:-1, axis].norm()) for axis in range(dimensions)]


def _metadata(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    channels = {str(k): str(v) for k, v in document.get("channel_names", {"0": "image"}).items()}
    labels = document["labels"]
    plans = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    dimensions = 2 if plans["image_reader_writer"] == "NaturalImage2DIO" else 3
    installed = versions("nnunetv2")
    shared = {"type": "image", "spatial_shape": ["*"] * dimensions, "is_patch_data": False}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": "written from a trained nnU-Net folder"},
        "monai_version": installed["monai"],
        "pytorch_version": installed["torch"],
        "numpy_version": installed["numpy"],
        "required_packages_version": {"monai-unetq": installed["monai-unetq"], "nnunetv2": installed["nnunetv2"]},
        "supported_apps": {},
        "name": folder.name,
        "task": "Segmentation with nnU-Net",
        "description": f"nnU-Net as trained in {folder.name}, run by its own predictor.",
        "authors": "",
        "copyright": "",
        "network_data_format": {
            "inputs": {
                "image": {
                    **shared, "format": "magnitude", "modality": "any", "num_channels": len(channels),
                    "dtype": "float32", "value_range": [], "channel_def": channels,
                }
            },
            "outputs": {
                "pred": {
                    **shared, "format": "segmentation", "num_channels": 1, "dtype": "uint8", "value_range": [],
                    "channel_def": {"0": ", ".join(labels)},
                }
            },
        },
    }  # fmt: skip


_INFERENCE = """\
# nnU-Net's predictor as a network: writes a segmentation of every case of --images, in the images' own geometry.
imports:
- $import torch
- $from monai_unetq.nnunet.inference import case_name
- $from monai_unetq.nnunet.inference import cases
bundle_root: .
images: images  # a folder of CASE_0000ENDING, CASE_0001ENDING, …, or a list of such files
output_dir: "$@bundle_root + '/predictions'"
folds:  # to be ensembled; all of the bundle by default
mirroring: true
device: "$'cuda' if torch.cuda.is_available() else 'cpu'"

network_def:
  _target_: monai_unetq.nnunet.inference.TrainedFolder
  folder: "$@bundle_root + '/models'"
  folds: "@folds"
  mirroring: "@mirroring"
  device: "@device"
network: "$@network_def.to(@device)"

preprocessing:
  _target_: LoadImaged
  keys: image
  ensure_channel_first: true
dataset:
  _target_: Dataset
  data: "$cases(@images, 'ENDING')"
  transform: "@preprocessing"
dataloader:
  _target_: DataLoader
  dataset: "@dataset"
  batch_size: 1
inferer:
  _target_: SimpleInferer
postprocessing:
  _target_: SaveImaged
  keys: pred
  output_dir: "@output_dir"
  output_postfix: ""
  output_ext: ENDING
  output_dtype: $torch.uint8
  output_name_formatter: $case_name
  resample: false
  separate_folder: false
evaluator:
  _target_: SupervisedEvaluator
  device: "@device"
  val_data_loader: "@dataloader"
  network: "@network"
  inferer: "@inferer"
  postprocessing: "@postprocessing"
  amp: false

run:
- "$@evaluator.run()"
"""

_README = """\
# NAME

A trained nnU-Net as a MONAI bundle:

```
pip install "monai-unetq[nnunet,bundle]"
python -m monai.bundle run --config_file BUNDLE/configs/inference.yaml --bundle_root BUNDLE --images FOLDER
```

FOLDER holds images as nnU-Net names them. The network is nnU-Net's predictor, which preprocesses, predicts in sliding windows
and ensembles the folds.
"""
