"""``Budget``: what a plan may cost, as a user spells it; counted in whole numbers, so that no rounding decides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast, get_args

from ..formats import QFormat
from ..sensitivity.table import Kind
from ..surgery.workload import Unit
from .cost import FLOAT, mac_energy, weight_bits

__all__ = ["Budget", "Quantity"]

Quantity = Literal["size", "weights", "activations", "bops", "energy"]

ACCEPTED = "size=8x, size=1.5MiB, weights=4.0bits, activations=6bits, bops=12x, energy=10x"

_SPELLING = re.compile(r"([a-z]+)=([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(x|bits?|[KMG]i?B|kB|B)")
_BYTES = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_DIGITS = 1000
"""What is out of reach is answered to three decimals."""


@dataclass(frozen=True)
class Budget:
    """One limit on a plan.

    Attributes:
        quantity: ``size``: bytes of all parameters, weights as packed, others float32. ``weights``, ``activations``:
            bits of a weight, of an input's value, on average over all of them, float ones with 32. ``bops``:
            MACs × b_w × b_a. ``energy``: see ``mac_energy``.
        number: how many of the unit.
        unit: ``x`` for times less than with everything in float32; ``bits``; or a unit of bytes.
    """

    quantity: Quantity
    number: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget of a spelling: ``size=8x``, ``size=1.5MiB``, ``weights=4.0bits``, ``activations=6bits``, …

        Raises:
            ValueError: if it is none; the message lists what is accepted.
        """
        match = _SPELLING.fullmatch(text.strip().replace(" ", ""))
        if not match or match[1] not in get_args(Quantity):
            raise ValueError(f"budget {text!r} is none; accepted: {ACCEPTED}")
        quantity, number = cast(Quantity, match[1]), Fraction(match[2])
        unit = "bits" if match[3].startswith("bit") else match[3]
        averages = quantity in ("weights", "activations")
        if (unit == "bits") != averages or (unit in _BYTES and quantity != "size"):
            raise ValueError(f"budget {text!r}: '{quantity}' has no unit '{match[3]}'; accepted: {ACCEPTED}")
        if number <= 0:
            raise ValueError(f"budget {text!r}: found {match[2]}, expected a number above 0")
        return cls(quantity, number, unit)

    def __str__(self) -> str:
        return self._spelled(self.number, up=True)

    @property
    def kinds(self) -> frozenset[Kind]:
        """What it limits: widths of weights, of inputs, or both together."""
        kinds: dict[Quantity, tuple[Kind, ...]] = {
            "size": ("weight",),
            "weights": ("weight",),
            "activations": ("input",),
        }
        return frozenset(kinds.get(self.quantity, ("weight", "input")))

    def amount(self, unit: Unit, weight: QFormat, input: QFormat) -> int:
        """What one unit takes: bytes, bits in all, bit operations, or attojoules."""
        match self.quantity:
            case "size":
                return -(-weight_bits(weight, unit.weights) // 8)
            case "weights":
                return unit.weights * weight.bits
            case "activations":
                return unit.inputs * input.bits
            case "bops":
                return unit.macs * weight.bits * input.bits
            case "energy":
                return unit.macs * mac_energy(weight, input)

    def limit(self, units: Sequence[Unit], other_parameters: int) -> int:
        """The most that the amounts of all units may add up to; below 0 where other parameters alone are too much."""
        if self.unit == "x":
            whole = self._in_float(units, other_parameters) / self.number
        else:
            whole = self.number * self._values(units)
        return int(whole // 1) - self._rest(other_parameters)

    def reached(self, amount: int, units: Sequence[Unit], other_parameters: int) -> str:
        """The tightest budget, to three decimals, that amounts adding up to ``amount`` keep."""
        amount += self._rest(other_parameters)
        if self.unit == "x":
            ratio = self._in_float(units, other_parameters) / amount if amount else Fraction(1)
            return self._spelled(ratio, up=False)
        return self._spelled(Fraction(amount) / self._values(units), up=True)

    def _rest(self, other_parameters: int) -> int:
        return 4 * other_parameters if self.quantity == "size" else 0

    def _in_float(self, units: Sequence[Unit], other_parameters: int) -> Fraction:
        return Fraction(sum(self.amount(u, FLOAT, FLOAT) for u in units) + self._rest(other_parameters))

    def _values(self, units: Sequence[Unit]) -> int:
        """What the number is multiplied with to be an amount: bytes of the unit, or values that are averaged over."""
        if self.quantity == "size":
            return _BYTES[self.unit]
        return max(sum(u.weights if self.quantity == "weights" else u.inputs for u in units), 1)

    def _spelled(self, number: Fraction, up: bool) -> str:
        scaled = -(-number * _DIGITS // 1) if up else number * _DIGITS // 1
        text = f"{int(scaled) / _DIGITS:.3f}".rstrip("0").rstrip(".")
        return f"{self.quantity}={text}{self.unit}"
