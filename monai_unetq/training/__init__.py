"""Losses, schedules, calibration, batch norm statistics, handlers, the training loop for float and quantized networks, and prediction."""

from ..surgery import calibrate, reestimate_norms, settle_norms
from .handlers import (
    BestModel,
    Calibration,
    Checkpoint,
    EpochSeed,
    IncrementalFreezing,
    Pack,
    PlanLog,
    QuantizationStats,
    SupervisionDecay,
    TernaryAnnealing,
)
from .losses import bce_dice_loss, soft_dice_loss
from .norms import freeze_norms
from .parameters import parameter_groups
from .predict import WholeSliceInferer, predict, predict_logits
from .schedules import cosine, restart, step_decay
from .supervision import SkipSupervisionLoss
from .train import History, Schedule, train, validation_score

__all__ = [
    "BestModel",
    "Calibration",
    "Checkpoint",
    "EpochSeed",
    "History",
    "IncrementalFreezing",
    "Pack",
    "PlanLog",
    "QuantizationStats",
    "Schedule",
    "SkipSupervisionLoss",
    "SupervisionDecay",
    "TernaryAnnealing",
    "WholeSliceInferer",
    "bce_dice_loss",
    "calibrate",
    "cosine",
    "freeze_norms",
    "parameter_groups",
    "predict",
    "predict_logits",
    "reestimate_norms",
    "restart",
    "settle_norms",
    "soft_dice_loss",
    "step_decay",
    "train",
    "validation_score",
]
