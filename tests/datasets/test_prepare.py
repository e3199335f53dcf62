"""Preparing data sets: complete or not at all, repeatable, resumed, and read by nnU-Net as it was written."""

from __future__ import annotations

import json
import os
import shutil
from importlib import import_module
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from monai_unetq.datasets import abdomen_phantom, data_list, folds, membrane_phantom, prepare, write_phantom
from tests.datasets.official import write_bids, write_gm2016, write_isbi, write_tcia

preparation: Any = import_module("monai_unetq.datasets.prepare")  # the function of that name hides it
REAL = Path(os.environ.get("UNETQ_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def stack(count: int = 12, side: int = 16) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, side, side + 2), dtype=np.uint8)
    return images, np.where(images > 60, 255, 0).astype(np.uint8)


@pytest.fixture
def isbi(tmp_path: Path) -> Path:
    write_isbi(tmp_path / "isbi", *stack())
    return tmp_path / "isbi"


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def verify_with_nnunet(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's own check, in this process: its pools would import torch anew."""
    pytest.importorskip("nnunetv2")
    from nnunetv2.experiment_planning import verify_dataset_integrity as check
    from nnunetv2.utilities import utils

    monkeypatch.setattr(
        check, "multiprocessing", SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
    )
    monkeypatch.setattr(utils, "Pool", ThreadPool)
    check.verify_dataset_integrity(str(dataset), num_processes=1)


def test_nnunet_accepts_and_reads_png(isbi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepare("em", isbi, tmp_path / "out")
    verify_with_nnunet(dataset, monkeypatch)
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    images, labels = stack()
    for index in (0, 11):
        pixels, properties = NaturalImage2DIO().read_images(
            (str(dataset / f"imagesTr/em_{index:02d}_0000.png"),)
        )
        np.testing.assert_array_equal(pixels[0, 0], images[index])
        assert properties["spacing"] == (999, 1, 1)
        label, _ = NaturalImage2DIO().read_seg(str(dataset / f"labelsTr/em_{index:02d}.png"))
        np.testing.assert_array_equal(label[0, 0], labels[index] == 255)


def test_nnunet_accepts_and_reads_nifti(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    affine = np.diag([0.5, 0.5, 5.0, 1.0])
    volumes = {f"site1-sc{n:02d}": generator.integers(0, 900, (3, 8, 10)).astype(np.int16) for n in (1, 2, 3)}
    for name, voxels in volumes.items():
        write_gm2016(tmp_path / "gm", name, voxels, [(voxels > 600).astype(np.uint8)] * 4, affine)
    dataset = prepare("gm", tmp_path / "gm", tmp_path / "out")
    verify_with_nnunet(dataset, monkeypatch)
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    for name, voxels in volumes.items():
        read, properties = SimpleITKIO().read_images((str(dataset / f"imagesTr/{name}_0000.nii.gz"),))
        np.testing.assert_array_equal(read[0], voxels)
        np.testing.assert_allclose(properties["spacing"], (5.0, 0.5, 0.5))
        label, _ = SimpleITKIO().read_seg(str(dataset / f"labelsTr/{name}.nii.gz"))
        np.testing.assert_array_equal(label[0], voxels > 600)


def test_description_says_what_it_is(isbi: Path, tmp_path: Path) -> None:
    dataset = prepare("em", isbi, tmp_path)
    assert dataset == tmp_path / "Dataset501_EM"
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "ssTEM"}
    assert description["labels"] == {"background": 0, "cell interior": 1}
    assert (description["numTraining"], description["file_ending"]) == (12, ".png")
    assert sorted(description["groups"]) == [f"em_{index:02d}" for index in range(12)]
    assert {"name", "description", "reference", "licence"} <= description.keys()


def test_repeating_changes_nothing(isbi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepare("em", isbi, tmp_path / "out")
    before = tree(dataset)
    monkeypatch.setattr(
        preparation, "_write_pixels", lambda *_: pytest.fail("a prepared case was written again")
    )
    prepare("em", isbi, tmp_path / "out")
    after = tree(dataset)
    assert {name: content for name, (_, content) in after.items()} == {n: c for n, (_, c) in before.items()}


def test_an_interrupted_run_is_taken_up(isbi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(prepare("em", isbi, tmp_path / "whole"))
    written: list[Path] = []
    real = preparation._write_pixels

    def interrupted(pixels: Any, path: Path) -> None:
        if len(written) == 5:  # between the image and the label of the third case
            path.with_name(".partial-em_99.png").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        real(pixels, path)

    monkeypatch.setattr(preparation, "_write_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("em", isbi, tmp_path / "out")
    dataset = tmp_path / "out" / "Dataset501_EM"
    with pytest.raises(FileNotFoundError, match=r"dataset.json: no such file.*interrupted"):
        data_list(dataset)

    again: list[Path] = []

    def counted(pixels: Any, path: Path) -> None:
        again.append(path)
        real(pixels, path)

    monkeypatch.setattr(preparation, "_write_pixels", counted)
    prepare("em", isbi, tmp_path / "out")
    assert len(again) == 24 - 4
    assert {n: c for n, (_, c) in tree(dataset).items()} == {n: c for n, (_, c) in whole.items()}


def test_a_changed_source_is_prepared_again(tmp_path: Path) -> None:
    source = tmp_path / "em"
    for index in range(4):
        for part in ("image", "label"):
            (source / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 255, np.uint8)).save(source / part / f"{index}.png")
    dataset = prepare("em", source, tmp_path / "out")
    before = tree(dataset)
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(source / "image" / "2.png")
    prepare("em", source, tmp_path / "out")
    after = tree(dataset)
    assert np.asarray(Image.open(dataset / "imagesTr" / "em_2_0000.png")).max() == 7
    images = [name for name in before if name.endswith(".png")]
    assert [name for name in images if after[name] != before[name]] == [
        "imagesTr/em_2_0000.png",
        "labelsTr/em_2.png",
    ]


def test_a_data_set_half_replaced_is_not_usable(
    isbi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = prepare("em", isbi, tmp_path / "out")
    images, labels = stack()
    write_isbi(isbi, 255 - images, labels)

    def interrupted(pixels: Any, path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "_write_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("em", isbi, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"dataset.json: no such file"):
        data_list(dataset)


def test_a_case_that_left_the_source_is_named_and_kept(tmp_path: Path) -> None:
    write_phantom("em", tmp_path, size=32, count=5)
    before = tree(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"2 file\(s\) that are not in the source: imagesTr/em_04_0000.png, labelsTr/em_04.png",
    ):
        write_phantom("em", tmp_path, size=32, count=4)
    assert tree(tmp_path) == before


def test_a_phantom_does_not_replace_real_data(isbi: Path, tmp_path: Path) -> None:
    prepare("em", isbi, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match="was prepared from a source, not from a phantom"):
        write_phantom("em", tmp_path / "out", size=32, count=12)
    assert tree(tmp_path / "out") == before


def test_all_problems_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    source = tmp_path / "em"
    images, labels = stack(16)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        for part, pixels in (("image", image), ("label", label)):
            (source / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(source / part / f"{index:02d}.png")
    (source / "label" / "03.png").unlink()
    (source / "image" / "04.png").write_bytes(b"")
    Image.fromarray(np.full((16, 18), 3, np.uint8)).save(source / "label" / "05.png")
    with pytest.raises(ValueError) as caught:
        prepare("em", source, tmp_path / "out")
    message = str(caught.value)
    assert "3 problem(s)" in message
    for fragment in (
        "image/03.png: this image has no label",
        "04.png",
        "is empty",
        "05.png: the label holds the values 3",
    ):
        assert fragment in message
    assert not (tmp_path / "out").exists()

    for index in range(6, 16):
        (source / "label" / f"{index:02d}.png").unlink()
    with pytest.raises(ValueError, match=r"13 problem\(s\)(.|\n)*and 3 more"):
        prepare("em", source, tmp_path / "out")


def test_a_refused_source_leaves_a_prepared_one_alone(isbi: Path, tmp_path: Path) -> None:
    prepare("em", isbi, tmp_path / "out")
    before = tree(tmp_path / "out")
    images, labels = stack()
    labels[7, 0, 0] = 9
    write_isbi(isbi, images, labels)
    with pytest.raises(ValueError, match="page 7: the label holds the values 0, 9, 255"):
        prepare("em", isbi, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_too_few_persons_are_refused_before_writing(tmp_path: Path) -> None:
    for session in (1, 2, 3):
        write_bids(tmp_path / "gm", f"sub-7Ses{session}", np.zeros((2, 8, 8), np.int16), np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match=r"gm: found 1 person.*sub-7"):
        prepare("gm", tmp_path / "gm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["em", "gm", "nih"])
def test_an_empty_or_missing_source_says_what_is_expected(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no .* in it \(found nothing\); expected"):
        prepare(kind, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        prepare(kind, tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind is 'ct', expected one of 'em', 'gm', 'nih'"):
        prepare("ct", tmp_path, tmp_path)  # type: ignore[arg-type]


def test_phantom_slices_are_those_of_the_phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_phantom("em", tmp_path, size=48, seed=3)
    verify_with_nnunet(dataset, monkeypatch)
    for case in membrane_phantom(size=48, seed=3)[::6]:
        image = np.asarray(Image.open(dataset / "imagesTr" / f"em_{case.name}_0000.png"))
        np.testing.assert_array_equal(image / np.float32(255), case.image[0])
        np.testing.assert_array_equal(
            np.asarray(Image.open(dataset / "labelsTr" / f"em_{case.name}.png")), case.label[0]
        )


@pytest.mark.parametrize("dimensions", [2, 3])
def test_phantom_ct_keeps_hu_spacing_and_patients(
    dimensions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_phantom("nih", tmp_path, dimensions=dimensions, size=64, count=4)
    verify_with_nnunet(dataset, monkeypatch)
    import nibabel

    cases = abdomen_phantom(count=4, size=64, dimensions=dimensions)
    listed = {
        entry["case"]: entry
        for part in ("train", "validation", "test")
        for entry in data_list(dataset, 0, part)
    }
    assert {name: entry["group"] for name, entry in listed.items()} == {
        case.name: case.group for case in cases
    }
    for case in cases[:2]:
        image: Any = nibabel.load(listed[case.name]["image"])
        voxels = np.transpose(image.get_fdata(), (2, 1, 0))
        np.testing.assert_array_equal(voxels, case.image[0] if dimensions == 3 else case.image)
        np.testing.assert_allclose(image.header.get_zooms()[:2], case.spacing[::-1][:2], rtol=1e-6)
        assert image.get_data_dtype() == np.int16


def real(kind: str) -> Path:
    if not (REAL / kind).is_dir():
        pytest.skip(f"no real data at {REAL / kind}; set UNETQ_DATA to the folder that holds {kind}/")
    return REAL / kind


def test_real_em(tmp_path: Path) -> None:
    dataset = prepare("em", real("em"), tmp_path)
    fold = folds(dataset)[0]
    assert (fold.train[-1], fold.validation, fold.test[0]) == ("em_15", ("em_16", "em_17", "em_18"), "em_19")
    for entry in data_list(dataset, 0, "test"):
        number = entry["case"].removeprefix("em_")
        np.testing.assert_array_equal(
            Image.open(entry["image"]), Image.open(real("em") / "image" / f"{number}.png")
        )
        original = np.asarray(Image.open(real("em") / "label" / f"{number}.png"))
        np.testing.assert_array_equal(Image.open(entry["label"]), original == 255)


def test_real_gm(tmp_path: Path) -> None:
    import nibabel

    source = real("gm")
    dataset = prepare("gm", source, tmp_path)
    assert len(folds(dataset)) == 5
    entries = data_list(dataset, 0, "test")
    assert [entry["group"] for entry in entries] == ["sub-10062", "sub-10062"]
    for entry in entries:
        subject = entry["case"].partition("_")[0]
        original: Any = nibabel.load(source / subject / "anat" / f"{entry['case']}_T2starw.nii.gz")
        image: Any = nibabel.load(entry["image"])
        label: Any = nibabel.load(entry["label"])
        np.testing.assert_array_equal(image.get_fdata(), original.get_fdata())
        np.testing.assert_allclose(image.affine, original.affine, atol=1e-3)
        np.testing.assert_allclose(label.affine, image.affine, atol=1e-6)
        assert 0.0001 < label.get_fdata().mean() < 0.01


def test_real_nih(tmp_path: Path) -> None:
    source = tmp_path / "nih"  # four patients are enough
    for part in ("image", "label"):
        (source / part).mkdir(parents=True)
        for path in sorted((real("nih") / part).glob("PANCREAS_000[1-4]_*[0-5].jpg")):
            shutil.copy(path, source / part)
    dataset = prepare("nih", source, tmp_path / "out")
    assert len(folds(dataset)) == 4
    for entry in data_list(dataset, 1, "validation"):
        assert entry["case"].startswith(entry["group"])
    assert "spacing is unknown" in json.loads((dataset / "dataset.json").read_text())["description"]


def test_nnunet_accepts_tcia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hu = np.full((4, 12, 10), -80)
    hu[1:3, 3:7, 2:5] = 90
    for number in (1, 2, 3):
        write_tcia(tmp_path / "nih", number, hu, (hu == 90).astype(np.uint8))
    verify_with_nnunet(prepare("nih", tmp_path / "nih", tmp_path / "out"), monkeypatch)
