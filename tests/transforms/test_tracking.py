"""What transforms take, and the form they give back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, set_track_meta
from monai.transforms import ScaleIntensity

from monai_unetq.transforms.tracking import channel_first, label_map, like


def test_result_is_of_the_kind_that_monais_own_transforms_give(as_kind: Callable[[np.ndarray], Any]) -> None:
    data = as_kind(np.random.default_rng(0).random((1, 4, 5), dtype=np.float32))
    tracked, plain = channel_first("T", data)
    assert type(plain) is torch.Tensor
    assert type(like(plain, tracked)) is type(ScaleIntensity()(data))


def test_metadata_is_copied() -> None:
    image = MetaTensor(torch.ones(1, 2, 2), affine=torch.eye(4) * 3, meta={"patient": "07"})
    tracked, plain = channel_first("T", image)
    out = like(plain + 1, tracked)
    assert isinstance(out, MetaTensor)
    assert out.meta["patient"] == "07"
    assert torch.equal(out.affine, image.affine)
    out.meta["patient"] = "08"
    assert image.meta["patient"] == "07"


def test_without_tracking_there_is_no_metadata() -> None:
    set_track_meta(False)
    try:
        tracked, plain = channel_first("T", np.ones((1, 2, 2)))
        assert type(like(plain, tracked)) is torch.Tensor
    finally:
        set_track_meta(True)


def test_result_of_fewer_axes_has_as_many_spatial_ones() -> None:
    tracked, _ = channel_first("T", MetaTensor(torch.ones(1, 2, 2, 2)))
    out = like(torch.ones(1, 4), tracked)
    assert isinstance(out, MetaTensor)
    assert out.spatial_ndim == 1


def test_gradients_end_here() -> None:
    _, plain = channel_first("T", torch.ones(1, 3, requires_grad=True))
    assert not plain.requires_grad


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([[1.0]], TypeError, r"found list; expected a numpy array or a tensor"),
        (np.ones((1, 2), dtype=complex), TypeError, r"type complex128; expected real"),
        (torch.ones(1, 2, dtype=torch.complex64), TypeError, r"type torch.complex64; expected real"),
        (np.array([["a"]]), TypeError, r"expected real"),
        (np.ones(4), ValueError, r"T: found shape \(4,\); expected a channel axis"),
        (torch.ones(2, 1, 4, 4, 4), ValueError, r"not a batch"),
        (np.ones((1, 0, 4)), ValueError, r"holds no values"),
    ],
)
def test_other_data_are_refused(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        channel_first("T", data)


def test_label_map_reads_whole_numbers_and_one_hot(as_kind: Callable[[np.ndarray], Any]) -> None:
    labels = np.array([[0, 2, 1], [1, 0, 2]])
    one_hot = np.stack([labels == index for index in range(3)])
    for data in (labels[None], labels[None].astype(np.float32), labels[None].astype(np.uint8), one_hot):
        _, read = label_map("T", as_kind(data))
        assert read.dtype == torch.int64
        assert np.array_equal(read.numpy(), labels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.array([[0.0, 0.5]]), "not whole numbers"),
        (np.array([[0.0, np.nan]]), "not whole numbers"),
        (np.array([[0.0, np.inf]]), "not whole numbers"),
        (np.array([[1, 0], [1, 1]]), "2 channels that are not one-hot"),
        (np.array([[2, 0], [-1, 1]]), "not one-hot"),
        (np.array([[0, 0], [0, 1]]), "not one-hot"),
    ],
)
def test_what_is_no_label_map_is_refused(data: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_map("T", data)
