"""Targets at the resolutions of the skip connections, made from a label map so that thin structures survive."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import MetaKeys, ensure_tuple

from .tracking import BACKENDS, label_map, like

__all__ = ["Mode", "SkipTargets", "SkipTargetsD", "SkipTargetsDict", "SkipTargetsd"]

Mode = Literal["balanced", "area"]


class SkipTargets(Transform):
    r"""Targets for supervising skip connections: a label map at 1/2, 1/4, … of its resolution.

    At scale s every target pixel stands for a block of s pixels along each axis. Sizes that s does not divide are
    padded at the far end by repetition of the last pixel: a target has ``ceil(size / s)`` pixels.

    - ``"balanced"``: the block takes the class that is most over-represented in it,
      :math:`\arg\max_c f_c(\mathrm{block}) / f_c(\mathrm{image})`, with :math:`f_c` the fraction of the pixels
      of class c. Majority and nearest-neighbour downsampling lose what is thinner than a block; here, of two
      classes, a membrane of 2 % of the image wins its block with any 2 % and more of its pixels, whichever
      class is the thin one. Where two classes are equal, the rarer one in the image wins, then the lower one.
    - ``"area"``: the fraction of the block that a class takes, for losses with soft targets. Two classes: one
      channel, the fraction of class 1. More: one channel per class, in sum 1.

    Pixels of the ``ignore_label`` count neither in blocks nor in the image. A block of only such pixels is
    ignored too: all its channels are the ``ignore_label``.

    Args:
        scales: whole numbers from 1 on; 1 is the full resolution.
        mode: ``"balanced"`` or ``"area"``.
        num_classes: in mode ``"area"``, the number of classes, 0 … ``num_classes - 1``. Mode ``"balanced"``
            takes any classes and does not read it.
        ignore_label: the value of pixels without a label.

    Raises:
        ValueError: a scale is not a whole number from 1 on, there are none or one twice, the mode is unknown,
            there are fewer than two classes, or in mode ``"area"`` the ignore label is 0 or 1, which could not
            be told from a fraction.
    """

    backend = BACKENDS

    def __init__(
        self,
        scales: Sequence[int] | int = (2, 4, 8),
        mode: Mode = "balanced",
        num_classes: int = 2,
        ignore_label: int | None = None,
    ) -> None:
        self.scales: tuple[int, ...] = ensure_tuple(scales)
        whole = all(isinstance(scale, int) and scale >= 1 for scale in self.scales)
        if not self.scales or not whole or len(set(self.scales)) < len(self.scales):
            raise ValueError(
                f"SkipTargets: the scales are {self.scales}; expected different whole numbers from 1 on, such as (2, 4)"
            )
        if mode not in ("balanced", "area"):
            raise ValueError(f"SkipTargets: the mode is {mode!r}; expected 'balanced' or 'area'")
        if num_classes < 2:
            raise ValueError(
                f"SkipTargets: num_classes is {num_classes}; expected at least 2, the background counts as one"
            )
        if mode == "area" and ignore_label in (0, 1):
            raise ValueError(
                f"SkipTargets: the ignore label is {ignore_label}, which in mode 'area' is also a fraction. Map it to "
                "another value first, such as 255"
            )
        self.mode = mode
        self.num_classes = num_classes
        self.ignore_label = ignore_label

    def __call__(self, img: NdarrayOrTensor) -> tuple[torch.Tensor, ...]:
        """Targets at all scales.

        Args:
            img: a label map (1, spatial…) of whole numbers, or one-hot (classes, spatial…); one to three
                spatial axes.

        Returns:
            one target per scale. ``"balanced"``: in the form of the input (one channel, or one-hot), of its
            dtype. ``"area"``: float32, one channel for two classes, else ``num_classes`` channels. The affine of
            a MetaTensor is that of the coarser grid: voxels s times as large, the first one centred on its block.

        Raises:
            TypeError: the input is not an array or tensor of real numbers.
            ValueError: it is no label map; in mode ``"area"``, a class is not below ``num_classes``, or it is
                one-hot with another number of channels; or it is one-hot and there is an ``ignore_label``, which
                one-hot cannot hold.
        """
        tracked, labels = label_map("SkipTargets", img)
        channels = tracked.shape[0]
        if channels > 1 and self.ignore_label is not None:
            raise ValueError(
                f"SkipTargets: a one-hot label of {channels} channels and ignore_label={self.ignore_label}; one-hot "
                "has no ignored pixels. Give the label map itself"
            )
        if self.mode == "area":
            classes = self._classes(labels, channels)
            targets = [area_fractions(labels, scale, classes, self.ignore_label) for scale in self.scales]
        else:
            counts = class_counts(labels, self.ignore_label)
            coarse = [balanced_labels(labels, scale, counts, self.ignore_label) for scale in self.scales]
            if channels > 1:
                targets = [torch.stack([c == index for index in range(channels)]) for c in coarse]
            else:
                targets = [c[None] for c in coarse]
            targets = [target.to(tracked.dtype) for target in targets]
        return tuple(_on_coarser_grid(t, tracked, s) for t, s in zip(targets, self.scales, strict=True))

    def _classes(self, labels: torch.Tensor, channels: int) -> range:
        """The classes that get a channel in mode ``"area"``."""
        if channels not in (1, self.num_classes):
            raise ValueError(
                f"SkipTargets: a one-hot label of {channels} channels and num_classes={self.num_classes}; expected "
                f"one channel per class. Set num_classes={channels}"
            )
        valid = labels[_valid(labels, self.ignore_label)]
        outside = valid[(valid < 0) | (valid >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"SkipTargets: the label map holds class {int(outside[0])}; mode 'area' has num_classes="
                f"{self.num_classes}, 0 to {self.num_classes - 1}. Raise num_classes, or name an ignore_label"
            )
        return range(1, 2) if self.num_classes == 2 else range(self.num_classes)


def area_fractions(
    labels: torch.Tensor, scale: int, classes: Sequence[int], ignore_label: int | None = None
) -> torch.Tensor:
    """The fraction of each block's valid pixels that each class takes.

    Args:
        labels: shape (spatial…), int64.
        scale: pixels of a block along each axis.
        classes: which classes.
        ignore_label: the value of pixels that do not count.

    Returns:
        shape (len(classes), ceil(spatial / scale)…), float32; ``ignore_label`` in blocks without a valid pixel.
    """
    valid = _valid(labels, ignore_label)
    counted = _block_sums(valid, scale)
    fractions = torch.stack(
        [_block_sums(valid & (labels == index), scale) for index in classes]
    ) / counted.clamp(min=1)
    if ignore_label is not None:
        fractions[:, counted == 0] = float(ignore_label)
    return fractions.to(torch.float32)


def class_counts(labels: torch.Tensor, ignore_label: int | None = None) -> dict[int, int]:
    """How many pixels each class has, rarer classes first, then lower ones; without the ``ignore_label``."""
    values, counts = labels.unique(return_counts=True)
    rarest_first = sorted(zip(counts.tolist(), values.tolist(), strict=True))
    return {value: count for count, value in rarest_first if value != ignore_label}


def balanced_labels(
    labels: torch.Tensor, scale: int, counts: Mapping[int, int], ignore_label: int | None = None
) -> torch.Tensor:
    """The most over-represented class of each block, see :class:`SkipTargets`.

    Args:
        labels: shape (spatial…), int64.
        scale: pixels of a block along each axis.
        counts: the classes and how many pixels of the image they have; of equal ones the first wins.
        ignore_label: the value of blocks with no pixel of ``counts``.

    Returns:
        shape (ceil(spatial / scale)…), int64.
    """
    # The number of valid pixels of the block and of the image are the same for all classes: fractions need not be
    # formed, and equal quotients of whole numbers are equal in float64.
    best = torch.zeros([math.ceil(size / scale) for size in labels.shape], device=labels.device).double()
    winner = torch.full_like(best, 0 if ignore_label is None else ignore_label, dtype=torch.int64)
    for value, count in counts.items():
        score = _block_sums(labels == value, scale) / count
        winner = torch.where(score > best, value, winner)
        best = torch.maximum(score, best)
    return winner


def _valid(labels: torch.Tensor, ignore_label: int | None) -> torch.Tensor:
    return torch.ones_like(labels, dtype=torch.bool) if ignore_label is None else labels != ignore_label


def _block_sums(mask: torch.Tensor, scale: int) -> torch.Tensor:
    """How many pixels of each block are set, float64; the last pixel repeated where a block is not full."""
    sums = mask.to(torch.int32)
    for axis, size in enumerate(mask.shape):
        blocks = math.ceil(size / scale)
        if blocks * scale > size:
            nearest = torch.arange(blocks * scale, device=mask.device).clamp(max=size - 1)
            sums = sums.index_select(axis, nearest)
        # Added up slice by slice: a reduction over such short axes takes many times as long.
        slices = sums.unflatten(axis, (blocks, scale)).unbind(axis + 1)
        sums = slices[0].clone()
        for further in slices[1:]:
            sums += further
    return sums.to(torch.float64)


def _on_coarser_grid(target: torch.Tensor, tracked: torch.Tensor, scale: int) -> torch.Tensor:
    out = like(target, tracked)
    if isinstance(out, MetaTensor) and isinstance(tracked, MetaTensor):
        affine = tracked.affine.clone()
        axes = min(tracked.ndim - 1, affine.shape[-1] - 1)
        affine[:, -1] += affine[:, :axes].sum(1) * (scale - 1) / 2
        affine[:, :axes] *= scale
        out.affine = affine
        if MetaKeys.PIXDIM in out.meta:
            pixdim = deepcopy(out.meta[MetaKeys.PIXDIM])
            pixdim[1 : 1 + axes] *= scale
            out.meta[MetaKeys.PIXDIM] = pixdim
    return out


class SkipTargetsd(MapTransform):
    """Dictionary version of :class:`SkipTargets`.

    The target of ``label`` at scale 2 goes to the new key ``label_2``; the label itself stays. Put it behind the
    transforms that change the grid: they would have to change every target, too.

    Args:
        keys: the label maps; see :class:`monai.transforms.MapTransform`.
        scales: see :class:`SkipTargets`.
        mode: see :class:`SkipTargets`.
        num_classes: see :class:`SkipTargets`.
        ignore_label: see :class:`SkipTargets`.
        allow_missing_keys: pass over keys that are absent instead of raising ``KeyError``.
    """

    backend = SkipTargets.backend

    def __init__(
        self,
        keys: KeysCollection,
        scales: Sequence[int] | int = (2, 4, 8),
        mode: Mode = "balanced",
        num_classes: int = 2,
        ignore_label: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.targets = SkipTargets(scales, mode, num_classes, ignore_label)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` with the targets of every key beside it."""
        d = dict(data)
        for key in self.key_iterator(d):
            for scale, target in zip(self.targets.scales, self.targets(d[key]), strict=True):
                d[f"{key}_{scale}"] = target
        return d


SkipTargetsD = SkipTargetsDict = SkipTargetsd
