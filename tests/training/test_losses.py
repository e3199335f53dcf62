"""The loss against its formula."""

from __future__ import annotations

import pytest
import torch

from monai_unetq.training import bce_dice_loss


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """0.5 binary cross-entropy + 0.5 soft Dice per image, averaged over the batch, in float64."""
    p, y = torch.sigmoid(logits.double()), labels.double()
    cross_entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    axes = tuple(range(1, logits.dim()))
    dice = (2 * (p * y).sum(axes) + 1e-5) / (p.sum(axes) + y.sum(axes) + 1e-5)
    return float(0.5 * cross_entropy + 0.5 * (1 - dice).mean())


@pytest.mark.parametrize("sizes", [(6, 5), (3, 4, 5)])
def test_half_cross_entropy_half_dice(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 1, *sizes, generator=generator)
    labels = (torch.rand(3, 1, *sizes, generator=generator) > 0.3).float()
    assert float(bce_dice_loss()(logits, labels)) == pytest.approx(by_hand(logits, labels), rel=1e-5)


def test_a_perfect_answer_costs_nothing_and_the_opposite_much() -> None:
    labels = torch.zeros(2, 1, 4, 4)
    labels[:, :, :2] = 1
    loss = bce_dice_loss()
    assert float(loss(40 * labels - 20, labels)) < 1e-6
    assert float(loss(20 - 40 * labels, labels)) > 5


def test_an_empty_label_is_finite_and_has_a_gradient() -> None:
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    loss = bce_dice_loss()(logits, torch.zeros(1, 1, 4, 4))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert (logits.grad > 0).all()
