"""What an exported network's images go through: MONAI's steps against MONAI's own, nnU-Net's by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from monai.transforms import Compose, LoadImaged, NormalizeIntensityd, Orientationd, Spacingd
from PIL import Image

from monai_unetq.runtime.images import run_images
from monai_unetq.runtime.preprocessing import preprocessor

CT: list[dict[str, Any]] = [
    {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 255, "b_min": 0.0, "b_max": 1.0, "clip": True},
    {"_target_": "EnsureTyped", "keys": "image"},
]  # fmt: skip


@pytest.fixture
def volume(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A volume of 4 slices of 5 rows and 6 columns, (z, y, x); x and y of the file point away from RAS."""
    values = np.random.default_rng(0).integers(-200, 400, (4, 5, 6)).astype(np.int16)
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing((1.5, 1.5, 3.0))
    SimpleITK.WriteImage(image, str(tmp_path / "a.nii.gz"))
    return tmp_path / "a.nii.gz", values


def test_a_window_and_an_orientation(volume: tuple[Path, np.ndarray]) -> None:
    file, values = volume
    # SimpleITK's axes are LPS: RAS turns x and y around.
    expected = np.clip(values.transpose(2, 1, 0)[::-1, ::-1] / 255, 0, 1)
    found = preprocessor({"monai_transforms": {"_target_": "Compose", "transforms": CT}}, 3)([file])
    assert found.dtype == np.float32 and found.shape == (1, 1, 6, 5, 4)
    assert found[0, 0] == pytest.approx(expected)
    slices = preprocessor({"monai_transforms": CT}, 2)([file])
    assert slices.shape == (4, 1, 6, 5) and slices[2, 0] == pytest.approx(expected[..., 2])


def test_spacing_and_normalization_are_monais(volume: tuple[Path, np.ndarray]) -> None:
    file, _ = volume
    steps = [
        *CT[:2],
        {"_target_": "monai.transforms.Spacingd", "keys": ["image"], "pixdim": [1.0, 1.0, -1.0], "mode": "bilinear"},
        {"_target_": "NormalizeIntensityd", "keys": "image"},
    ]  # fmt: skip
    compose = Compose(
        [
            LoadImaged("image", ensure_channel_first=True),
            Orientationd("image", "RAS", labels=None),
            Spacingd("image", (1.0, 1.0, -1.0), mode="bilinear"),
            NormalizeIntensityd("image"),
        ]
    )
    expected = np.asarray(compose({"image": str(file)})["image"])
    found = preprocessor({"monai_transforms": steps}, 3)([file])
    assert found.shape[2:] == (8, 7, 4) and np.array_equal(found[0], expected)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"_target_": "SaveImaged", "keys": "image"}, "step 1 of the preprocessing is SaveImaged, expected"),
        ({"_target_": "os.system", "command": "true"}, r"step 1 .* is os\.system"),
        (
            {"_target_": "LoadImaged", "keys": "image", "reader": "os.system"},
            r"LoadImaged\(reader='os.system'\)",
        ),
        ({"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": "$1 + 1"}, r"a_min='\$1 \+ 1'"),
        ({"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": ["@window"]}, r"a_min=\['@window'\]"),
        ({"_target_": "NormalizeIntensityd", "keys": "label"}, "is NormalizeIntensityd"),
        ("LoadImaged", "is 'LoadImaged'"),
    ],
)
def test_a_step_that_is_not_in_the_table_is_refused(step: Any, message: str, tmp_path: Path) -> None:
    """Before any file is read: there is none."""
    with pytest.raises(ValueError, match=message):
        preprocessor({"monai_transforms": [CT[0], step]}, 2)([tmp_path / "none.png"])


def test_other_documents_and_images_are_refused(volume: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    file, _ = volume
    with pytest.raises(ValueError, match=r"has the keys \['spacing'\], expected 'monai_transforms'"):
        preprocessor({"spacing": [1, 1, 1]}, 3)([file])
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.nii\.gz: the preprocessing step LoadImaged fails on it"):
        preprocessor({"monai_transforms": CT}, 3)([tmp_path / "broken.nii.gz"])
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(tmp_path / "slice.png")
    with pytest.raises(
        ValueError, match=r"slice\.png: has 2 dimensions behind its preprocessing, expected 3"
    ):
        preprocessor({"monai_transforms": CT[:1]}, 3)([tmp_path / "slice.png"])


def test_nnunets_normalization_by_hand(volume: tuple[Path, np.ndarray]) -> None:
    file, values = volume
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "preprocessor_name": "DefaultPreprocessor", "spacing": [3.0, 1.5, 1.5], "architecture": {},
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
    }  # fmt: skip
    settings = {
        "configuration": configuration, "image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2], "channel_names": {"0": "CT"}, "labels": {"background": 0, "pancreas": 1},
        "intensities": {"0": {"mean": 40.0, "std": 50.0, "percentile_00_5": -100.0, "percentile_99_5": 240.0}},
    }  # fmt: skip
    expected = (np.clip(values, -100, 240) - 40) / 50
    found = preprocessor(settings, 3)([file])
    assert found.shape == (1, 1, 4, 5, 6) and found[0, 0] == pytest.approx(expected, abs=1e-5)
    slices = preprocessor(settings, 2)([file])
    assert slices.shape == (4, 1, 5, 6) and slices[:, 0] == pytest.approx(expected, abs=1e-5)
    file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.nii\.gz: nnU-Net's preprocessing fails on it"):
        preprocessor(settings, 3)([file])


def test_images_of_an_export_go_through_its_steps(
    monkeypatch: pytest.MonkeyPatch, volume: tuple[Path, np.ndarray]
) -> None:
    """Files of images do; NPY files are taken as preprocessed."""
    from monai_unetq.runtime import images

    file, values = volume
    window = np.clip(values.transpose(0, 2, 1)[:, ::-1, ::-1] / 255, 0, 1)
    np.save(file.parent / "b.npy", window.astype(np.float32))
    steps = {"monai_transforms": CT}
    document = {"image": [1, 1, 32, 32], "target": "integer", "preprocessing": steps}
    monkeypatch.setattr(images, "read_export", lambda folder: document)
    read: list[np.ndarray] = []

    def engine(image: np.ndarray) -> np.ndarray:
        read.append(image[:, :, :6, :5])
        return image - 0.5

    monkeypatch.setattr(images, "load", lambda folder: engine)
    assert [one["image"] for one in run_images(file.parent, file.parent)] == ["a.nii.gz", "b.npy"]
    assert len(read) == 8 and np.concatenate(read[:4])[:, 0] == pytest.approx(window)
    assert np.array_equal(np.concatenate(read[4:]), np.concatenate(read[:4]))
