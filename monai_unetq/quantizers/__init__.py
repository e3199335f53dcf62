"""How one tensor is rounded in training, and how its scale is found."""

from .functional import (
    fake_quantize,
    learned_fake_quantize,
    learned_fake_quantize_parts,
    literal_fake_quantize,
    recorded,
    to_codes,
)
from .low_bit import (
    power_of_two_codes,
    power_of_two_weights,
    sign_codes,
    sign_quantize,
    sign_weights,
    ternary_codes,
    ternary_tanh,
    ternary_weights,
)
from .quantizer import Quantizer
from .ranges import RangeMethod, RangeObserver, find_scale, round_to_power_of_two, weight_scale

__all__ = [
    "Quantizer",
    "RangeMethod",
    "RangeObserver",
    "fake_quantize",
    "find_scale",
    "learned_fake_quantize",
    "learned_fake_quantize_parts",
    "literal_fake_quantize",
    "power_of_two_codes",
    "power_of_two_weights",
    "recorded",
    "round_to_power_of_two",
    "sign_codes",
    "sign_quantize",
    "sign_weights",
    "ternary_codes",
    "ternary_tanh",
    "ternary_weights",
    "to_codes",
    "weight_scale",
]
