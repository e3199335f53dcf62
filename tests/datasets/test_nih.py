"""NIH Pancreas-CT: DICOM series and labels put in one place, JPEG slices, and every way in which they can be
wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from PIL import Image

from monai_unetq.datasets import data_list, folds, prepare
from tests.datasets.official import write_tcia

SHAPE = (6, 14, 12)  # slices, rows, columns


def abdomen() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Fat with a pancreas that lies on soft tissue in no mirrored place; every voxel has its own value."""
    hu = -150 + np.arange(np.prod(SHAPE)).reshape(SHAPE) % 97
    label = np.zeros(SHAPE, np.uint8)
    label[1:3, 2:6, 7:11] = 1
    label[1, 2, 7] = 0
    hu[label == 1] += 200
    return hu, label


@pytest.fixture
def tcia(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        write_tcia(tmp_path / "nih", number, *abdomen())
    return tmp_path / "nih"


def refused(source: Path, *fragments: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prepare("nih", source, source.parent / "out")
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert not (source.parent / "out").exists()


def load(path: Path) -> Any:
    return nibabel.load(path)


@pytest.mark.parametrize("descending", [False, True])
def test_volume_and_label_lie_where_pydicom_and_nibabel_see_them(
    tcia: Path, tmp_path: Path, descending: bool
) -> None:
    hu, label = abdomen()
    spacing, origin = (2.5, 0.75, 0.7), (-11.0, -22.0, -333.0)
    paths = write_tcia(tcia, 2, hu, label, spacing=spacing, origin=origin, descending=descending)
    dataset = prepare("nih", tcia, tmp_path / "out")
    image = load(dataset / "imagesTr" / "PANCREAS_0002_0000.nii.gz")
    voxels = image.get_fdata()
    for path in paths:
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        for row, column in ((0, 0), (3, 9)):
            # DICOM PS3.3 C.7.6.2.1.1, then LPS to RAS
            within = np.array([column * ds.PixelSpacing[1], row * ds.PixelSpacing[0], 0])
            x, y, z = np.array(ds.ImagePositionPatient, float) + within
            index = np.linalg.inv(image.affine) @ [-x, -y, z, 1]
            np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
            assert voxels[tuple(np.rint(index[:3]).astype(int))] == pixels[row, column]
    np.testing.assert_allclose(image.header.get_zooms(), (0.7, 0.75, 2.5), rtol=1e-6)
    prepared = load(dataset / "labelsTr" / "PANCREAS_0002.nii.gz")
    np.testing.assert_allclose(prepared.affine, image.affine, atol=1e-6)
    np.testing.assert_array_equal(np.transpose(prepared.get_fdata(), (2, 1, 0)), label)
    np.testing.assert_array_equal(np.transpose(voxels, (2, 1, 0)), hu)
    assert image.get_data_dtype() == np.int16


def test_label_voxels_follow_columns_rows_and_instances(tcia: Path, tmp_path: Path) -> None:
    """As public code pairs them: nibabel's [i, j, k] is pixel_array[j, i] of InstanceNumber k + 1."""
    hu, label = abdomen()
    paths = write_tcia(tcia, 1, hu, label, descending=True)
    stored = load(tcia / "TCIA_pancreas_labels-02-05-2017" / "label0001.nii.gz").get_fdata()
    by_instance = {int(ds.InstanceNumber): ds.pixel_array - 1024 for ds in map(pydicom.dcmread, paths)}
    expected = sorted(by_instance[k + 1][j, i] for i, j, k in np.argwhere(stored))
    dataset = prepare("nih", tcia, tmp_path / "out")
    image = load(dataset / "imagesTr" / "PANCREAS_0001_0000.nii.gz").get_fdata()
    prepared = load(dataset / "labelsTr" / "PANCREAS_0001.nii.gz").get_fdata()
    assert sorted(image[prepared == 1]) == expected


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (2.0, -1000.0), (0.25, -200.0)])
def test_rescale_is_applied(tcia: Path, tmp_path: Path, slope: float, intercept: float) -> None:
    hu, label = abdomen()
    hu = hu // 2 * 2
    write_tcia(tcia, 3, hu, label, slope=slope, intercept=intercept)
    dataset = prepare("nih", tcia, tmp_path / "out")
    image = load(dataset / "imagesTr" / "PANCREAS_0003_0000.nii.gz").get_fdata()
    np.testing.assert_array_equal(np.transpose(image, (2, 1, 0)), hu)


