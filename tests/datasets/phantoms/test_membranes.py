"""The membrane phantom: the same for a seed, of the promised form, and like EM where it matters."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from monai_unetq.datasets import Case, membrane_phantom

Mask = npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def stack() -> list[Case]:
    return membrane_phantom()


def membranes(cases: list[Case]) -> Mask:
    return np.stack([case.label[0] == 0 for case in cases])


def iou(first: Mask, second: Mask) -> float:
    return float((first & second).sum() / (first | second).sum())


def test_form(stack: list[Case]) -> None:
    assert [case.name for case in stack] == [f"{index:02d}" for index in range(24)]
    for case in stack:
        assert case.image.shape == case.label.shape == (1, 192, 192)
        assert case.image.dtype == np.float32
        assert case.label.dtype == np.uint8
        assert case.image.min() >= 0.0
        assert case.image.max() <= 1.0
        assert set(np.unique(case.label)) == {0, 1}
        np.testing.assert_array_equal(np.rint(case.image * 255) / np.float32(255), case.image)


@pytest.mark.parametrize(("count", "size"), [(1, 32), (3, 65), (2, 100)])
def test_other_counts_and_sizes(count: int, size: int) -> None:
    cases = membrane_phantom(count, size)
    assert len(cases) == count
    assert all(case.image.shape == case.label.shape == (1, size, size) for case in cases)
    assert all(np.isfinite(case.image).all() for case in cases)


def test_same_seed_same_stack() -> None:
    np.random.seed(1)
    first = membrane_phantom(3, 64, seed=5)
    np.random.seed(2)
    second = membrane_phantom(3, 64, seed=5)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.label, other.label)


def test_other_seed_other_stack() -> None:
    first, second = membranes(membrane_phantom(2, 96, seed=5)), membranes(membrane_phantom(2, 96, seed=6))
    assert iou(first, second) < 0.3


def test_numbers_do_not_depend_on_the_platform(stack: list[Case]) -> None:
    images = np.stack([case.image for case in stack]).astype(np.float64)
    assert float(images.mean()) == pytest.approx(0.50791, abs=1e-4)
    assert float(images.std()) == pytest.approx(0.17035, abs=1e-4)
    assert [int((case.label == 0).sum()) for case in stack[:3]] == pytest.approx([7814, 8559, 8551], abs=3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_membrane_fraction(seed: int) -> None:
    fractions = membranes(membrane_phantom(8, 192, seed)).mean(axis=(1, 2))
    assert 0.21 < fractions.mean() < 0.23
    assert fractions.min() > 0.12
    assert fractions.max() < 0.36


def test_neighbouring_slices_are_alike(stack: list[Case]) -> None:
    masks = membranes(stack)
    alike = {
        step: np.mean([iou(a, b) for a, b in zip(masks, masks[step:], strict=False)]) for step in (1, 2, 8)
    }
    assert alike[1] > alike[2] + 0.05
    assert alike[2] > alike[8] + 0.02
    assert 0.2 < alike[1] < 0.5  # neighbours, not copies


def test_grey_values_are_like_em(stack: list[Case]) -> None:
    # ISBI 2012 training slices: image 0.49 +- 0.17, membrane 0.33 +- 0.13, interior 0.54 +- 0.15
    images, mask = np.stack([case.image[0] for case in stack]), membranes(stack)
    assert images.mean() == pytest.approx(0.49, abs=0.04)
    assert images.std() == pytest.approx(0.17, abs=0.03)
    assert images[mask].mean() == pytest.approx(0.33, abs=0.04)
    assert images[~mask].mean() == pytest.approx(0.54, abs=0.04)


def test_a_threshold_does_not_solve_it(stack: list[Case]) -> None:
    images, mask = np.stack([case.image[0] for case in stack]), membranes(stack)
    dice = []
    for threshold in np.linspace(0.1, 0.7, 31):
        dark = images < threshold
        dice.append(2 * (dark & mask).sum() / (dark.sum() + mask.sum()))
    assert 0.55 < max(dice) < 0.75  # of the membrane; 0.66 on ISBI 2012


@pytest.mark.parametrize(
    ("arguments", "found"), [((0, 64), "count is 0"), ((2, 31), "size is 31"), ((2, 64, -1), "seed")]
)
def test_refuses_small_arguments(arguments: tuple[int, ...], found: str) -> None:
    with pytest.raises(ValueError, match=f"{found}.*expected at least"):
        membrane_phantom(*arguments)


def test_slices_have_no_spacing_and_no_group(stack: list[Case]) -> None:
    assert {(case.spacing, case.group) for case in stack} == {((), "")}


@pytest.fixture(scope="module")
def stacks() -> list[Case]:
    return membrane_phantom(2, 96, seed=3, dimensions=3)


def test_form_of_stacks(stacks: list[Case]) -> None:
    assert [case.name for case in stacks] == ["00", "01"]
    for case in stacks:
        assert case.image.shape == case.label.shape == (1, 16, 96, 96)
        assert case.image.dtype == np.float32
        assert case.label.dtype == np.uint8
        assert case.image.min() >= 0.0
        assert case.image.max() <= 1.0
        assert case.spacing == (5e-5, 4e-6, 4e-6)
        assert 0.21 < (case.label == 0).mean() < 0.23
    assert iou(stacks[0].label == 0, stacks[1].label == 0) < 0.3


def test_neighbouring_slices_of_a_stack_are_alike(stacks: list[Case]) -> None:
    for case in stacks:
        wall = case.label[0] == 0
        near = np.mean([iou(one, other) for one, other in pairwise(wall)])
        far = np.mean([iou(one, other) for one, other in zip(wall, wall[8:], strict=False)])
        assert near > far + 0.05


def test_the_first_stack_is_the_2d_phantom_of_as_many_slices(stacks: list[Case]) -> None:
    slices = membrane_phantom(16, 96, seed=3)
    np.testing.assert_array_equal(stacks[0].image[0], np.concatenate([case.image for case in slices]))


def test_default_number_of_stacks() -> None:
    assert len(membrane_phantom(size=32, dimensions=3)) == 4


def test_refuses_other_dimensions() -> None:
    with pytest.raises(ValueError, match=r"membrane_phantom: dimensions is 1, expected 2 .* or 3"):
        membrane_phantom(2, 64, dimensions=1)
