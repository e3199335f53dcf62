"""Losses."""

from __future__ import annotations

from monai.losses import DiceCELoss

__all__ = ["bce_dice_loss"]


def bce_dice_loss() -> DiceCELoss:
    """0.5 binary cross-entropy + 0.5 soft Dice on logits (AskariHemmat et al., 2019, section 4.1, EM).

    Takes logits and labels {0, 1}, both (N, 1, …), and returns the mean over the batch.
    """
    return DiceCELoss(sigmoid=True, lambda_dice=0.5, lambda_ce=0.5)
