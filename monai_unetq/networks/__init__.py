"""The papers' U-Net, the wrapper that quantizes any network from a configuration, and exported models as modules."""

from .exported_network import ExportedNetwork
from .fixed_point_unet import FixedPointUNet
from .quantized_network import QuantizedNetwork, state_file

__all__ = ["ExportedNetwork", "FixedPointUNet", "QuantizedNetwork", "state_file"]
