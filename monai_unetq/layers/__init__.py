"""Quantized convolutions and linear layers, and the convolution + batch norm pair."""

from .norm_pair import PAIRED_NORMS, PairedNorm
from .quantized import QUANTIZED_LAYERS, QuantizedLayer, dequantize_layer, quantize_layer

__all__ = [
    "PAIRED_NORMS",
    "QUANTIZED_LAYERS",
    "PairedNorm",
    "QuantizedLayer",
    "dequantize_layer",
    "quantize_layer",
]
