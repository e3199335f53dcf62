"""Losses, calibration, the training loop for float and quantized networks, and prediction."""

from .calibration import calibrate, reestimate_norms
from .losses import bce_dice_loss
from .predict import predict, predict_logits
from .train import History, Schedule, train, validation_score

__all__ = [
    "History",
    "Schedule",
    "bce_dice_loss",
    "calibrate",
    "predict",
    "predict_logits",
    "reestimate_norms",
    "train",
    "validation_score",
]
