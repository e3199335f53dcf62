"""MONAI handlers of quantization-aware training: seeds, checkpoints, calibration, gradual rounding, statistics, the best model."""

from .best_model import BestModel, Pack
from .checkpoint import Checkpoint
from .hardening import IncrementalFreezing, TernaryAnnealing
from .quantization import Calibration, CalibrationEvents, PlanLog, QuantizationStats
from .seeding import EpochSeed
from .supervision import SupervisionDecay

__all__ = [
    "BestModel",
    "Calibration",
    "CalibrationEvents",
    "Checkpoint",
    "EpochSeed",
    "IncrementalFreezing",
    "Pack",
    "PlanLog",
    "QuantizationStats",
    "SupervisionDecay",
    "TernaryAnnealing",
]
