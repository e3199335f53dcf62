"""``SkipSupervisionLoss``: its numbers by hand, and its targets beside those of the transform for single images."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from monai_unetq.surgery import SupervisedOutput
from monai_unetq.training import SkipSupervisionLoss, soft_dice_loss
from monai_unetq.training.supervision import supervision_weight, targets_at
from monai_unetq.transforms import SkipTargets


def squared(prediction: Any, target: Any) -> Tensor:
    """A segmentation loss that is easy by hand."""
    first, truth = (x[0] if isinstance(x, (list, tuple)) else x for x in (prediction, target))
    loss: Tensor = (first - truth).square().mean()
    return loss


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def head_by_hand(logits: list[float], target: list[float], weights: list[float] | None = None) -> float:
    """½·CE + ½·(1 - Dice) of one channel."""
    weights = weights or [1.0] * len(logits)
    entropy = sum(w * (softplus(z) - t * z) for z, t, w in zip(logits, target, weights, strict=True)) / sum(
        weights
    )
    overlap = sum(sigmoid(z) * t for z, t in zip(logits, target, strict=True))
    sizes = sum(sigmoid(z) + t for z, t in zip(logits, target, strict=True))
    return 0.5 * entropy + 0.5 * (1 - (2 * overlap + 1e-5) / (sizes + 1e-5))


# The sum ----------------------------------------------------------------------------------------------------------


def test_two_heads_by_hand() -> None:
    label = torch.tensor([[[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]]])
    prediction = torch.full_like(label, 0.5)
    fine = torch.tensor([[[[-1.0, 0.0, 2.0, 1.0], [0.5, -2.0, 1.0, 0.0]]]])
    coarse = torch.tensor([[[[-1.5, 0.5]]]])
    found = SkipSupervisionLoss(squared, weight=0.4)(SupervisedOutput(prediction, (fine, coarse)), label)
    heads = [
        head_by_hand(fine.flatten().tolist(), label.flatten().tolist()),
        head_by_hand([-1.5, 0.5], [0.0, 1.0]),
    ]
    # the coarse head has half the resolution: half the weight of the fine one
    wanted = 0.25 + 0.4 * (2 / 3 * heads[0] + 1 / 3 * heads[1])
    assert found.item() == pytest.approx(wanted, rel=1e-6)


def test_without_heads_it_is_the_segmentation_loss() -> None:
    prediction, label = torch.randn(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    plain = soft_dice_loss()
    assert torch.equal(SkipSupervisionLoss(plain)(prediction, label), plain(prediction, label))


def test_deep_supervision_gets_its_lists_and_heads_the_finest_target() -> None:
    labels = [torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
    predictions = [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
    seen: list[Any] = []

    def loss(prediction: Any, target: Any) -> Tensor:
        seen.append((prediction, target))
        return prediction[0].sum() * 0

    logits = torch.full((1, 1, 4, 4), 3.0)
    found = SkipSupervisionLoss(loss, weight=1)(SupervisedOutput(predictions, (logits,)), labels)
    assert seen == [(predictions, labels)]
    assert found.item() == pytest.approx(head_by_hand([3.0] * 16, [1.0] * 16), rel=1e-5)


def test_heads_learn_at_weight_zero_with_a_gradient_of_zero() -> None:
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    prediction = torch.zeros(1, 1, 8, 8, requires_grad=True)
    loss = SkipSupervisionLoss(squared, weight=0)
    loss(SupervisedOutput(prediction, (logits,)), torch.ones(1, 1, 8, 8)).backward()
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))
    assert prediction.grad is not None and prediction.grad.abs().sum() > 0


def test_softmax_by_hand() -> None:
    label = torch.tensor([[[[0.0, 2.0]]]])
    logits = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]], [[2.0, -1.0]]]])
    loss = SkipSupervisionLoss(squared, weight=1, activation="softmax")
    zero = torch.tensor([[[[0.0, 2.0]]]])
    found = loss(SupervisedOutput(zero, (logits,)), label)
    p = logits.softmax(1)[0, :, 0].double()
    entropy = -(p[0, 0].log() + p[2, 1].log()) / 2
    truth = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    dice = [1 - (2 * (p[c] * truth[c]).sum() + 1e-5) / ((p[c] + truth[c]).sum() + 1e-5) for c in range(3)]
    assert found.item() == pytest.approx(float(0.5 * entropy + 0.5 * sum(dice) / 3), rel=1e-5)


def test_ignored_pixels_count_nowhere() -> None:
    label = torch.tensor([[[[0.0, 1.0, 255.0, 1.0]]]])
    loss = SkipSupervisionLoss(squared, weight=1, ignore_label=255)
    prediction = label.clone()
    for there in (-5.0, 5.0):
        logits = torch.tensor([[[[-1.0, 2.0, there, 1.0]]]])
        found = loss(SupervisedOutput(prediction, (logits,)), label)
        assert found.item() == pytest.approx(head_by_hand([-1.0, 2.0, 1.0], [0.0, 1.0, 1.0]), rel=1e-5)


def test_boundary_weights_by_hand() -> None:
    label = torch.tensor([[[[0.0, 0.0, 0.0, 1.0]]]])  # the last two pixels touch the boundary
    logits = torch.tensor([[[[-1.0, 0.5, 0.0, 1.0]]]])
    loss = SkipSupervisionLoss(squared, weight=1, boundary=3)
    found = loss(SupervisedOutput(label.clone(), (logits,)), label)
    wanted = head_by_hand([-1.0, 0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1, 1, 4, 4])
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_regions_are_judged_each_on_its_own() -> None:
    regions = torch.zeros(1, 2, 4, 4)
    regions[:, 0, :, :] = 1  # the whole
    regions[:, 1, :2, :2] = 1  # and a part of it
    logits = torch.zeros(1, 2, 2, 2)
    found = SkipSupervisionLoss(squared, weight=1)(SupervisedOutput(regions.clone(), (logits,)), regions)
    target, _ = targets_at(regions, (2, 2))
    assert target.tolist() == [[[[1, 1], [1, 1]], [[1, 0], [0, 0]]]]
    entropy = math.log(2)
    dice = [1 - (2 * 2 + 1e-5) / (2 + 4 + 1e-5), 1 - (2 * 0.5 + 1e-5) / (2 + 1 + 1e-5)]
    assert found.item() == pytest.approx(0.5 * entropy + 0.5 * sum(dice) / 2, rel=1e-5)


def test_sigmoid_heads_of_classes_learn_the_class_that_is_over_represented() -> None:
    # Class 0 has 5 of 8 pixels, class 1 two, class 2 one. The second block holds 1 and 2, each more often than the image
    # does, and goes to the rarer one alone; the third goes to 1, of which it holds a half, and not to 0 (a fifth).
    label = torch.tensor([[[[0.0, 0.0, 1.0, 2.0, 0.0, 1.0, 0.0, 0.0]]]])
    logits = torch.tensor([[[[1.0, -1.0, 0.5, 2.0]], [[0.0, 1.5, -2.0, 0.5]], [[-1.0, 0.0, 1.0, -0.5]]]])
    found = SkipSupervisionLoss(squared, weight=1)(SupervisedOutput(label.clone(), (logits,)), label)
    targets = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    channels = [head_by_hand(z, t) for z, t in zip(logits[0, :, 0].tolist(), targets, strict=True)]
    assert found.item() == pytest.approx(sum(channels) / 3, rel=1e-5)


@pytest.mark.parametrize(("targets", "second"), [("balanced", 1.0), ("area", 1.0), ("area", 0.0)])
def test_blocks_weigh_as_many_of_their_pixels_as_count(targets: Any, second: float) -> None:
    label = torch.tensor([[[[0.0, 0.0, 255.0, second, 255.0, 255.0]]]])
    logits = torch.tensor([[[[-1.0, 2.0, 7.0]]]])
    loss = SkipSupervisionLoss(squared, weight=1, targets=targets, ignore_label=255)
    found = loss(SupervisedOutput(label.clone(), (logits,)), label)
    # Both pixels of the first block, one of the second's two, none of the third's.
    entropy = (softplus(-1.0) + 0.5 * (softplus(2.0) - second * 2.0)) / 1.5
    overlap, sizes = 0.5 * sigmoid(2.0) * second, sigmoid(-1.0) + 0.5 * (sigmoid(2.0) + second)
    wanted = 0.5 * entropy + 0.5 * (1 - (2 * overlap + 1e-5) / (sizes + 1e-5))
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_regions_may_have_a_channel_of_what_is_ignored() -> None:
    regions = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]], [[1.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0, 0.0]]]])
    logits = torch.tensor([[[[-1.0, 0.5, 9.0, 1.0]], [[2.0, 0.0, -9.0, -0.5]]]])
    loss = SkipSupervisionLoss(lambda prediction, target: torch.zeros(()), weight=1, ignore_label=255)
    found = loss(SupervisedOutput(logits, (logits,)), regions)
    channels = [
        head_by_hand([-1.0, 0.5, 1.0], [1.0, 1.0, 0.0]),
        head_by_hand([2.0, 0.0, -0.5], [1.0, 0.0, 1.0]),
    ]
    assert found.item() == pytest.approx(sum(channels) / 2, rel=1e-5)


def test_boundary_weights_of_softmax_are_the_largest_of_all_channels() -> None:
    label = torch.tensor([[[[0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0]]]])
    logits = torch.randn(1, 3, 1, 7, generator=torch.Generator().manual_seed(0))
    loss = SkipSupervisionLoss(squared, weight=1, activation="softmax", boundary=3)
    found = loss(SupervisedOutput(label.clone(), (logits,)), label)
    # Of class 0 pixels 2 and 3 touch the boundary, of class 2 pixels 3 and 4, of class 1 all three.
    weights = torch.tensor([1, 1, 4, 4, 4, 1, 1]).double()
    classes = [0, 0, 0, 1, 2, 2, 2]
    p = logits.double().softmax(1)[0, :, 0]
    truth = torch.eye(3).double()[classes].T
    entropy = -(weights * p[classes, range(7)].log()).sum() / weights.sum()
    dice = 1 - (2 * (p * truth).sum(1) + 1e-5) / ((p + truth).sum(1) + 1e-5)
    assert found.item() == pytest.approx(float(0.5 * entropy + 0.5 * dice.mean()), rel=1e-5)


def test_half_precision_logits_are_judged_in_float32() -> None:
    label = torch.ones(1, 1, 4, 4)
    logits = torch.randn(1, 1, 4, 4)
    loss = SkipSupervisionLoss(squared, weight=1)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(SupervisedOutput(label, (logits.bfloat16(),)), label)
    assert half.dtype == torch.float32
    wanted = loss(SupervisedOutput(label, (logits.bfloat16().float(),)), label)
    assert half.item() == pytest.approx(wanted.item(), rel=1e-6)


# Targets ----------------------------------------------------------------------------------------------------------

SIDES = st.integers(1, 12)


@given(
    st.integers(0, 10**6), SIDES, SIDES, st.integers(1, 4), st.integers(1, 4),
    st.sampled_from(["balanced", "area"]), st.booleans(),
)  # fmt: skip
def test_targets_are_those_of_the_transform(
    seed: int,
    height: int,
    width: int,
    classes: int,
    scale: int,
    mode: Literal["balanced", "area"],
    ignore: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    many = max(classes, 2)
    labels = torch.randint(0, many, (2, 1, height, width), generator=generator)
    if ignore:
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    transform = SkipTargets([scale], mode, num_classes=many, ignore_label=255 if ignore else None)
    truth = torch.cat([(labels == c).float() for c in ([1] if many == 2 else range(many))], 1)
    valid = (labels != 255).float()
    size = (math.ceil(height / scale), math.ceil(width / scale))
    # A size alone tells the scale only where the last block is not mostly padding.
    assume(all(math.ceil(old / new) == scale for old, new in zip((height, width), size, strict=True)))
    found, share = targets_at(truth, size, mode, valid, exclusive=many > 2)
    for image, target, counts in zip(labels, found, share, strict=True):
        (wanted,) = transform(image)
        counted = counts > 0
        if ignore:
            assert torch.equal(~counted, (wanted == 255)[:1])
        if mode == "balanced":
            wanted = torch.cat([(wanted == c).float() for c in ([1] if many == 2 else range(many))])
        for channel, other in zip(target, wanted, strict=True):
            assert torch.allclose(channel[counted[0]], other[counted[0]], atol=1e-6)


def test_a_thin_line_survives_in_3d() -> None:
    truth = torch.zeros(1, 1, 16, 16, 16)
    truth[:, :, :, 5, 9] = 1
    target, share = targets_at(truth, (2, 2, 2))
    assert target[0, 0, :, 0, 1].tolist() == [1, 1] and target.sum() == 2
    area, _ = targets_at(truth, (2, 2, 2), "area")
    assert area[0, 0, 0, 0, 1].item() == pytest.approx(8 / 512)
    assert torch.equal(share, torch.ones_like(share))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_targets_may_be_soft(dimensions: int) -> None:
    truth = torch.tensor([0.4, 0.4, 0.1, 0.0]).view(1, 1, *[1] * (dimensions - 1), 4)
    size = (*[1] * (dimensions - 1), 2)
    area, share = targets_at(truth, size, "area")
    assert area.flatten().tolist() == pytest.approx([0.4, 0.05]) and share.flatten().tolist() == [1, 1]
    target, _ = targets_at(truth, size)  # the mean of all is 0.225
    assert target.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_sums_of_zeros_and_ones_are_exact(dimensions: int) -> None:
    # A mean over 97 pixels, times 97, is not always a whole number in float32. Both blocks of image k have k ones, as
    # many as the image on average, so that the rarer class has them.
    ones = torch.arange(98)
    truth = (torch.arange(97) < ones[:, None]).float().repeat(1, 2)
    target, _ = targets_at(truth.view(98, 1, *[1] * (dimensions - 1), -1), (*[1] * (dimensions - 1), 2))
    wanted = ((ones > 0) & (ones < 49)) | (ones == 97)
    assert torch.equal(target.view(98, 2).bool(), wanted[:, None].expand(98, 2))


def test_strides_may_differ_between_axes() -> None:
    truth = torch.zeros(1, 1, 4, 8)
    truth[..., 5] = 1
    target, _ = targets_at(truth, (4, 2))
    assert target[0, 0].tolist() == [[0, 1]] * 4


def test_a_size_that_no_blocks_give_is_averaged() -> None:
    truth = torch.zeros(1, 1, 1, 10)
    truth[..., 7:] = 1
    area, _ = targets_at(truth, (1, 7), "area")  # blocks of 2 would give 5
    assert area.shape[-1] == 7 and area[0, 0, 0, 0] == 0 and area[0, 0, 0, -1] == 1


# The schedule, and what is refused ----------------------------------------------------------------------------------


def test_the_weight_falls_along_half_a_cosine() -> None:
    assert [supervision_weight(p) for p in (0, 0.5, 1, 2)] == pytest.approx([1, 0.5, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "weight is -1"),
        ({"weight": math.nan}, "weight is nan"),
        ({"boundary": -0.5}, "boundary is -0.5"),
        ({"activation": "tanh"}, "'tanh'"),
        ({"targets": "nearest"}, "'nearest'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipSupervisionLoss(squared, **options)


@pytest.mark.parametrize(
    ("channels", "label", "message"),
    [
        (3, torch.full((1, 1, 4, 4), 3.0), "class 3"),
        (3, torch.zeros(1, 2, 4, 4), "2 channels, expected 1"),
        (1, torch.full((1, 1, 4, 4), 255.0), "class 255, the heads have 0 to 1"),
        (1, torch.zeros(1, 1, 2, 2), "give the target of full resolution"),
    ],
)
def test_targets_that_do_not_fit(channels: int, label: Tensor, message: str) -> None:
    output = SupervisedOutput(label, (torch.zeros(1, channels, 4, 4),))
    with pytest.raises(ValueError, match=message):
        SkipSupervisionLoss(squared)(output, label)


def test_softmax_needs_two_channels() -> None:
    output = SupervisedOutput(torch.zeros(1, 1, 4, 4), (torch.zeros(1, 1, 4, 4),))
    with pytest.raises(ValueError, match="one channel is always 1"):
        SkipSupervisionLoss(squared, activation="softmax")(output, torch.zeros(1, 1, 4, 4))


def test_background_is_no_region() -> None:
    target, _ = targets_at(torch.zeros(1, 2, 4, 4), (2, 2))
    assert target.sum() == 0
    regions = torch.zeros(1, 2, 4, 4)
    regions[:, 0, :2, :2], regions[:, 1, 2:, 2:] = 1, 1  # they do not overlap, and leave background
    target, _ = targets_at(regions, (2, 2))
    assert target.tolist() == [[[[1, 0], [0, 0]], [[0, 0], [0, 1]]]]


# The teacher ------------------------------------------------------------------------------------------------------


def test_distillation_of_one_channel_by_hand() -> None:
    label = torch.zeros(1, 1, 1, 2)
    logits, taught = torch.tensor([[[[0.5, -1.0]]]]), torch.tensor([[[[2.0, 0.0]]]])
    loss = SkipSupervisionLoss(squared, distillation=3.0)
    wanted = 0.0
    for z, y in ((0.5, 2.0), (-1.0, 0.0)):
        p, q = sigmoid(z), sigmoid(y)
        wanted += (q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))) / 2
    found = loss(SupervisedOutput(logits, (), taught), label) - squared(logits, label)
    assert float(found) == pytest.approx(3 * wanted, rel=1e-5)


def test_distillation_of_classes_by_hand() -> None:
    label = torch.ones(1, 1, 1, 2)
    logits = torch.tensor([[[[0.0, 1.0]], [[0.5, -1.0]], [[-2.0, 0.0]]]])
    taught = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 3.0]]]])

    def softmax(values: list[float]) -> list[float]:
        return [math.exp(v) / sum(map(math.exp, values)) for v in values]

    wanted = 0.0
    for pixel in range(2):
        p, q = (softmax(t[0, :, 0, pixel].tolist()) for t in (logits, taught))
        wanted += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)) / 2
    zero = SkipSupervisionLoss(lambda prediction, target: torch.zeros(()), distillation=1.0)
    assert float(zero(SupervisedOutput(logits, (), taught), label)) == pytest.approx(wanted, rel=1e-5)
    # a target with a channel for each: regions, which do not compete
    regions = torch.zeros(1, 3, 1, 2)
    apart = sum(
        float(zero(SupervisedOutput(logits[:, c : c + 1], (), taught[:, c : c + 1]), label)) for c in range(3)
    )
    assert float(zero(SupervisedOutput(logits, (), taught), regions)) == pytest.approx(apart / 3, rel=1e-5)


def test_distillation_of_one_hot_targets_follows_the_activation() -> None:
    label = torch.tensor([[[[1.0]], [[0.0]]]])
    logits, taught = torch.tensor([[[[0.0]], [[1.0]]]]), torch.tensor([[[[2.0]], [[0.0]]]])

    def found(activation: Any) -> float:
        loss = SkipSupervisionLoss(
            lambda prediction, target: torch.zeros(()), 0.1, activation, distillation=1
        )
        return float(loss(SupervisedOutput(logits, (), taught), label))

    def divergence(q: float, p: float) -> float:
        return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))

    # Of two classes the softmax is the sigmoid of their difference.
    assert found("softmax") == pytest.approx(divergence(sigmoid(2.0), sigmoid(-1.0)), rel=1e-5)
    apart = [divergence(sigmoid(2.0), sigmoid(0.0)), divergence(sigmoid(0.0), sigmoid(1.0))]
    assert found("sigmoid") == pytest.approx(sum(apart) / 2, rel=1e-5)


def test_a_prediction_like_the_teachers_costs_nothing_and_pulls_nowhere() -> None:
    logits = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = SkipSupervisionLoss(lambda prediction, target: prediction.sum() * 0, distillation=2.0)
    found = loss(SupervisedOutput(logits, (), logits.detach()), torch.zeros(2, 1, 4, 4))
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize("scales", [list, lambda p: torch.stack(p, 1)], ids=["list", "stacked"])
def test_only_the_full_resolution_is_compared_with_the_teacher(scales: Any) -> None:
    label = torch.zeros(1, 1, 2, 2)
    full, low = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 5.0)
    loss = SkipSupervisionLoss(lambda prediction, target: torch.zeros(()), distillation=1.0)
    wanted = loss(SupervisedOutput(full, (), -full), label)
    assert torch.equal(loss(SupervisedOutput(scales([full, low]), (), -full), label), wanted)


def test_without_a_teacher_or_weight_nothing_is_added() -> None:
    logits, label = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert float(SkipSupervisionLoss(squared, distillation=1.0)(SupervisedOutput(logits, ()), label)) == 1
    assert float(SkipSupervisionLoss(squared)(SupervisedOutput(logits, (), -logits), label)) == 1


def test_another_teachers_prediction_is_refused() -> None:
    loss = SkipSupervisionLoss(squared, distillation=1.0)
    output = SupervisedOutput(torch.ones(1, 1, 2, 2), (), torch.ones(1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"the teacher predicts \(1, 2, 2, 2\), the network \(1, 1, 2, 2\)"):
        loss(output, torch.zeros(1, 1, 2, 2))
