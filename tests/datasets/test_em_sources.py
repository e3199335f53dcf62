"""EM slices to prepare: the ISBI challenge's stacks and PNG folders, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from monai_unetq.datasets import folds, prepare
from monai_unetq.datasets.em import survey_em
from tests.datasets.official import write_isbi


def stack(count: int = 6, dtype: type = np.uint8) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.uint8]]:
    images = np.random.default_rng(0).integers(
        0, np.iinfo(dtype).max, (count, 12, 14), dtype=dtype, endpoint=True
    )
    return images, np.where(images > np.iinfo(dtype).max // 4, 255, 0).astype(np.uint8)


def refused(source: Path, *fragments: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prepare("em", source, source.parent / "out")
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("writer", ["pillow", "tifffile"])
def test_stacks_keep_every_pixel(tmp_path: Path, dtype: type, writer: str) -> None:
    images, labels = stack(dtype=dtype)
    write_isbi(tmp_path / "em", list(images), list(labels))
    if writer == "tifffile":
        tifffile.imwrite(tmp_path / "em" / "train-volume.tif", images, photometric="minisblack")
        tifffile.imwrite(
            tmp_path / "em" / "train-labels.tif", labels, photometric="minisblack", compression=None
        )
    (tmp_path / "em" / "test-volume.tif").write_bytes(b"the challenge's, without labels")
    dataset = prepare("em", tmp_path / "em", tmp_path / "out")
    for index in range(6):
        image = np.asarray(Image.open(dataset / "imagesTr" / f"em_{index:02d}_0000.png"))
        label = np.asarray(Image.open(dataset / "labelsTr" / f"em_{index:02d}.png"))
        np.testing.assert_array_equal(image, images[index])
        np.testing.assert_array_equal(label, labels[index] == 255)
        assert image.dtype == dtype and label.dtype == np.uint8


def test_thirty_slices_are_split_as_the_challenge_stack(tmp_path: Path) -> None:
    images, labels = stack(30)
    write_isbi(tmp_path / "em", list(images), list(labels))
    first = folds(prepare("em", tmp_path / "em", tmp_path / "out"))[0]
    assert (len(first.train), len(first.validation), len(first.test)) == (20, 4, 6)
    assert first.test[-1] == "em_29"


def test_png_names_are_sorted_as_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "1"):
        for part in ("image", "label"):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / part / f"{name}.png")
    assert [case.name for case in survey_em(tmp_path).cases] == ["em_1", "em_9", "em_10"]


@pytest.mark.parametrize("missing", ["train-volume", "train-labels"])
def test_one_stack_alone(tmp_path: Path, missing: str) -> None:
    write_isbi(tmp_path / "em", *map(list, stack()))
    (tmp_path / "em" / f"{missing}.tif").unlink()
    refused(tmp_path / "em", f"{missing}.tif: no such file, but its partner is there")


def test_stacks_of_other_length_size_or_values(tmp_path: Path) -> None:
    images, labels = stack()
    write_isbi(tmp_path / "em", list(images), list(labels[:5]))
    refused(tmp_path / "em", "train-labels.tif: 5 page(s), but", "train-volume.tif has 6")
    write_isbi(tmp_path / "em", list(images), [*labels[:5], labels[5, :10]])
    refused(tmp_path / "em", "train-labels.tif: page 5 has 10x14 pixels")
    labels[2, 0, 0] = 128
    write_isbi(tmp_path / "em", list(images), list(labels))
    refused(tmp_path / "em", "train-labels.tif: page 2: the label holds the values 0, 128, 255")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_colour_and_damaged_stacks(tmp_path: Path) -> None:
    images, labels = stack()
    write_isbi(tmp_path / "em", [np.stack([image] * 3, axis=2) for image in images], list(labels))
    refused(tmp_path / "em", "train-volume.tif: page 0 has mode RGB; expected one greyscale channel")
    write_isbi(tmp_path / "em", list(images), list(labels))
    volume = tmp_path / "em" / "train-volume.tif"
    volume.write_bytes(b"II*\x00nothing")
    refused(tmp_path / "em", "train-volume.tif: not readable as TIFF")


def test_both_layouts_at_once(tmp_path: Path) -> None:
    write_isbi(tmp_path / "em", *map(list, stack()))
    (tmp_path / "em" / "image").mkdir()
    refused(tmp_path / "em", "holds both a TIFF stack and the folder image")


def test_slices_of_other_size(tmp_path: Path) -> None:
    for index in range(4):
        for part in ("image", "label"):
            (tmp_path / "em" / part).mkdir(parents=True, exist_ok=True)
            side = 9 if index == 2 else 8
            Image.fromarray(np.zeros((side, 8), np.uint8)).save(tmp_path / "em" / part / f"{index}.png")
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "em" / "label" / "3.png")
    refused(tmp_path / "em", "2.png: 9x8 pixels, but", "3.png: the label has 8x9 pixels, its image")
