"""Targets at coarser scales: thin structures survive, fractions are right, the grid is where it should be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.data import MetaTensor

from monai_unetq.transforms import SkipTargets, SkipTargetsd

label_maps = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=1, max_dims=3, max_side=7), elements=st.integers(0, 3)
)


def blocks(labels: np.ndarray, scale: int) -> tuple[tuple[int, ...], dict[tuple[int, ...], np.ndarray]]:
    """Size of the target, and the pixels of each block of a padded map."""
    shape = tuple(math.ceil(size / scale) for size in labels.shape)
    padding = [(0, n * scale - size) for n, size in zip(shape, labels.shape, strict=True)]
    padded = np.pad(labels, padding, mode="edge")
    return shape, {
        index: padded[tuple(slice(i * scale, (i + 1) * scale) for i in index)]
        for index in itertools.product(*(range(n) for n in shape))
    }


def balanced_oracle(labels: np.ndarray, scale: int, ignore: int | None) -> np.ndarray:
    """The definition with exact fractions, block by block."""
    shape, pieces = blocks(labels, scale)
    valid = labels[labels != ignore] if ignore is not None else labels.ravel()
    target = np.empty(shape, dtype=np.int64)
    for index, piece in pieces.items():
        inside = piece[piece != ignore] if ignore is not None else piece.ravel()
        if inside.size == 0:
            assert ignore is not None
            target[index] = ignore
            continue
        target[index] = max(
            np.unique(inside).tolist(),
            key=lambda c: (
                Fraction(int((inside == c).sum()), inside.size)
                / Fraction(int((valid == c).sum()), valid.size),
                -int((valid == c).sum()),
                -c,
            ),
        )
    return target


@given(labels=label_maps, scale=st.integers(1, 4), ignore=st.sampled_from([None, 0, 3]))
def test_balanced_is_the_most_over_represented_class(
    as_kind: Callable[[np.ndarray], Any], labels: np.ndarray, scale: int, ignore: int | None
) -> None:
    (target,) = SkipTargets(scale, ignore_label=ignore)(as_kind(labels[None]))
    assert target.dtype == torch.int64
    assert np.array_equal(target[0].numpy(), balanced_oracle(labels, scale, ignore))


@given(labels=label_maps, scale=st.integers(1, 4), ignore=st.sampled_from([None, 2, 255]), data=st.data())
def test_area_is_the_fraction_of_the_block(
    as_kind: Callable[[np.ndarray], Any],
    labels: np.ndarray,
    scale: int,
    ignore: int | None,
    data: st.DataObject,
) -> None:
    if ignore is not None:
        labels = np.where(data.draw(hnp.arrays(np.bool_, labels.shape)), ignore, labels)
    (target,) = SkipTargets(scale, "area", num_classes=4, ignore_label=ignore)(as_kind(labels[None]))
    shape, pieces = blocks(labels, scale)
    assert target.dtype == torch.float32
    assert target.shape == (4, *shape)
    for index, piece in pieces.items():
        inside = piece[piece != ignore]
        expected = [np.mean(inside == c) if inside.size else ignore for c in range(4)]
        assert [float(channel[index]) for channel in target.numpy()] == pytest.approx(expected, abs=1e-6)


def test_by_hand() -> None:
    # A membrane (1) one pixel wide in a corner of each block: 2 of 16 pixels. In its blocks it takes 1/4, twice
    # its share of the image; nearest neighbour and majority would lose it.
    labels = np.zeros((1, 4, 4), dtype=np.uint8)
    labels[0, 1, 1] = labels[0, 2, 2] = 1
    half, quarter = SkipTargets((2, 4))(labels)
    assert half.tolist() == [[[1, 0], [0, 1]]]
    assert half.dtype == torch.uint8
    assert quarter.tolist() == [[[1]]]  # the block is the image, all classes are equal: the rarer one
    (area,) = SkipTargets(2, "area")(labels)
    assert area.tolist() == [[[0.25, 0], [0, 0.25]]]


def test_either_class_may_be_the_thin_one() -> None:
    labels = np.zeros((1, 16, 16), dtype=np.uint8)
    labels[0, 5] = 1
    for line in (labels, 1 - labels):
        (target,) = SkipTargets(4)(line)
        thin = line[0, 5, 0]
        assert (target[0, 1] == thin).all()
        assert (target[0, [0, 2, 3]] == 1 - thin).all()


def test_odd_sizes_repeat_the_last_pixel() -> None:
    (area,) = SkipTargets(2, "area")(np.array([[0, 0, 1]]))
    assert area.tolist() == [[0.0, 1.0]]
    (area,) = SkipTargets(4, "area")(np.array([[1, 0, 0]]))
    assert area.tolist() == [[0.25]]


def test_full_resolution_is_the_label_itself() -> None:
    labels = np.array([[[0, 2], [5, 0]]], dtype=np.int16)
    (target,) = SkipTargets(1)(labels)
    assert target.tolist() == labels.tolist()


def test_ignored_pixels() -> None:
    labels = np.array([[255, 255, 1, 255, 0, 0, 0, 255]])
    (balanced,) = SkipTargets(2, ignore_label=255)(labels)
    assert balanced.tolist() == [[255, 1, 0, 0]]
    (area,) = SkipTargets(2, "area", ignore_label=255)(labels)
    assert area.tolist() == [[255.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.bool_])
def test_one_hot_gives_one_hot(as_kind: Callable[[np.ndarray], Any], dtype: Any) -> None:
    labels = np.random.default_rng(1).integers(0, 3, (5, 6))
    one_hot = np.stack([labels == index for index in range(3)]).astype(dtype)
    (target,) = SkipTargets(2)(as_kind(one_hot))
    (expected,) = SkipTargets(2)(labels[None])
    assert target.shape == (3, 3, 3)
    assert target.dtype == torch.from_numpy(one_hot).dtype
    assert (target.sum(0) == 1).all()
    assert torch.equal(target.to(torch.int64).argmax(0), expected[0])
    (soft,) = SkipTargets(2, "area", num_classes=3)(as_kind(one_hot))
    assert torch.equal(soft, SkipTargets(2, "area", num_classes=3)(labels[None])[0])


def test_affine_is_that_of_the_coarser_grid() -> None:
    affine = torch.tensor(
        [[0.0, -2, 0, 10], [3.0, 0, 0, 20], [0, 0, 5, 30], [0, 0, 0, 1]], dtype=torch.float64
    )
    pixdim = np.array([1.0, 3.0, 2.0, 5.0])
    label = MetaTensor(torch.zeros(1, 8, 8), affine=affine, meta={"pixdim": pixdim, "name": "07"})
    (target,) = SkipTargets(4)(label)
    assert isinstance(target, MetaTensor)
    # The centre of the first block lies between pixels 1 and 2, at 1.5, and the next one 4 pixels on.
    for pixel in ((0, 0), (1, 0), (0, 1)):
        fine = affine @ torch.tensor([pixel[0] * 4 + 1.5, pixel[1] * 4 + 1.5, 0, 1], dtype=torch.float64)
        coarse = target.affine @ torch.tensor([*pixel, 0, 1], dtype=torch.float64)
        assert torch.allclose(fine, coarse)
    assert target.pixdim.tolist()[:2] == [12, 8]
    assert target.meta["pixdim"].tolist() == [1, 12, 8, 5]
    assert target.meta["name"] == "07"
    assert torch.equal(label.affine, affine)
    assert pixdim.tolist() == [1, 3, 2, 5]


def test_affine_of_a_volume() -> None:
    label = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    (target,) = SkipTargets(2)(label)
    assert isinstance(target, MetaTensor)
    assert target.affine.diagonal().tolist() == [2, 4, 6, 1]
    assert target.affine[:3, 3].tolist() == [0.5, 1.0, 1.5]


def test_keys_are_key_and_scale() -> None:
    out = SkipTargetsd(["label", "mask"], scales=(2, 4))(
        {"label": np.zeros((1, 8, 8)), "mask": np.ones((1, 8, 6)), "other": 3}
    )
    assert set(out) == {"label", "label_2", "label_4", "mask", "mask_2", "mask_4", "other"}
    assert out["mask_4"].shape == (1, 2, 2)
    assert isinstance(out["label"], np.ndarray)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": (0,)}, r"scales are \(0,\)"),
        ({"scales": (2, 2)}, "different whole numbers"),
        ({"scales": ()}, r"scales are \(\)"),
        ({"scales": (1.5,)}, "whole numbers"),
        ({"mode": "nearest"}, "mode is 'nearest'"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"mode": "area", "ignore_label": 1}, "ignore label is 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipTargets(**arguments)


@pytest.mark.parametrize(
    ("transform", "label", "message"),
    [
        (SkipTargets(2, "area"), np.array([[0, 2]]), "holds class 2; mode 'area' has num_classes=2"),
        (SkipTargets(2, "area"), np.array([[0, -1]]), "holds class -1"),
        (SkipTargets(2, "area"), np.eye(3), "one-hot label of 3 channels and num_classes=2"),
        (SkipTargets(2, ignore_label=255), np.eye(2), "one-hot has no ignored pixels"),
    ],
)
def test_wrong_labels_are_refused(transform: SkipTargets, label: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform(label)
