from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from monai.bundle import verify_metadata
from monai.data import MetaTensor
from monai.transforms import LoadImage
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from monai_unetq.cli import main
from monai_unetq.nnunet import inference
from monai_unetq.nnunet.inference import TrainedFolder, case_name, cases, write_bundle
from monai_unetq.nnunet.trainer import nnUNetTrainerQAT
from monai_unetq.runtime.preprocessing import preprocessor
from tests.bundles.schema import SCHEMA
from tests.nnunet.datasets import REGIONS, load


@pytest.fixture
def folder(folders: Path) -> Path:
    """A trained folder of a 3D network, its one fold untrained but quantized."""
    plans, document = load(folders, REGIONS, "nnUNetResEncUNetMPlans")
    section = {
        "weights": "int6",
        "activations": "int8",
        "float_epochs": 1,
        "epochs": 1,
        "calibration_batches": 1,
    }
    plans["configurations"]["3d_fullres"]["monai_unetq"] = section
    torch.manual_seed(1)  # of the untrained weights: they are to predict more than one label
    trainer = nnUNetTrainerQAT(plans, "3d_fullres", 0, document, torch.device("cpu"))
    trainer.on_train_start()
    trainer.current_epoch = 1
    trainer.on_epoch_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    return Path(trainer.output_folder_base)


def test_the_module_predicts_what_nnunet_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = SimpleITK.GetImageFromArray(
        np.random.default_rng(0).normal(60, 30, (10, 18, 24)).astype(np.float32)
    )
    image.SetSpacing((1.0, 1.5, 2.0))
    SimpleITK.WriteImage(image, str(tmp_path / "one_0000.nii.gz"))
    monkeypatch.delenv("nnUNet_extTrainer")  # the module makes the trainers known itself
    module = TrainedFolder(folder)
    loaded = LoadImage(image_only=True, ensure_channel_first=True)(str(tmp_path / "one_0000.nii.gz"))
    found = module(loaded[None])
    assert isinstance(found, MetaTensor) and found.dtype == torch.uint8 and found.shape == (1, 1, 24, 18, 10)
    assert torch.equal(found.affine, loaded[None].affine)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    with inference._trainers_known():
        predictor.initialize_from_trained_model_folder(str(folder), [0], "checkpoint_final.pth")
    array, properties = SimpleITKIO().read_images([str(tmp_path / "one_0000.nii.gz")])
    expected = predictor.predict_single_npy_array(array, {"spacing": properties["spacing"]})
    assert np.array_equal(found[0, 0].numpy(), expected.T)
    assert len({*np.unique(expected)}) > 1
    assert any("format_code" in key for key in module.state_dict())


