"""Quantized convolutions and linear layers, split convolutions, the convolution + batch norm pair, supervision heads."""

from .norm_pair import PAIRED_NORMS, PairedNorm
from .quantized import (
    QUANTIZED_LAYERS,
    QuantizedLayer,
    dequantize_layer,
    folded_log2_scale,
    is_quantizable,
    quantize_layer,
)
from .split import SPLIT_LAYERS, PartQuantizers, SplitLayer, split_layer
from .supervision import SupervisionHead

__all__ = [
    "PAIRED_NORMS",
    "QUANTIZED_LAYERS",
    "SPLIT_LAYERS",
    "PairedNorm",
    "PartQuantizers",
    "QuantizedLayer",
    "SplitLayer",
    "SupervisionHead",
    "dequantize_layer",
    "folded_log2_scale",
    "is_quantizable",
    "quantize_layer",
    "split_layer",
]
