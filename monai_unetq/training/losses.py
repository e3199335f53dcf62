"""Losses."""

from __future__ import annotations

from monai.losses import DiceCELoss, DiceLoss

__all__ = ["bce_dice_loss", "soft_dice_loss"]


def bce_dice_loss() -> DiceCELoss:
    """0.5 binary cross-entropy + 0.5 soft Dice on logits (AskariHemmat et al., 2019, section 4.1, EM).

    Takes logits and labels {0, 1}, both (N, 1, …), and returns the mean over the batch.
    """
    return DiceCELoss(sigmoid=True, lambda_dice=0.5, lambda_ce=0.5)


def soft_dice_loss() -> DiceLoss:
    """1 - soft Dice on logits, the whole batch as one image (AskariHemmat et al., 2019, GM and NIH).

    Over the batch, because an image without foreground has no Dice of its own to learn from: taken alone it costs
    1 whatever is invented in it, with hardly a gradient. Beside the others, every invented pixel costs.

    Takes logits and labels {0, 1}, both (N, 1, …).
    """
    return DiceLoss(sigmoid=True, batch=True)
