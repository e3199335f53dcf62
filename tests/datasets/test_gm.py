"""Grey matter: the 2016 challenge with its four raters, BIDS, and every way in which they can be wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given
from hypothesis import strategies as st

from monai_unetq.datasets import data_list, folds, prepare
from monai_unetq.datasets.gm import majority, survey_gm
from tests.datasets.official import write_bids, write_gm2016, write_nifti

SHAPE = (2, 6, 8)
# oblique, as axial-oblique slices are: 10° about the x axis, 0.5 × 0.5 × 5 mm
COS, SIN = np.cos(np.deg2rad(10)), np.sin(np.deg2rad(10))
OBLIQUE = np.array(
    [[-0.5, 0, 0, 40], [0, -0.5 * COS, 5 * SIN, 30], [0, 0.5 * SIN, 5 * COS, -20], [0, 0, 0, 1]]
)


def scan(seed: int = 0) -> npt.NDArray[np.int16]:
    return np.random.default_rng(seed).integers(0, 1500, SHAPE).astype(np.int16)


def raters() -> list[npt.NDArray[np.uint8]]:
    """Pixel n of the first row is grey matter (1) for the first n raters, white matter (2) for the others."""
    masks = [np.zeros(SHAPE, np.uint8) for _ in range(4)]
    for rater, mask in enumerate(masks):
        mask[0, 0, :5] = [1 if rater < votes else 2 for votes in range(5)]
    return masks


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    for number in range(1, 4):
        write_gm2016(tmp_path / "gm", f"site1-sc{number:02d}", scan(number), raters(), OBLIQUE)
    return tmp_path / "gm"


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    for number, subject in enumerate(("sub-1Ses1", "sub-1Ses2", "sub-2", "sub-3")):
        label = np.zeros(SHAPE)
        label[1, 2, 3] = 1
        write_bids(tmp_path / "gm", subject, scan(number), label, OBLIQUE)
    return tmp_path / "gm"


def refused(source: Path, *fragments: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prepare("gm", source, source.parent / "out")
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert not (source.parent / "out").exists()


def test_three_of_four_raters_make_grey_matter(challenge: Path, tmp_path: Path) -> None:
    dataset = prepare("gm", challenge, tmp_path / "out")
    label = sitk.GetArrayFromImage(sitk.ReadImage(dataset / "labelsTr" / "site1-sc02.nii.gz"))
    np.testing.assert_array_equal(label[0, 0], [0, 0, 0, 1, 1, 0, 0, 0])
    assert label.sum() == 2 and label.dtype == np.uint8


@given(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=7))
def test_majority_is_the_rounded_down_median(votes: list[list[int]]) -> None:
    arrays = [np.array(vote, np.uint8) for vote in votes]
    np.testing.assert_array_equal(majority(arrays), np.floor(np.median(arrays, axis=0)))


def test_oblique_geometry_is_kept(challenge: Path, tmp_path: Path) -> None:
    import nibabel

    dataset = prepare("gm", challenge, tmp_path / "out")
    for path in (dataset / "imagesTr" / "site1-sc01_0000.nii.gz", dataset / "labelsTr" / "site1-sc01.nii.gz"):
        image: Any = nibabel.load(path)
        np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-4)
    image = nibabel.load(dataset / "imagesTr" / "site1-sc01_0000.nii.gz")
    np.testing.assert_array_equal(np.transpose(image.get_fdata(), (2, 1, 0)), scan(1))
    assert image.get_data_dtype() == np.int16


def test_each_scan_of_the_challenge_is_a_person_of_its_site(challenge: Path) -> None:
    case = survey_gm(challenge).cases[0]
    assert (case.name, case.group, case.site) == ("site1-sc01", "site1-sc01", "site1")


def test_sessions_of_one_person_are_one_group(bids: Path, tmp_path: Path) -> None:
    dataset = prepare("gm", bids, tmp_path / "out")
    assert len(folds(dataset)) == 3
    test = data_list(dataset, 0, "test")
    assert [(entry["case"], entry["group"]) for entry in test] == [
        ("sub-1Ses1_run-1", "sub-1"),
        ("sub-1Ses2_run-1", "sub-1"),
    ]
    label = sitk.GetArrayFromImage(sitk.ReadImage(test[0]["label"]))
    assert np.argwhere(label).tolist() == [[1, 2, 3]]


def test_sites_come_from_participants_tsv(bids: Path) -> None:
    (bids / "participants.tsv").write_text("participant_id\tsex\tSite\nsub-2\tF\tMilan\nsub-3\tM\tn/a\n")
    assert {case.group: case.site for case in survey_gm(bids).cases} == {
        "sub-1": "",
        "sub-2": "Milan",
        "sub-3": "n/a",
    }


def test_missing_rater_mask_image(challenge: Path) -> None:
    (challenge / "site1-sc01-mask-r3.nii.gz").unlink()
    (challenge / "site1-sc02-image.nii.gz").unlink()
    for rater in range(1, 5):
        (challenge / f"site1-sc03-mask-r{rater}.nii.gz").unlink()
    refused(
        challenge,
        "3 problem(s)",
        "site1-sc01-image.nii.gz: mask(s) missing: site1-sc01-mask-r3.nii.gz",
        "site1-sc02-mask-r1.nii.gz: no image for it",
        "site1-sc03-image.nii.gz: no mask for it",
    )


def test_a_fifth_rater_and_a_second_copy(challenge: Path) -> None:
    shutil.copy(challenge / "site1-sc01-mask-r1.nii.gz", challenge / "site1-sc01-mask-r5.nii.gz")
    (challenge / "copy").mkdir()
    shutil.copy(challenge / "site1-sc02-image.nii.gz", challenge / "copy")
    refused(
        challenge, "site1-sc01-mask-r5.nii.gz: rater 5, expected 1 to 4", "is there too; expected one file"
    )


@pytest.mark.parametrize("value", [3, 128, 255])
def test_unexpected_mask_values(challenge: Path, value: int) -> None:
    masks = raters()
    masks[2][0, 3, 3] = value
    write_gm2016(challenge, "site1-sc02", scan(2), masks, OBLIQUE)
    refused(
        challenge,
        f"site1-sc02-mask-r3.nii.gz: the label holds the values 0, 1, 2, {value}; expected only 0, 1, 2",
    )


def test_soft_bids_masks_are_refused(bids: Path) -> None:
    soft = np.zeros(SHAPE)
    soft[0, 0, 0] = 0.5
    write_bids(bids, "sub-2", scan(), soft, OBLIQUE)
    refused(
        bids,
        "sub-2_run-1_T2starw_gmseg-manual.nii.gz: the label holds the values 0.0, 0.5; expected only 0, 1",
    )


def moved(shift: float = 0.0, scale: float = 1.0, turn: float = 0.0) -> npt.NDArray[np.float64]:
    """The affine shifted (mm, along x), with other slice distance (factor) or turned in the slice (degrees)."""
    angle = np.deg2rad(turn)
    within = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, scale]])
    affine = OBLIQUE.copy()
    affine[:3, :3] = affine[:3, :3] @ within
    affine[0, 3] += shift
    return affine


@pytest.mark.parametrize(
    ("affine", "word"),
    [(moved(shift=0.3), "origin"), (moved(scale=1.1), "spacing"), (moved(turn=4), "direction")],
)
def test_shifted_scaled_or_turned_masks_are_refused(
    bids: Path, affine: npt.NDArray[np.float64], word: str
) -> None:
    place = bids / "derivatives/labels/sub-2/anat/sub-2_run-1_T2starw_gmseg-manual.nii.gz"
    write_nifti(place, np.zeros(SHAPE), affine)
    refused(bids, f"{place}: lies up to", f"mm off its image {bids / 'sub-2'}", word)


def test_rounded_headers_pass(bids: Path, tmp_path: Path) -> None:
    place = bids / "derivatives/labels/sub-2/anat/sub-2_run-1_T2starw_gmseg-manual.nii.gz"
    write_nifti(place, np.zeros(SHAPE), moved(shift=0.05))  # a tenth of a voxel
    dataset = prepare("gm", bids, tmp_path / "out")
    image = sitk.ReadImage(dataset / "imagesTr" / "sub-2_run-1_0000.nii.gz")
    label = sitk.ReadImage(dataset / "labelsTr" / "sub-2_run-1.nii.gz")
    assert label.GetOrigin() == image.GetOrigin() and label.GetDirection() == image.GetDirection()


def test_other_size_nan_and_garbage(bids: Path) -> None:
    write_bids(bids, "sub-1Ses1", scan(), np.zeros((2, 6, 7)), OBLIQUE)
    broken = scan().astype(np.float32)
    broken[0, 0, 0] = np.nan
    write_bids(bids, "sub-2", broken, np.zeros(SHAPE), OBLIQUE)
    (bids / "sub-3" / "anat" / "sub-3_run-1_T2starw.nii.gz").write_bytes(b"no gzip")
    refused(
        bids,
        "size (7, 6, 2), but its image",
        "sub-2_run-1_T2starw.nii.gz: 1 of 96 voxels are NaN or infinite",
        "sub-3_run-1_T2starw.nii.gz: not readable as NIfTI",
    )


def test_bids_partners_missing(bids: Path) -> None:
    (bids / "sub-2" / "anat" / "sub-2_run-1_T2starw.nii.gz").unlink()
    (bids / "derivatives/labels/sub-3/anat/sub-3_run-1_T2starw_gmseg-manual.nii.gz").unlink()
    refused(
        bids,
        "sub-2_run-1_T2starw_gmseg-manual.nii.gz: no scan for it",
        "sub-3_run-1_T2starw.nii.gz: no grey-matter mask for it",
    )
