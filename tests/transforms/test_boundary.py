"""Boundary weights against the distances counted pixel by pixel, and what has no boundary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from monai_unetq.transforms import BoundaryWeight, BoundaryWeightd
from monai_unetq.transforms.boundary import boundary_distance

label_maps = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.integers(0, 3)
)


def distances_by_definition(labels: np.ndarray, ignore: int | None) -> np.ndarray:
    """All pairs of pixels."""
    pixels, classes = np.argwhere(np.ones_like(labels)), labels.ravel()
    pairs = np.linalg.norm(pixels[:, None] - pixels[None], axis=-1)
    other = classes[:, None] != classes[None]
    if ignore is not None:
        other &= (classes[:, None] != ignore) & (classes[None] != ignore)
    nearest: np.ndarray = np.where(other, pairs, np.inf).min(1)
    return nearest.reshape(labels.shape)


@given(labels=label_maps, ignore=st.sampled_from([None, 0, 3]))
def test_distance_is_to_the_nearest_pixel_of_another_class(labels: np.ndarray, ignore: int | None) -> None:
    assert np.allclose(boundary_distance(labels, ignore), distances_by_definition(labels, ignore))


@given(labels=label_maps, sigma=st.floats(0.3, 10), weight=st.floats(0, 20))
def test_weights_follow_the_formula(
    as_kind: Callable[[np.ndarray], Any], labels: np.ndarray, sigma: float, weight: float
) -> None:
    out = BoundaryWeight(sigma, weight, ignore_label=3)(as_kind(labels[None]))
    distance = distances_by_definition(labels, 3)
    expected = np.where(labels == 3, 0.0, 1 + weight * np.exp(-(distance**2) / (2 * sigma**2)))
    assert out.dtype == torch.float32
    assert out.shape == (1, *labels.shape)
    assert np.allclose(out[0].numpy(), expected, rtol=1e-6)


def test_by_hand() -> None:
    out = BoundaryWeight(sigma=1, weight=10)(np.array([[0, 0, 1, 1, 1]]))
    near, far, farther = (1 + 10 * math.exp(-d * d / 2) for d in (1, 2, 3))
    assert out[0].tolist() == pytest.approx([far, near, near, far, farther])


def test_binary_mask_agrees_with_scipy() -> None:
    mask = np.random.default_rng(3).random((40, 30)) > 0.8
    distance = ndimage.distance_transform_edt(mask) + ndimage.distance_transform_edt(~mask)
    expected = 1 + 4 * np.exp(-(distance**2) / 18)
    assert np.allclose(BoundaryWeight(3, 4)(mask[None])[0].numpy(), expected)


def test_one_hot_is_read_as_its_label_map(as_kind: Callable[[np.ndarray], Any]) -> None:
    labels = np.random.default_rng(4).integers(0, 3, (6, 7))
    one_hot = np.stack([labels == index for index in range(3)])
    assert torch.equal(BoundaryWeight()(as_kind(one_hot)), BoundaryWeight()(as_kind(labels[None])))


@pytest.mark.parametrize("shape", [(1, 5), (1, 4, 5), (1, 3, 4, 5)])
def test_one_class_has_no_boundary(shape: tuple[int, ...]) -> None:
    assert (BoundaryWeight()(np.full(shape, 2)) == 1).all()


def test_ignored_pixels_weigh_nothing_and_make_no_boundary() -> None:
    labels = np.array([[1, 1, 9, 9, 1]])
    assert BoundaryWeight(ignore_label=9)(labels).tolist() == [[1, 1, 0, 0, 1]]
    assert (BoundaryWeight(ignore_label=9)(np.full((1, 3, 3), 9)) == 0).all()


def test_the_weight_stands_beside_the_label() -> None:
    label = np.array([[0, 1]])
    out = BoundaryWeightd("label", sigma=2, weight=3)({"label": label})
    assert torch.equal(out["label_weight"], BoundaryWeight(2, 3)(label))
    assert out["label"] is label
    assert set(BoundaryWeightd("label", output_postfix="w")({"label": label})) == {"label", "label_w"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0}, "sigma is 0"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"weight": -1}, "weight is -1"),
        ({"weight": math.inf}, "weight is inf"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoundaryWeight(**arguments)


def test_one_hot_with_an_ignore_label_is_refused() -> None:
    with pytest.raises(ValueError, match="one-hot has no ignored pixels"):
        BoundaryWeight(ignore_label=2)(np.eye(2))
