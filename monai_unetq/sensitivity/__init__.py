"""How much each tensor of a network minds being rounded: Hessian traces, and the cheap metrics they are compared with."""

from .metrics import fisher, hessian_traces, score_drop, sqnr
from .table import Sensitivities, Sensitivity

__all__ = ["Sensitivities", "Sensitivity", "fisher", "hessian_traces", "score_drop", "sqnr"]
