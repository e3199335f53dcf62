"""The losses against their formulas."""

from __future__ import annotations

import pytest
import torch

from monai_unetq.training import bce_dice_loss, soft_dice_loss


def dice_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """1 - soft Dice per image, averaged over the batch, in float64."""
    p, y = torch.sigmoid(logits.double()), labels.double()
    axes = tuple(range(1, logits.dim()))
    dice = (2 * (p * y).sum(axes) + 1e-5) / (p.sum(axes) + y.sum(axes) + 1e-5)
    return float((1 - dice).mean())


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """0.5 binary cross-entropy + 0.5 soft Dice, in float64."""
    p, y = torch.sigmoid(logits.double()), labels.double()
    cross_entropy = float(-(y * p.log() + (1 - y) * (1 - p).log()).mean())
    return 0.5 * cross_entropy + 0.5 * dice_by_hand(logits, labels)


@pytest.mark.parametrize("sizes", [(6, 5), (3, 4, 5)])
def test_half_cross_entropy_half_dice(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 1, *sizes, generator=generator)
    labels = (torch.rand(3, 1, *sizes, generator=generator) > 0.3).float()
    assert float(bce_dice_loss()(logits, labels)) == pytest.approx(by_hand(logits, labels), rel=1e-5)
    whole = (t.reshape(1, 1, -1) for t in (logits, labels))  # the batch as one image
    assert float(soft_dice_loss()(logits, labels)) == pytest.approx(dice_by_hand(*whole), rel=1e-5)


def test_a_perfect_answer_costs_nothing_and_the_opposite_much() -> None:
    labels = torch.zeros(2, 1, 4, 4)
    labels[:, :, :2] = 1
    loss = bce_dice_loss()
    assert float(loss(40 * labels - 20, labels)) < 1e-6
    assert float(loss(20 - 40 * labels, labels)) > 5


def test_soft_dice_of_a_half_right_answer() -> None:
    labels = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    logits = torch.tensor([[[[40.0, -40.0, -40.0, -40.0]]]])  # finds one of two: Dice 2·1/(1+2)
    assert float(soft_dice_loss()(logits, labels)) == pytest.approx(1 / 3, abs=1e-5)


def test_an_empty_label_is_finite_and_has_a_gradient() -> None:
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    loss = bce_dice_loss()(logits, torch.zeros(1, 1, 4, 4))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert (logits.grad > 0).all()


def test_what_is_invented_in_an_image_without_foreground_costs_beside_others() -> None:
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    labels = torch.zeros(2, 1, 4, 4)
    labels[0, :, :2] = 1
    soft_dice_loss()(logits, labels).backward()
    assert logits.grad is not None
    # Σp = 16, Σy = 8, Σpy = 4: Dice 8/24. A pixel that is no foreground: ∂/∂p = 8/24², times p(1 - p) = 1/4.
    torch.testing.assert_close(logits.grad[1], torch.full((1, 4, 4), 8 / 24**2 / 4), rtol=1e-4, atol=0)
