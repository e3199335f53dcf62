"""Network in, network out: observe, quantize, dequantize, fold."""

from .fold import fold
from .observe import Trace, observe
from .quantize import dequantize, plan_of, quantize

__all__ = ["Trace", "dequantize", "fold", "observe", "plan_of", "quantize"]
