"""Networks of the papers."""

from .fixed_point_unet import FixedPointUNet

__all__ = ["FixedPointUNet"]
