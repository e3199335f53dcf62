"""How one tensor is rounded in training, and how its scale is found."""

from .functional import fake_quantize, learned_fake_quantize, literal_fake_quantize, to_codes
from .quantizer import Quantizer
from .ranges import RangeMethod, RangeObserver, find_scale, round_to_power_of_two

__all__ = [
    "Quantizer",
    "RangeMethod",
    "RangeObserver",
    "fake_quantize",
    "find_scale",
    "learned_fake_quantize",
    "literal_fake_quantize",
    "round_to_power_of_two",
    "to_codes",
]
