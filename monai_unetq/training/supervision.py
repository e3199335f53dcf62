"""``SkipSupervisionLoss``: the segmentation loss, and beside it what the heads on the skip connections get wrong, and
how far the prediction is from a teacher's.

    L = L_seg(prediction, target) + λ · Σₛ wₛ · (½·CE(zₛ, tₛ) + ½·(1 - Dice(zₛ, tₛ))) + μ · KL(teacher ‖ prediction)

with Σₛ wₛ = 1, the logits zₛ of skip s, the target tₛ brought to its resolution, and wₛ halved from one resolution to the
next lower one, as in nnU-Net's deep supervision (Guo et al., ISCAS 2022, give heads and their sigmoid; the form of their
loss is ours). The last term is knowledge distillation (Hinton et al., 2015) at temperature 1, pixel by pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..surgery import SupervisedOutput

__all__ = ["SkipSupervisionLoss", "supervision_weight", "targets_at"]

_POOLS: dict[int, Callable[..., Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}
_LARGEST: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

Targets = Literal["balanced", "area"]


class SkipSupervisionLoss(nn.Module):
    """A segmentation loss that also supervises the skip connections; see this module for the formula.

    Of a network without heads and teacher, or in evaluation, it is the segmentation loss alone. Deep supervision's lists
    go to the segmentation loss as they are; the heads learn from the target of full resolution, the first, and only the
    prediction of full resolution is compared with the teacher's. There, classes compete (softmax) with a label map or
    ``activation="softmax"``; regions and a single channel do not (sigmoid). The teacher is also heard where labels are
    ignored.

    The target is a label map (N, 1, spatial…) of whole numbers, or has one channel for each class or region
    (N, num_classes, spatial…), in [0, 1], and where there is an ``ignore_label``, one more that is 1 where nothing counts
    (as nnU-Net's regions have it). ``targets_at`` says how it gets to a skip's resolution. The number of heads'
    channels decides: one channel, ``sigmoid``, and label 1 is the foreground.

    All heads take part in the sum whatever λ is, so that ``DistributedDataParallel`` finds no unused parameters.

    Args:
        loss: of prediction and target, such as ``DiceCELoss(sigmoid=True)``.
        weight: λ; ``SupervisionDecay`` lets it fall to zero over a training.
        activation: ``"sigmoid"`` judges every channel alone (two classes, regions), ``"softmax"`` lets them compete.
        targets: ``"balanced"`` or ``"area"``, see ``targets_at``.
        boundary: what is added to the weight 1 of the cross-entropy where a target changes within one pixel of the
            skip's resolution; 0 for none.
        ignore_label: value of label maps that counts nowhere; with regions, that there is one.
        distillation: μ, weight of the teacher (``attach_supervision(…, teacher=…)``, ``attach_teacher``).

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> loss = SkipSupervisionLoss(soft_dice_loss(), weight=0.1)
        >>> loss(network(image), label).backward()
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        weight: float = 0.1,
        activation: Literal["sigmoid", "softmax"] = "sigmoid",
        targets: Targets = "balanced",
        boundary: float = 0.0,
        ignore_label: int | None = None,
        distillation: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("boundary", boundary), ("distillation", distillation)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"SkipSupervisionLoss: {name} is {value}, expected a number from 0 on")
        if activation not in ("sigmoid", "softmax"):
            raise ValueError(
                f"SkipSupervisionLoss: activation is {activation!r}, expected 'sigmoid' or 'softmax'"
            )
        if targets not in ("balanced", "area"):
            raise ValueError(f"SkipSupervisionLoss: targets is {targets!r}, expected 'balanced' or 'area'")
        self.loss = loss
        self.weight = weight
        self.activation = activation
        self.targets: Targets = targets
        self.boundary = boundary
        self.ignore_label = ignore_label
        self.distillation = distillation

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, 0-dim.

        Args:
            output: of the network: ``SupervisedOutput``, or a prediction alone.
            target: of the segmentation loss; of a list of scales the first is the full resolution.

        Raises:
            ValueError: if the target has another number of channels than 1 and the heads', a class that the heads do
                not have, or a head is finer than the target; or softmax is asked of one channel.
        """
        if not isinstance(output, SupervisedOutput):
            return self.loss(output, target)
        total = self.loss(output.prediction, target)
        label = target[0] if isinstance(target, (list, tuple)) else target
        label = label.as_tensor() if hasattr(label, "as_tensor") else label
        with torch.autocast(label.device.type, enabled=False):
            if output.skips:
                total = total + self.weight * self._heads(output.skips, label)
            if self.distillation and output.teacher is not None:
                compete = label.shape[1] == 1 or self.activation == "softmax"
                total = total + self.distillation * _divergence(output.prediction, output.teacher, compete)
        return total

    def _heads(self, skips: Sequence[Tensor], label: Tensor) -> Tensor:
        classes = skips[0].shape[1]
        if self.activation == "softmax" and classes == 1:
            raise ValueError(
                "SkipSupervisionLoss: softmax over the heads' one channel is always 1; use activation='sigmoid', or "
                "attach heads with a channel for each class"
            )
        truth, valid = _by_class(label, classes, self.ignore_label)
        exclusive = classes > 1 and (label.shape[1] == 1 or self.activation == "softmax")
        sizes = [logits.shape[2:].numel() for logits in skips]
        dimensions = label.dim() - 2
        # Halved for each halving of the resolution: by the geometric mean over the axes where they differ.
        shares = [(size / max(sizes)) ** (1 / dimensions) for size in sizes]
        heads = [
            share / sum(shares) * self._head(logits.float(), truth, valid, exclusive)
            for share, logits in zip(shares, skips, strict=True)
        ]
        return torch.stack(heads).sum()

    def _head(self, logits: Tensor, truth: Tensor, valid: Tensor | None, exclusive: bool) -> Tensor:
        target, counts = targets_at(truth, logits.shape[2:], self.targets, valid, exclusive)
        if self.activation == "softmax":
            probability = logits.softmax(1)
            entropy = -(target * logits.log_softmax(1)).sum(1, keepdim=True)
        else:
            probability = logits.sigmoid()
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        weight = counts.expand_as(entropy)
        if self.boundary:
            edges = _edges(target)
            weight = weight * (
                1 + self.boundary * (edges.amax(1, keepdim=True) if self.activation == "softmax" else edges)
            )
        cross_entropy = (entropy * weight).sum() / weight.sum().clamp(min=1e-6)
        axes = [
            0,
            *range(2, logits.dim()),
        ]  # over the batch: an image without foreground has no Dice of its own
        overlap = (probability * target * counts).sum(axes)
        sizes = ((probability + target) * counts).sum(axes)
        dice = 1 - (2 * overlap + 1e-5) / (sizes + 1e-5)
        return 0.5 * cross_entropy + 0.5 * dice.mean()

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"weight={self.weight:g}, {self.activation}, targets={self.targets}, boundary={self.boundary:g}, "
            f"distillation={self.distillation:g}"
        )


def _divergence(prediction: Any, teacher: Any, compete: bool) -> Tensor:
    """Mean Kullback-Leibler divergence from the teacher's probabilities to the prediction's, over pixels; of softmax
    where several channels compete, else of each channel's sigmoid.
    """
    taught = (teacher[0] if isinstance(teacher, (list, tuple)) else teacher).float()
    logits = (prediction[0] if isinstance(prediction, (list, tuple)) else prediction).float()
    # MONAI's DynUNet stacks its heads behind the batch axis, in training only.
    if logits.dim() == taught.dim() + 1:
        logits = logits[:, 0]
    if logits.shape != taught.shape:
        raise ValueError(
            f"SkipSupervisionLoss: the teacher predicts {tuple(taught.shape)}, the network {tuple(logits.shape)}; give "
            "the float network that it was made of"
        )
    channels = logits.shape[1]
    if channels == 1 or not compete:
        probability = taught.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(taught, probability)
        return F.binary_cross_entropy_with_logits(logits, probability) - entropy
    pixels = logits.numel() / channels
    return F.kl_div(logits.log_softmax(1), taught.log_softmax(1), reduction="sum", log_target=True) / pixels


def supervision_weight(progress: float) -> float:
    """What λ is multiplied with: half a cosine from 1 to 0 over the training.

    Args:
        progress: share of the supervised steps that are done, in [0, 1].
    """
    return (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def targets_at(
    truth: Tensor,
    size: Sequence[int],
    mode: Targets = "balanced",
    valid: Tensor | None = None,
    exclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """A target at a coarser resolution, so that thin structures survive: every new pixel stands for a block of old ones.

    ``"balanced"`` is what ``transforms.SkipTargets`` does for one image: the block takes the class that is most
    over-represented in it, argmax f(block)/f(image), so that a membrane of 2 % of the image wins its block with any 2 %
    of its pixels and more. ``"area"`` is the fraction of the block. Channels that are not ``exclusive`` (one foreground,
    regions) are each judged against their own complement.

    Args:
        truth: (N, C, spatial…), in [0, 1]: one-hot, one foreground channel, or regions. Of 0 and 1 the sums are exact,
            and so is what is equal.
        size: spatial shape to come to. Sizes that it does not divide are padded at the far end with the last pixel.
        mode: see above.
        valid: (N, 1, spatial…), 1 where pixels count.
        exclusive: every pixel that counts is of exactly one channel.

    Returns:
        the target (N, C, *size), and (N, 1, *size) the share of each block's pixels that count.

    Raises:
        ValueError: if the size is larger than the target's.
    """
    if any(new > old for new, old in zip(size, truth.shape[2:], strict=True)):
        raise ValueError(
            f"the skip has {tuple(size)} pixels, the target {tuple(truth.shape[2:])}: give the target of full resolution"
        )
    counted = torch.ones_like(truth[:, :1]) if valid is None else valid
    sums, places = _block_sums(truth * counted, size)
    counts, _ = _block_sums(counted, size)
    shares = counts / places
    if mode == "area":
        return sums / counts.clamp(min=1e-6), shares
    axes = tuple(range(2, truth.dim()))
    sums = sums.double()  # of products of whole numbers, so that equal ones are equal
    whole = (truth * counted).double().sum(axes, keepdim=True)
    if exclusive:
        return _most_overrepresented(sums, whole).to(truth.dtype) * (counts > 0), shares
    rest = counted.double().sum(axes, keepdim=True) - whole
    inside, outside = sums * rest, (counts.double() - sums) * whole
    won = (inside > outside) | ((inside == outside) & (whole < rest) & (sums > 0))
    return torch.where(rest == 0, sums > 0, won).to(
        truth.dtype
    ), shares  # nothing to compare with where it is all


def _most_overrepresented(sums: Tensor, whole: Tensor) -> Tensor:
    """One-hot of argmax sums/whole over the channels; of equal ones the rarer class, then the lower one."""
    score = torch.where(whole > 0, sums / whole.clamp(min=1e-30), torch.zeros_like(sums))
    order = torch.where(whole > 0, whole, torch.inf).flatten(1).argsort(dim=1, stable=True)
    best = torch.zeros_like(score[:, :1])
    winner = torch.zeros_like(best, dtype=torch.long)
    for rank in range(order.shape[1]):
        index = order[:, rank].view(-1, *[1] * (score.dim() - 1))
        here = score.gather(1, index.expand_as(best))
        better = here > best
        best, winner = torch.where(better, here, best), torch.where(better, index, winner)
    return torch.zeros_like(score).scatter_(1, winner, 1.0)


def _block_sums(tensor: Tensor, size: Sequence[int]) -> tuple[Tensor, float]:
    """Sums over every block, of zeros and ones exact, and how many pixels a block has."""
    blocks = [math.ceil(old / new) for old, new in zip(tensor.shape[2:], size, strict=True)]
    missing = [b * new - old for b, new, old in zip(blocks, size, tensor.shape[2:], strict=True)]
    if any(
        m >= b for m, b in zip(missing, blocks, strict=True)
    ):  # no grid of whole blocks comes to this size
        pools: dict[int, Callable[..., Tensor]] = {
            1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d
        }  # fmt: skip
        return pools[len(blocks)](tensor, tuple(size)), 1.0
    if any(missing):
        tensor = F.pad(tensor, [p for m in reversed(missing) for p in (0, m)], mode="replicate")
    if set(blocks) == {1}:
        return tensor, 1.0
    pixels = float(math.prod(blocks))
    # Sums, as means times the number of pixels are not exact. In 1D there is no divisor to give.
    if len(blocks) == 1:
        return F.avg_pool2d(tensor.unsqueeze(-2), (1, *blocks), divisor_override=1).squeeze(-2), pixels
    return _POOLS[len(blocks)](tensor, tuple(blocks), divisor_override=1), pixels


def _edges(target: Tensor) -> Tensor:
    """How much each channel of a target changes between a pixel and its neighbours, in [0, 1]."""
    largest = _LARGEST[target.dim() - 2]
    return largest(target, 3, 1, 1) + largest(-target, 3, 1, 1)


def _by_class(label: Tensor, classes: int, ignore_label: int | None) -> tuple[Tensor, Tensor | None]:
    """The target as the heads have their channels, and what counts of it."""
    if label.shape[1] == classes and classes > 1:
        return label.float(), None
    if label.shape[1] == classes + 1 and ignore_label is not None:
        return label[:, :-1].float(), 1 - label[:, -1:].float()
    if label.shape[1] != 1:
        raise ValueError(
            f"the target has {label.shape[1]} channels, expected 1 (classes) or {classes} (the heads' channels)"
        )
    label = label.round() if label.is_floating_point() else label
    valid = None if ignore_label is None else (label != ignore_label).float()
    known, highest = label if valid is None else label * valid, max(classes - 1, 1)
    if known.min() < 0 or known.max() > highest:
        raise ValueError(
            f"the target holds class {int(known.max() if known.max() > highest else known.min())}, the heads have "
            f"0 to {highest}; attach them with another num_classes, or name an ignore_label"
        )
    if classes == 1:
        return (label == 1).float(), valid
    return torch.cat([(label == index).float() for index in range(classes)], 1), valid
