"""Quantized convolutions and linear layers, split convolutions, and the convolution + batch norm pair."""

from .norm_pair import PAIRED_NORMS, PairedNorm
from .quantized import (
    QUANTIZED_LAYERS,
    QuantizedLayer,
    dequantize_layer,
    folded_log2_scale,
    is_quantizable,
    quantize_layer,
)
from .split import SPLIT_LAYERS, SplitLayer, split_layer

__all__ = [
    "PAIRED_NORMS",
    "QUANTIZED_LAYERS",
    "SPLIT_LAYERS",
    "PairedNorm",
    "QuantizedLayer",
    "SplitLayer",
    "dequantize_layer",
    "folded_log2_scale",
    "is_quantizable",
    "quantize_layer",
    "split_layer",
]