def test_rescale_of_single_files_is_applied(tcia: Path, tmp_path: Path) -> None:
    hu, label = abdomen()
    write_tcia(tcia, 3, hu, label, tags={4: {"RescaleIntercept": -1023.5}})
    dataset = prepare("nih", tcia, tmp_path / "out")
    image = np.transpose(load(dataset / "imagesTr" / "PANCREAS_0003_0000.nii.gz").get_fdata(), (2, 1, 0))
    np.testing.assert_array_equal(image[4], np.rint(hu[4] + 0.5))
    np.testing.assert_array_equal(image[3], hu[3])


def test_patients_are_groups(tcia: Path, tmp_path: Path) -> None:
    dataset = prepare("nih", tcia, tmp_path / "out")
    assert len(folds(dataset)) == 3
    assert [entry["group"] for entry in data_list(dataset, 0, "test")] == ["PANCREAS_0001"]


@pytest.mark.parametrize(
    ("axes", "names"), [((0,), "slices"), ((1,), "rows"), ((2,), "columns"), ((0, 1), "slices and rows")]
)
def test_a_flipped_label_is_refused_and_the_flip_named(tcia: Path, axes: tuple[int, ...], names: str) -> None:
    hu, label = abdomen()
    write_tcia(tcia, 2, hu, np.flip(label, axes))
    refused(tcia, "label0002.nii.gz: the median under the label is -", f"flipped along the {names}:")


def test_a_label_on_air_is_refused(tcia: Path) -> None:
    hu, label = abdomen()
    write_tcia(tcia, 2, np.full_like(hu, -900), label)
    refused(tcia, "label0002.nii.gz: the median under the label is -900 HU", "No flip repairs it")


def test_an_empty_label_is_refused(tcia: Path) -> None:
    hu, label = abdomen()
    write_tcia(tcia, 2, hu, np.zeros_like(label))
    refused(tcia, "label0002.nii.gz: the label is empty")


def test_missing_slices_are_found(tcia: Path) -> None:
    hu, label = abdomen()
    paths = write_tcia(tcia, 2, hu, label)
    paths[3].unlink()
    refused(tcia, "slices are missing: about 1 between", str(paths[2]), str(paths[4]))


def test_missing_end_is_found_by_the_label(tcia: Path) -> None:
    paths = write_tcia(tcia, 2, *abdomen())
    paths[-1].unlink()
    refused(tcia, "label0002.nii.gz: (12, 14, 6) voxels, but the DICOM series in", "has (12, 14, 5)")


def test_a_slice_twice_is_found(tcia: Path) -> None:
    paths = write_tcia(tcia, 2, *abdomen())
    copy = paths[3].with_name("copy.dcm")
    copy.write_bytes(paths[3].read_bytes())
    refused(tcia, "slices in the same place", str(copy), str(paths[3]))


@pytest.mark.parametrize(
    ("tags", "fragments"),
    [
        ({"SeriesInstanceUID": "1.2.3"}, ["2 series (", "1.2.3", "5 file(s)"]),
        ({"PixelSpacing": [0.9, 0.9]}, ["PixelSpacing (0.9, 0.9), but"]),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}, ["ImageOrientationPatient [1.0, 0.0, 0.0, 0.0, 0.0, 1.0], but"]),
        ({"ImagePositionPatient": [-10, -20, -297.7]}, ["the distance of these slices is not the usual 1 mm"]),
        ({"ImagePositionPatient": [-10, -15, -298]}, ["shifted against each other"]),
        ({"ImagePositionPatient": None}, ["ImagePositionPatient is '', expected 3 number(s)"]),
        ({"InstanceNumber": 5}, ["InstanceNumber 4 follows 5 of"]),
        ({"InstanceNumber": None}, ["InstanceNumber is '', expected 1 number(s)"]),
        ({"Modality": "SEG"}, ["modality 'SEG', expected 'CT'"]),
    ],
)  # fmt: skip
def test_odd_slices_are_refused_by_file(tcia: Path, tags: dict[str, Any], fragments: list[str]) -> None:
    write_tcia(tcia, 2, *abdomen(), tags={2: tags})
    refused(tcia, "PANCREAS_0002", *fragments)


def test_other_size_is_refused(tcia: Path) -> None:
    paths = write_tcia(tcia, 2, *abdomen())
    ds = pydicom.dcmread(paths[4])
    ds.Rows, ds.Columns = 7, 24
    ds.save_as(paths[4])
    refused(tcia, f"{paths[4]}: columns and rows (24, 7), but")


