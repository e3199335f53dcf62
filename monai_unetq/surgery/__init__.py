"""Network in, network out: observe, find skips, equalize, split, quantize, calibrate, dequantize, fold, supervise skips."""

from .calibrate import calibrate
from .equalize import equalize
from .fold import fold
from .norms import reestimate_norms, settle_norms
from .observe import Trace, observe
from .quantize import dequantize, plan_of, plan_of_state, quantize, quantized_layers, set_quantizers
from .skips import SkipConvolution, Skips, find_skips
from .split import split
from .supervise import SupervisedOutput, attach_supervision, attach_teacher, inference_state, strip
from .tie import tie

__all__ = [
    "SkipConvolution",
    "Skips",
    "SupervisedOutput",
    "Trace",
    "attach_supervision",
    "attach_teacher",
    "calibrate",
    "dequantize",
    "equalize",
    "find_skips",
    "fold",
    "inference_state",
    "observe",
    "plan_of",
    "plan_of_state",
    "quantize",
    "quantized_layers",
    "reestimate_norms",
    "set_quantizers",
    "settle_norms",
    "split",
    "strip",
    "tie",
]
