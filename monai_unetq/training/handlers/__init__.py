"""MONAI handlers for quantization-aware training: seeds, checkpoints, calibration, statistics, the best model."""

from .best_model import BestModel, Pack
from .checkpoint import Checkpoint
from .quantization import Calibration, CalibrationEvents, PlanLog, QuantizationStats
from .seeding import EpochSeed

__all__ = [
    "BestModel",
    "Calibration",
    "CalibrationEvents",
    "Checkpoint",
    "EpochSeed",
    "Pack",
    "PlanLog",
    "QuantizationStats",
]