def test_garbage_and_cut_files_are_refused(tcia: Path) -> None:
    paths = write_tcia(tcia, 2, *abdomen())
    paths[1].write_bytes(b"not DICOM")
    cut = write_tcia(tcia, 3, *abdomen())[2]
    cut.write_bytes(cut.read_bytes()[:-200])
    refused(tcia, f"{paths[1]}: not readable as DICOM", "PANCREAS_0003")


def test_partners_missing_and_strays(tcia: Path) -> None:
    labels = tcia / "TCIA_pancreas_labels-02-05-2017"
    (labels / "label0002.nii.gz").rename(labels / "label0009.nii.gz")
    (labels / "copy").mkdir()
    shutil.copy(labels / "label0001.nii.gz", labels / "copy")
    (tcia / "stray.dcm").write_bytes(b"")
    refused(
        tcia,
        "4 problem(s)",
        "no label for PANCREAS_0002; expected label0002.nii.gz",
        "label0009.nii.gz: no DICOM series for it",
        "is there too; expected one file",
        "stray.dcm: DICOM file outside a folder PANCREAS_NNNN (1 such file(s))",
    )


def test_labels_of_withdrawn_patients_and_hidden_files_are_passed_over(tcia: Path, tmp_path: Path) -> None:
    labels = tcia / "TCIA_pancreas_labels-02-05-2017"
    for number in (25, 70):
        (labels / f"label{number:04d}.nii.gz").write_bytes(b"")
    (tcia / "PANCREAS_0001" / "._000-065.dcm").write_bytes(b"what macOS leaves in archives")
    prepare("nih", tcia, tmp_path / "out")


def test_label_of_other_values_is_refused(tcia: Path) -> None:
    hu, label = abdomen()
    write_tcia(tcia, 2, hu, label * 2)
    refused(tcia, "label0002.nii.gz: the label holds the values 0, 2; expected only 0, 1")


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    source = tmp_path / "nih"
    for patient in (1, 2, 3):
        for number in (9, 10):
            image = np.full((16, 24), 40 * patient + number, np.uint8)
            label = np.zeros((16, 24), np.uint8)
            label[:8, :8] = 255
            for part, pixels in (("image", image), ("label", label)):
                (source / part).mkdir(parents=True, exist_ok=True)
                colour = Image.fromarray(pixels).convert("RGB")
                colour.save(source / part / f"PANCREAS_{patient:04d}_{number:03d}.jpg", quality=95)
    return source


def test_jpeg_slices(jpeg: Path, tmp_path: Path) -> None:
    dataset = prepare("nih", jpeg, tmp_path / "out")
    entries = data_list(dataset, 1, "test")
    assert [(entry["case"], entry["group"]) for entry in entries] == [
        ("PANCREAS_0002_009", "PANCREAS_0002"),
        ("PANCREAS_0002_010", "PANCREAS_0002"),
    ]
    image, label = load(Path(entries[0]["image"])), load(Path(entries[0]["label"]))
    assert image.shape == label.shape == (24, 16, 1)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.get_fdata(), 89, atol=1)
    expected = np.zeros((24, 16, 1))
    expected[:8, :8] = 1
    np.testing.assert_array_equal(label.get_fdata(), expected)


def test_bad_jpegs_are_refused_by_file(jpeg: Path) -> None:
    red = np.zeros((16, 24, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(jpeg / "image" / "PANCREAS_0001_009.jpg")
    Image.fromarray(np.full((16, 24), 100, np.uint8)).save(jpeg / "label" / "PANCREAS_0001_010.jpg")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(jpeg / "label" / "PANCREAS_0002_009.jpg")
    (jpeg / "image" / "PANCREAS_0002_010.jpg").write_bytes(b"\xff\xd8\xff")
    (jpeg / "label" / "PANCREAS_0003_009.jpg").rename(jpeg / "label" / "PANCREAS_0003_011.jpg")
    (jpeg / "image" / "pancreas 3.jpg").write_bytes(b"")
    refused(
        jpeg,
        "7 problem(s)",
        "PANCREAS_0001_009.jpg: shape (16, 24, 3) with unequal channels",
        "label/PANCREAS_0001_010.jpg: 384 pixels are between black and white",
        "label/PANCREAS_0002_009.jpg: 8x8 pixels",
        "PANCREAS_0002_010.jpg: not readable as JPEG",
        "image/PANCREAS_0003_009.jpg: this image has no label",
        "label/PANCREAS_0003_011.jpg: this label has no image",
        "pancreas 3.jpg: expected a name like PANCREAS_0001_106.jpg",
    )
