"""The abdomen phantom: the same for a seed, of the promised form, and a task that only a look at it solves."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from monai_unetq.datasets import Case, abdomen_phantom

Mask = npt.NDArray[np.bool_]

# Mean of the image and voxels of pancreas of the first patients.
GOLDEN = ((-647.96439, 1234), (-605.71185, 852), (-621.51009, 1780))


def dice(first: Mask, second: Mask) -> float:
    return 200.0 * float((first & second).sum()) / float(first.sum() + second.sum())


@lru_cache
def others(dimensions: int) -> list[Case]:
    return abdomen_phantom(12, 64, seed=1, dimensions=dimensions)


@pytest.fixture(scope="module")
def slices() -> list[Case]:
    return abdomen_phantom()


@pytest.fixture(scope="module")
def volumes() -> list[Case]:
    return abdomen_phantom(dimensions=3)


def test_form_of_slices(slices: list[Case]) -> None:
    groups = [case.group for case in slices]
    assert groups == [f"PHANTOM_{patient:04d}" for patient in range(1, 9) for _ in range(5)]
    assert len({case.name for case in slices}) == len(slices)
    for case in slices:
        assert case.name.startswith(f"{case.group}_")
        assert len(case.name) == len("PHANTOM_0001_012")
        assert case.image.shape == case.label.shape == (1, 128, 128)
        assert len(case.spacing) == 2


def test_form_of_volumes(volumes: list[Case]) -> None:
    assert [case.name for case in volumes] == [f"PHANTOM_{patient:04d}" for patient in range(1, 9)]
    for case in volumes:
        assert case.group == case.name
        assert case.image.shape == case.label.shape
        assert case.image.shape[0] == 1
        assert 22 <= case.image.shape[1] <= 28
        assert case.image.shape[2:] == (128, 128)
        distance, row, column = case.spacing
        assert distance == 5.0
        assert 340.0 < 128 * row == 128 * column < 420.0


def test_values(volumes: list[Case]) -> None:
    for case in volumes:
        assert case.image.dtype == np.float32
        assert case.label.dtype == np.uint8
        assert case.image.min() == -1000.0
        assert 400.0 < case.image.max() <= 1500.0
        np.testing.assert_array_equal(np.rint(case.image), case.image)
        assert set(np.unique(case.label)) == {0, 1}


def test_slices_are_those_of_the_volumes(slices: list[Case], volumes: list[Case]) -> None:
    patients = {case.group: case for case in volumes}
    for case in slices:
        whole, index = patients[case.group], int(case.name.rsplit("_")[-1])
        np.testing.assert_array_equal(case.image[0], whole.image[0, index])
        np.testing.assert_array_equal(case.label[0], whole.label[0, index])
        assert case.spacing == whole.spacing[1:]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_same_seed_same_cases(dimensions: int) -> None:
    np.random.seed(1)
    first = abdomen_phantom(2, 48, 5, dimensions)
    np.random.seed(2)
    second = abdomen_phantom(2, 48, 5, dimensions)
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.group, one.spacing) == (other.name, other.group, other.spacing)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.label, other.label)


def test_more_patients_leave_the_first_as_they_are() -> None:
    few, more = abdomen_phantom(1, 48, dimensions=3), abdomen_phantom(2, 48, dimensions=3)
    np.testing.assert_array_equal(few[0].image, more[0].image)


def test_other_seed_other_cases() -> None:
    first, second = abdomen_phantom(1, 64, seed=5), abdomen_phantom(1, 64, seed=6)
    assert first[0].spacing != second[0].spacing
    assert dice(first[0].label > 0, second[0].label > 0) < 70.0


def test_numbers_do_not_depend_on_the_platform(volumes: list[Case]) -> None:
    found = [(float(case.image.mean(dtype=np.float64)), int(case.label.sum())) for case in volumes[:3]]
    for (mean, voxels), (expected_mean, expected_voxels) in zip(found, GOLDEN, strict=True):
        assert mean == pytest.approx(expected_mean, abs=0.01)
        assert voxels == pytest.approx(expected_voxels, abs=3)


def test_pancreas_has_the_size_and_hounsfield_units_of_a_real_one(volumes: list[Case]) -> None:
    for case in volumes + others(3):
        mask = case.label > 0
        millilitres = mask.sum() * np.prod(case.spacing) / 1000.0
        assert 20.0 < millilitres < 150.0  # of adults about 40 to 120
        assert (
            55.0 < np.median(case.image[mask]) < 110.0
        )  # NIH Pancreas-CT: 89 +- 28 with air and fat cut off
        assert 15.0 < case.image[mask].std() < 45.0


def test_pancreas_is_in_the_middle_of_a_volume_and_not_at_its_ends(volumes: list[Case]) -> None:
    for case in volumes + others(3):
        shown = case.label[0].any(axis=(1, 2))
        first, last = int(np.argmax(shown)), len(shown) - 1 - int(np.argmax(shown[::-1]))
        assert first >= 2
        assert last <= len(shown) - 3
        assert shown[first : last + 1].all()
        assert last - first >= 9  # 50 mm


def test_pancreas_runs_upwards_from_right_to_left(volumes: list[Case]) -> None:
    for case in volumes:
        up, _, left = np.argwhere(case.label[0] > 0).T
        middle = np.median(up)
        assert left[up > middle].mean() > left[up < middle].mean() + 3.0


def test_all_slices_show_pancreas(slices: list[Case]) -> None:
    fractions = [float(case.label.mean()) for case in slices + others(2)]
    assert min(fractions) > 0.0005
    assert max(fractions) < 0.03
    assert 0.003 < np.mean(fractions) < 0.012


@pytest.mark.parametrize("size", [48, 65, 160])
def test_the_body_fills_the_image_whatever_the_size(size: int) -> None:
    for case in abdomen_phantom(2, size, seed=1):
        assert case.image.shape == (1, size, size)
        body = case.image[0] > -500.0
        assert 0.3 < body.mean() < 0.7
        assert case.label.any()


def test_tissues_have_their_hounsfield_units(volumes: list[Case]) -> None:
    image = np.concatenate([case.image.ravel() for case in volumes])
    share = {
        "air": (image < -900.0).mean(),
        "fat": ((image > -150.0) & (image < -50.0)).mean(),
        "soft tissue": ((image > 20.0) & (image < 140.0)).mean(),
        "enhanced": ((image > 140.0) & (image < 300.0)).mean(),
        "bone and contrast medium": (image > 300.0).mean(),
    }
    assert 0.4 < share["air"] < 0.65
    assert 0.12 < share["fat"] < 0.35
    assert 0.1 < share["soft tissue"] < 0.3
    assert 0.01 < share["enhanced"] < 0.08
    assert 0.005 < share["bone and contrast medium"] < 0.05


def test_neighbouring_slices_of_a_volume_are_alike(volumes: list[Case]) -> None:
    alike = []
    for case in volumes:
        mask = case.label[0] > 0
        areas = mask.sum(axis=(1, 2))
        large = areas > 0.5 * np.median(areas[areas > 0])  # at the ends little is left to overlap
        pairs = np.flatnonzero(large[1:] & large[:-1])
        alike += [dice(mask[index], mask[index + 1]) for index in pairs]
        body = case.image[0] > -500.0
        assert min(dice(one, other) for one, other in pairwise(body)) > 95.0
    assert 60.0 < np.mean(alike) < 95.0  # neighbours, not copies
    assert np.percentile(alike, 10) > 50.0


def test_brightness_alone_does_not_solve_it(slices: list[Case]) -> None:
    image, mask = (
        np.stack([case.image[0] for case in slices]),
        np.stack([case.label[0] > 0 for case in slices]),
    )
    levels = np.arange(-100.0, 300.0, 10.0)
    assert max(dice(image > level, mask) for level in levels) < 30.0
    assert (
        max(dice((image > low) & (image < low + width), mask) for low in levels for width in (40, 80)) < 30.0
    )


def test_place_alone_does_not_solve_it(slices: list[Case]) -> None:
    mask = np.stack([case.label[0] > 0 for case in slices])
    often = mask.mean(axis=0)
    constant = [dice(np.broadcast_to(often >= share, mask.shape), mask) for share in np.unique(often)[1:]]
    assert max(constant) < 50.0


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((0, 64), "count is 0.*expected at least 1"),
        ((2, 47), "size is 47.*expected at least 48"),
        ((2, 64, -1), "seed is -1.*expected at least 0"),
        ((2, 64, 0, 1), "dimensions is 1, expected 2 .*or 3"),
    ],
)
def test_refuses_bad_arguments(arguments: tuple[int, ...], found: str) -> None:
    with pytest.raises(ValueError, match=f"abdomen_phantom: {found}"):
        abdomen_phantom(*arguments)
