"""How data enter and leave a transform: as a plain tensor to compute on, and with the metadata they came with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.data.meta_tensor import get_spatial_ndim
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

__all__ = ["BACKENDS", "channel_first", "label_map", "like"]

BACKENDS = [TransformBackends.TORCH, TransformBackends.NUMPY]
"""What our transforms declare: they take arrays and tensors, and compute on tensors."""


def channel_first(name: str, data: NdarrayOrTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read an array of shape (C, spatial…) the way MONAI's intensity transforms do.

    Args:
        name: the transform, for the message.
        data: numpy array, tensor or MetaTensor of real numbers, channel first, one to three spatial axes.

    Returns:
        what the result is to look like (a MetaTensor while MONAI tracks metadata, else a tensor), and the same
        values as a plain tensor without gradient.

    Raises:
        TypeError: ``data`` is neither an array nor a tensor, or does not hold real numbers.
        ValueError: the number of axes is not 2, 3 or 4, or there are no values.
    """
    if not isinstance(data, (np.ndarray, torch.Tensor)):
        raise TypeError(
            f"{name}: found {type(data).__name__}; expected a numpy array or a tensor. Load it first"
        )
    dtype: Any = data.dtype
    real = dtype.kind in "biuf" if isinstance(data, np.ndarray) else not dtype.is_complex
    if not real:
        raise TypeError(f"{name}: found data of type {dtype}; expected real numbers. Convert them to float32")
    if data.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name}: found shape {tuple(data.shape)}; expected a channel axis and one to three spatial axes. Add "
            "the channel axis with EnsureChannelFirst, and give one item, not a batch"
        )
    if 0 in data.shape:
        raise ValueError(
            f"{name}: found shape {tuple(data.shape)}, which holds no values; expected at least one"
        )
    tracked = convert_to_tensor(data, track_meta=get_track_meta())
    return tracked, convert_to_tensor(tracked, track_meta=False).detach()


def label_map(name: str, data: NdarrayOrTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a label map of shape (1, spatial…), or a one-hot one of shape (classes, spatial…).

    Args:
        name: the transform, for the message.
        data: whole numbers of any type; one-hot of 0 and 1 with exactly one 1 per pixel.

    Returns:
        what the result is to look like, see :func:`channel_first`, and the classes, shape (spatial…), int64.

    Raises:
        TypeError: ``data`` is neither an array nor a tensor, or does not hold real numbers.
        ValueError: the shape is wrong, a value is not a whole number, or several channels are not one-hot.
    """
    tracked, labels = channel_first(name, data)
    classes = labels.to(torch.int64)
    if labels.is_floating_point() and not torch.equal(classes.to(labels.dtype), labels):
        raise ValueError(
            f"{name}: the label map holds values that are not whole numbers, or NaN; expected classes. Resample "
            "label maps with mode='nearest'"
        )
    if classes.shape[0] == 1:
        return tracked, classes[0]
    if bool((classes < 0).any()) or not bool((classes.sum(0) == 1).all()):
        raise ValueError(
            f"{name}: {classes.shape[0]} channels that are not one-hot; expected (1, spatial…) with the class of "
            "each pixel, or one channel per class with exactly one 1 per pixel. Give the label map itself"
        )
    return tracked, classes.argmax(0)


def like(result: torch.Tensor, tracked: torch.Tensor) -> torch.Tensor:
    """``result``, of its own dtype, as the kind of tensor that ``tracked`` is, with a copy of its metadata."""
    out = convert_to_dst_type(result, dst=tracked, dtype=result.dtype)[0]
    if isinstance(out, MetaTensor):
        out.spatial_ndim = get_spatial_ndim(out)  # the result may have fewer axes than what it was made from
    return out