def test_a_fold_is_exported_with_a_real_image(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = SimpleITK.GetImageFromArray(
        np.random.default_rng(0).normal(60, 30, (10, 18, 24)).astype(np.float32)
    )
    SimpleITK.WriteImage(image, str(tmp_path / "one_0000.nii.gz"))
    out = tmp_path / "out"
    command = [
        "export",
        folder,
        "--to",
        "onnx",
        "--out",
        out,
        "--image",
        tmp_path / "one_0000.nii.gz",
        "--json",
    ]
    capsys.readouterr()
    assert main([*map(str, command)]) == 0
    document = json.loads(capsys.readouterr().out)  # nothing of nnU-Net's in between
    plans = json.loads((folder / "plans.json").read_text())
    assert document["image"] == [1, 1, *plans["configurations"]["3d_fullres"]["patch_size"]]
    assert document["preprocessing"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert document["preprocessing"]["nnunet_configuration"] == "3d_fullres"
    given = preprocessor(document["preprocessing"], 3)([tmp_path / "one_0000.nii.gz"])
    assert np.array_equal(given[0], TrainedFolder(folder).preprocess([tmp_path / "one_0000.nii.gz"]).numpy())
    assert main(["verify", str(out), "--data", str(tmp_path)]) == 0
    assert "one_0000.nii.gz" in capsys.readouterr().out


def test_an_export_says_what_nnunet_does_to_an_image(folder: Path, tmp_path: Path) -> None:
    plans = json.loads((folder / "plans.json").read_text())
    configuration = plans["configurations"].pop("3d_fullres")
    left = {key: configuration.pop(key) for key in ("patch_size", "monai_unetq")}
    plans["configurations"] |= {"base": configuration, "3d_fullres": {"inherits_from": "base", **left}}
    (folder / "plans.json").write_text(json.dumps(plans))
    renamed = folder.rename(tmp_path / "renamed")
    out = tmp_path / "out"
    assert main(["export", str(renamed), "--to", "packed", "--out", str(out)]) == 0
    found = json.loads((out / "export.json").read_text())["preprocessing"]
    assert found["configuration"] == {**configuration, **left, "inherits_from": "base"}
    assert {"resampling_fn_data_kwargs", "use_mask_for_norm"} <= found["configuration"].keys()
    assert found["nnunet_configuration"] == "3d_fullres" and found["spacing"] == configuration["spacing"]
    assert found["patch_size"] == left["patch_size"]
    document = json.loads((renamed / "dataset.json").read_text())
    for key in ("channel_names", "labels", "regions_class_order"):
        assert found[key] == document[key]
    for key in ("image_reader_writer", "transpose_forward", "transpose_backward"):
        assert found[key] == plans[key]
    assert found["intensities"] == plans["foreground_intensity_properties_per_channel"]


def test_a_bundle_exports_the_network_inside_its_predictor(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "fold_0").rename(folder / "fold_2")
    bundle = write_bundle(folder, tmp_path / "bundle")
    command = ["export", str(bundle), "--to", "packed", "--json"]
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "one"), "--set", "folds=[2]"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["export", str(folder), "--to", "packed", "--json", "--out", str(tmp_path / "other")]) == 0
    other = json.loads(capsys.readouterr().out)
    assert "PlainConvUNet" in one["network"] or "ResidualEncoderUNet" in one["network"]
    assert one == other and one["preprocessing"]["nnunet_configuration"] == "3d_fullres"
    assert main([*command, "--out", str(tmp_path / "none"), "--set", "folds=[3]"]) == 2
    assert "fold_3" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_bundle_holds_folds_plans_and_valid_metadata(folder: Path, tmp_path: Path) -> None:
    out = write_bundle(folder, tmp_path / "bundle")
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == [
        "configs/inference.yaml", "configs/metadata.json", "docs/README.md", "models/dataset.json",
        "models/fold_0/checkpoint_final.pth", "models/plans.json",
    ]  # fmt: skip
    checkpoint = torch.load(out / "models" / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert sorted(checkpoint) == [
        "inference_allowed_mirroring_axes",
        "init_args",
        "network_weights",
        "trainer_name",
    ]
    metadata = json.loads((out / "configs" / "metadata.json").read_text())
    assert (
        metadata["name"] == folder.name
        and len(metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]) == 3
    )
    if SCHEMA.is_file():
        meta = str(out / "configs" / "metadata.json")
        verify_metadata(meta_file=meta, filepath=str(SCHEMA), create_dir=False)
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        write_bundle(folder, out)
    with pytest.raises(
        FileNotFoundError, match=r"fold_3.checkpoint_final\.pth: no such file; is the fold finished"
    ):
        write_bundle(folder, tmp_path / "other", [3])
    with pytest.raises(
        FileNotFoundError, match=r"plans\.json: no such file, expected the folder of a trainer"
    ):
        write_bundle(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_without_a_finished_fold(tmp_path: Path) -> None:
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"found no fold with a checkpoint_final\.pth"):
        TrainedFolder(tmp_path)


def test_images_that_nnunet_reads_in_its_own_way_are_refused(folder: Path) -> None:
    plans = json.loads((folder / "plans.json").read_text())
    for change, message in (
        (
            {"image_reader_writer": "Tiff3DIO"},
            "reads images with Tiff3DIO, which MONAI does not do in the same way",
        ),
    ):
        (folder / "plans.json").write_text(json.dumps({**plans, **change}))
        with pytest.raises(NotImplementedError, match=message):
            TrainedFolder(folder)


def test_the_second_stage_of_a_cascade_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_final.pth").touch()

    def pretend(self: Any, *args: Any) -> None:
        self.network = nn.Identity()
        self.configuration_manager = SimpleNamespace(previous_stage_name="3d_lowres")

    monkeypatch.setattr(nnUNetPredictor, "initialize_from_trained_model_folder", pretend)
    with pytest.raises(NotImplementedError, match="second stage of a cascade"):
        TrainedFolder(tmp_path)


def test_channels_of_a_case_are_one_entry(tmp_path: Path) -> None:
    for name in ("b_0000", "a_1_0001", "a_1_0000"):
        (tmp_path / f"{name}.nii.gz").touch()
    found = cases(tmp_path, ".nii.gz")
    assert [[Path(file).name for file in case["image"]] for case in found] == [
        ["a_1_0000.nii.gz", "a_1_0001.nii.gz"], ["b_0000.nii.gz"],
    ]  # fmt: skip
    assert case_name({"filename_or_obj": found[0]["image"][0]}, None) == {"subject": "a_1", "idx": None}
    dotted = {"filename_or_obj": str(tmp_path / "1.2.840.77_0000.nii.gz")}
    assert case_name(dotted, None)["subject"] == "1.2.840.77"
    assert cases(str(tmp_path / "b_0000.nii.gz"), ".nii.gz") == [found[1]]
    with pytest.raises(FileNotFoundError, match=r"found no image, expected CASE_0000\.png"):
        cases(tmp_path, ".png")
    (tmp_path / "plain.nii.gz").touch()
    with pytest.raises(ValueError, match="expected a name such as CASE_0000"):
        cases(tmp_path, ".nii.gz")
