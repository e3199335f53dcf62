"""The cord phantom: the same for a seed, of the promised form, and a task that only a look at it solves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from monai_unetq.datasets import Case, cord_phantom

Mask = npt.NDArray[np.bool_]

# Mean of the image and pixels of grey matter of the first persons.
GOLDEN = ((121.20797, 530), (137.10237, 599), (277.46276, 531))


def dice(first: Mask, second: Mask) -> float:
    return 200.0 * float((first & second).sum()) / float(first.sum() + second.sum())


@pytest.fixture(scope="module")
def slices() -> list[Case]:
    return cord_phantom()


@pytest.fixture(scope="module")
def volumes() -> list[Case]:
    return cord_phantom(dimensions=3)


def test_form_of_slices(slices: list[Case]) -> None:
    groups = [case.group for case in slices]
    assert sorted(set(groups)) == [f"person{index:02d}" for index in range(1, 9)]
    assert all(4 <= groups.count(group) <= 6 for group in groups)
    assert len({case.name for case in slices}) == len(slices)
    for case in slices:
        assert case.name.startswith(f"{case.group}_")
        assert case.image.shape == case.label.shape == (1, 128, 128)
        assert len(case.spacing) == 2


def test_form_of_volumes(volumes: list[Case]) -> None:
    assert [case.name for case in volumes] == [f"person{index:02d}" for index in range(1, 9)]
    for case in volumes:
        assert case.group == case.name
        assert case.image.shape == case.label.shape
        assert case.image.shape[0] == 1
        assert 10 <= case.image.shape[1] <= 14
        assert case.image.shape[2:] == (128, 128)
        distance, row, column = case.spacing
        assert 2.5 <= distance <= 5.0
        assert 0.5 <= row == column <= 0.8


def test_values(volumes: list[Case]) -> None:
    for case in volumes:
        assert case.image.dtype == np.float32
        assert case.label.dtype == np.uint8
        assert case.image.min() >= 0.0
        assert case.image.max() < 2**15  # fits int16, in which scanners store it
        np.testing.assert_array_equal(np.rint(case.image), case.image)
        assert set(np.unique(case.label)) == {0, 1}


def test_slices_are_those_of_the_volumes(slices: list[Case], volumes: list[Case]) -> None:
    persons = {case.group: case for case in volumes}
    for case in slices:
        whole, index = persons[case.group], int(case.name.rsplit("_")[-1])
        np.testing.assert_array_equal(case.image[0], whole.image[0, index])
        np.testing.assert_array_equal(case.label[0], whole.label[0, index])
        assert case.spacing == whole.spacing[1:]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_same_seed_same_cases(dimensions: int) -> None:
    np.random.seed(1)
    first = cord_phantom(2, 48, 5, dimensions)
    np.random.seed(2)
    second = cord_phantom(2, 48, 5, dimensions)
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.group, one.spacing) == (other.name, other.group, other.spacing)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.label, other.label)


def test_more_persons_leave_the_first_as_they_are() -> None:
    few, more = cord_phantom(1, 48, dimensions=3), cord_phantom(2, 48, dimensions=3)
    np.testing.assert_array_equal(few[0].image, more[0].image)


def test_other_seed_other_cases() -> None:
    first, second = cord_phantom(1, 64, seed=5), cord_phantom(1, 64, seed=6)
    assert first[0].spacing != second[0].spacing
    assert dice(first[0].label > 0, second[0].label > 0) < 80.0


def test_numbers_do_not_depend_on_the_platform(volumes: list[Case]) -> None:
    found = [(float(case.image.mean(dtype=np.float64)), int(case.label.sum())) for case in volumes[:3]]
    for (mean, pixels), (expected_mean, expected_pixels) in zip(found, GOLDEN, strict=True):
        assert mean == pytest.approx(expected_mean, abs=0.01)
        assert pixels == pytest.approx(expected_pixels, abs=2)


def test_grey_matter_has_the_size_and_contrast_of_real_one(volumes: list[Case]) -> None:
    # Public T2*-weighted data of the neck: 15 to 25 mm², 1.11 to 1.17 times as bright as white matter.
    for case in [*volumes, *cord_phantom(6, 64, seed=1, dimensions=3)]:
        mask = case.label[0] > 0
        area = mask.sum(axis=(1, 2)) * case.spacing[1] ** 2
        assert area.min() > 8.0
        assert area.max() < 35.0
        assert 12.0 < area.mean() < 30.0
        # White matter lies between the horns: within the hull, two pixels from the grey.
        across = ndimage.binary_closing(mask, np.ones((1, 7, 1)), iterations=1)
        white = across & ~ndimage.binary_dilation(mask, np.ones((1, 2, 2)))
        assert white.any()
        ratio = case.image[0][mask].mean() / case.image[0][white].mean()
        assert 1.03 < ratio < 1.3


@pytest.mark.parametrize("size", [48, 65, 150])
def test_every_slice_shows_the_whole_grey_matter(size: int) -> None:
    for case in cord_phantom(3, size, seed=1):
        assert case.image.shape == (1, size, size)
        rows, columns = np.nonzero(case.label[0])
        assert rows.size >= 15
        assert min(rows.min(), columns.min()) > 0
        assert max(rows.max(), columns.max()) < size - 1


def test_persons_and_slices_differ(volumes: list[Case]) -> None:
    middles = [np.argwhere(case.label[0] > 0)[:, 1:].mean(axis=0) for case in volumes]
    assert np.ptp(middles, axis=0).min() > 8.0  # px; off centre, and each elsewhere
    assert len({case.spacing for case in volumes}) == len(volumes)
    levels = [np.median(case.image[case.label > 0]) for case in volumes]
    assert max(levels) > 2.0 * min(levels)


def test_neighbouring_slices_of_a_volume_are_alike(volumes: list[Case]) -> None:
    for case in volumes:
        mask = case.label[0] > 0
        alike = [dice(one, other) for one, other in pairwise(mask)]
        assert min(alike) > 50.0
        assert 60.0 < np.mean(alike) < 97.0  # neighbours, not copies


def test_brightness_alone_does_not_solve_it(slices: list[Case]) -> None:
    # Each slice in units of its own median grey matter: better than what a threshold could know.
    mask = np.stack([case.label[0] > 0 for case in slices])
    image = np.stack(
        [case.image[0] / np.median(case.image[0][true]) for case, true in zip(slices, mask, strict=True)]
    )
    levels = np.linspace(0.5, 1.5, 41)
    assert max(dice(image > level, mask) for level in levels) < 30.0
    assert max(dice((image > low) & (image < low + 0.3), mask) for low in levels) < 30.0


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
        ((2, 64, 0, 4), "dimensions is 4, expected 2 .*or 3"),
    ],
)
def test_refuses_bad_arguments(arguments: tuple[int, ...], found: str) -> None:
    with pytest.raises(ValueError, match=f"cord_phantom: {found}"):
        cord_phantom(*arguments)
