"""The papers' U-Net, and the wrapper that quantizes any network from a configuration."""

from .fixed_point_unet import FixedPointUNet
from .quantized_network import QuantizedNetwork, state_file

__all__ = ["FixedPointUNet", "QuantizedNetwork", "state_file"]
