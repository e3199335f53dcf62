"""Network in, network out: observe, find skips, split, quantize, calibrate, dequantize, fold."""

from .calibrate import calibrate
from .fold import fold
from .observe import Trace, observe
from .quantize import dequantize, plan_of, plan_of_state, quantize, quantized_layers, set_quantizers
from .skips import SkipConvolution, Skips, find_skips
from .split import split

__all__ = [
    "SkipConvolution",
    "Skips",
    "Trace",
    "calibrate",
    "dequantize",
    "find_skips",
    "fold",
    "observe",
    "plan_of",
    "plan_of_state",
    "quantize",
    "quantized_layers",
    "set_quantizers",
    "split",
]
