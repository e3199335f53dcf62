"""MONAI transforms, each with a dictionary version: fixed-point images, targets and weights for training, edge and
frequency measures."""

from __future__ import annotations

from .boundary import BoundaryWeight, BoundaryWeightD, BoundaryWeightd, BoundaryWeightDict
from .measures import (
    EdgeStrength,
    EdgeStrengthD,
    EdgeStrengthd,
    EdgeStrengthDict,
    FrequencyBands,
    FrequencyBandsD,
    FrequencyBandsd,
    FrequencyBandsDict,
)
from .quantize import QuantizeIntensity, QuantizeIntensityD, QuantizeIntensityd, QuantizeIntensityDict
from .targets import SkipTargets, SkipTargetsD, SkipTargetsd, SkipTargetsDict
from .volume_writer import VolumeWriter

__all__ = [
    "BoundaryWeight",
    "BoundaryWeightD",
    "BoundaryWeightDict",
    "BoundaryWeightd",
    "EdgeStrength",
    "EdgeStrengthD",
    "EdgeStrengthDict",
    "EdgeStrengthd",
    "FrequencyBands",
    "FrequencyBandsD",
    "FrequencyBandsDict",
    "FrequencyBandsd",
    "QuantizeIntensity",
    "QuantizeIntensityD",
    "QuantizeIntensityDict",
    "QuantizeIntensityd",
    "SkipTargets",
    "SkipTargetsD",
    "SkipTargetsDict",
    "SkipTargetsd",
    "VolumeWriter",
]
