"""Network in, network out: observe, quantize, dequantize, fold."""

from .fold import fold
from .observe import Trace, observe
from .quantize import dequantize, plan_of, plan_of_state, quantize, quantized_layers, set_quantizers

__all__ = [
    "Trace",
    "dequantize",
    "fold",
    "observe",
    "plan_of",
    "plan_of_state",
    "quantize",
    "quantized_layers",
    "set_quantizers",
]
