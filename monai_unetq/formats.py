"""Number formats as values: ``QFormat`` parses, prints and describes Q(i.f), intN, ternary, binary, pow2 and float.

Light by design: no torch, no numpy, so that ``runtime/`` and the command line can use it anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

__all__ = ["Kind", "QFormat"]

Kind = Literal["fixed", "literal", "int", "ternary", "binary", "float", "pow2"]

MAX_BITS = 24
"""Widest format: its codes are exact in float32, which fake quantization computes in."""

ACCEPTED = (
    "Q<i>.<f> (signed fixed point: Q0.4, Q8.8), UQ<i>.<f> (unsigned: UQ6.0), "
    "Q<i>.<f>:literal (the 2019 paper's printed formula), int<N>, uint<N> (scale left to calibration: int4, "
    f"uint8), ternary, uternary, binary, pow2-<B> (zero or plus/minus a power of two, for weights, B = 2 to 6: pow2-4), "
    f"float; 1 to {MAX_BITS} bits"
)

_FIXED = re.compile(r"(U?)Q(\d{1,3})\.(\d{1,3})(:literal)?", re.ASCII)
_INTEGER = re.compile(r"(u?)int(\d{1,3})", re.ASCII)
_POWERS = re.compile(r"pow2-(\d{1,3})", re.ASCII)
_NAMED: dict[str, tuple[Kind, bool]] = {
    "ternary": ("ternary", True),
    "uternary": ("ternary", False),
    "binary": ("binary", True),
    "float": ("float", True),
}
"""Spelling → kind, signed, of the formats without a number in their name."""


@dataclass(frozen=True)
class QFormat:
    """A number format as a value: hashable, ordered by nothing, JSON as its own spelling (``str(format)``).

    ===================  =========================================================  ==================
    spelling             codes × step                                               bits
    ===================  =========================================================  ==================
    ``Q0.4``             signed fixed point, -8…7 × 2^-4, two's complement          i + f, sign included
    ``UQ6.0``            unsigned fixed point, 0…63 × 1                             i + f
    ``Q0.4:literal``     the paper's formula, sign-magnitude, -16…16 × 2^-4         ⌈log2(levels)⌉ = 6
    ``int4``, ``uint8``  -8…7, 0…255 × a scale that calibration or training finds   N
    ``ternary``          -1, 0, 1 × a scale                                         2
    ``uternary``         0, 1, 2 × a scale                                          2
    ``binary``           -1, 1 × a scale                                            1
    ``pow2-4``           0, ±1, ±2, ±4, ±8 × a scale that is a power of two         B
    ``float``            float32, not quantized                                     32
    ===================  =========================================================  ==================

    Fixed-point formats round half to even and saturate (design decision 5). The literal mode is the formula
    printed in AskariHemmat et al., 2019, section 3.1:
    ``sign(x)·(quantize(⌊|x|⌋, i) + quantize(|x| - ⌊|x|⌋, f))`` with
    ``quantize(x, n) = round(clamp(x, n) << n) >> n`` and ``clamp(x, n)`` to [0, 2^n - 1] from above where
    x ≥ 2^n - 1. The integer part is clamped and the fraction is kept, so magnitudes beyond the range wrap
    (1.3 → 0.3125 in Q0.4), the fraction may round up to 1, and Q0.4 has 33 levels: 6 bits, not 4.

    ``pow2-B``, B = 2 to 6, is Zhou et al., ICLR 2017 (Incremental Network Quantization), equation 1: zero or a
    signed power of two, of 2^(B-2) neighbouring ones. Its codes are -2^(B-2)…2^(B-2); code ±k stands for ±2^(k-1) ×
    the scale, which is the smallest magnitude. It is for weights only.

    Args:
        spec: the format's spelling, see the table; ``str(format)`` gives it back in canonical form.

    Raises:
        ValueError: if ``spec`` is no format; the message lists what is accepted.

    Example:
        >>> QFormat("Q0.4").bits, QFormat("Q0.4").step, QFormat("Q0.4").max
        (4, 0.0625, 0.4375)
    """

    spec: str
    kind: Kind = field(init=False, compare=False)
    signed: bool = field(init=False, compare=False)
    integer_bits: int = field(init=False, compare=False)
    fraction_bits: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        text = self.spec.spec if isinstance(self.spec, QFormat) else self.spec
        if not isinstance(text, str):
            raise ValueError(
                f"a number format is a string, found {type(text).__name__}; accepted: {ACCEPTED}"
            )
        fixed, integer, powers = (pattern.fullmatch(text) for pattern in (_FIXED, _INTEGER, _POWERS))
        kind: Kind
        if fixed:
            kind, signed = ("literal" if fixed[4] else "fixed"), not fixed[1]
            integer_bits, fraction_bits = int(fixed[2]), int(fixed[3])
            canonical = f"{fixed[1]}Q{integer_bits}.{fraction_bits}{fixed[4] or ''}"
        elif integer:
            kind, signed, integer_bits, fraction_bits = "int", not integer[1], int(integer[2]), 0
            canonical = f"{integer[1]}int{integer_bits}"
        elif powers:
            kind, signed, integer_bits, fraction_bits = "pow2", True, int(powers[1]), 0
            canonical = f"pow2-{integer_bits}"
            if not 2 <= integer_bits <= 6:
                raise ValueError(f"{text!r} has {integer_bits} bits, expected 2 to 6; accepted: {ACCEPTED}")
        elif text in _NAMED:
            (kind, signed), integer_bits, fraction_bits, canonical = _NAMED[text], 0, 0, text
        else:
            raise ValueError(f"{text!r} is not a number format; accepted: {ACCEPTED}")
        if (fixed or integer) and not 1 <= integer_bits + fraction_bits <= MAX_BITS:
            raise ValueError(
                f"{text!r} has {integer_bits + fraction_bits} bits, expected 1 to {MAX_BITS}; accepted: {ACCEPTED}"
            )
        if kind == "int" and signed and integer_bits == 1:
            raise ValueError(f"{text!r} has no positive code; use 'binary' or 'uint1'")
        for name, value in (
            ("spec", canonical),
            ("kind", kind),
            ("signed", signed),
            ("integer_bits", integer_bits),
            ("fraction_bits", fraction_bits),
        ):
            object.__setattr__(self, name, value)
        # Found now: in Python 3.11 torch.compile cannot trace the lock that a cached property takes when it is first read.
        for name in (
            ("levels", "bits", "step") if self.is_float else ("qmin", "qmax", "levels", "bits", "step")
        ):
            getattr(self, name)

    def __str__(self) -> str:
        return self.spec

    def __repr__(self) -> str:
        return f"QFormat({self.spec!r})"

    @property
    def is_float(self) -> bool:
        """Whether the tensor stays as it is."""
        return self.kind == "float"

    @property
    def has_free_scale(self) -> bool:
        """Whether the scale is left to calibration or training: every format but fixed point and float."""
        return self.kind in ("int", "ternary", "binary", "pow2")

    @cached_property
    def qmin(self) -> int:
        """Lowest integer code."""
        return 0 if not self.signed else -self._lowest_magnitude

    @cached_property
    def qmax(self) -> int:
        """Highest integer code.

        Raises:
            ValueError: for ``float``, which has no integer codes.
        """
        if self.is_float:
            raise ValueError("'float' has no integer codes")
        if self.kind in ("ternary", "binary"):
            return 1 if self.signed else 2
        if self.kind == "pow2":
            return 1 << (self.integer_bits - 2)
        if self.kind == "literal":
            return self._literal_magnitude
        bits = self.integer_bits + self.fraction_bits
        return (1 << (bits - 1)) - 1 if self.signed else (1 << bits) - 1

    @property
    def _lowest_magnitude(self) -> int:
        return self.qmax + 1 if self.kind in ("fixed", "int") else self.qmax

    @property
    def _literal_magnitude(self) -> int:
        # The integer part reaches 2^i - 1, the fraction rounds up to 1 (to 0 where there are no fraction bits).
        top = (1 << self.integer_bits) - 1 + (1 if self.fraction_bits else 0)
        return top << self.fraction_bits

    @cached_property
    def levels(self) -> int:
        """Number of distinct values (2^32 for ``float``)."""
        if self.is_float:
            return 1 << 32
        return 2 if self.kind == "binary" else self.qmax - self.qmin + 1

    @cached_property
    def bits(self) -> int:
        """Bits that one value takes when stored: ⌈log2(levels)⌉."""
        return (self.levels - 1).bit_length()

    @cached_property
    def step(self) -> float | None:
        """Distance of neighbouring values; None where the scale is left to calibration, and for ``float``."""
        return 2.0**-self.fraction_bits if self.kind in ("fixed", "literal") else None

    @property
    def min(self) -> float | None:
        """Smallest value; None where ``step`` is None."""
        return None if self.step is None else self.qmin * self.step

    @property
    def max(self) -> float | None:
        """Largest value; None where ``step`` is None."""
        return None if self.step is None else self.qmax * self.step

    def with_sign(self, signed: bool) -> QFormat:
        """The same bits read as signed or unsigned; how ``quantize`` resolves an activation's ``Q6.0``.

        Unsigned, ``ternary`` is ``uternary`` and ``binary`` is ``uint1``; ``float`` and ``pow2`` are returned as they
        are.

        Raises:
            ValueError: for ``uint1`` as signed, which would have no positive code.
        """
        if self.signed == signed or self.kind in ("float", "pow2"):
            return self
        if self.kind == "binary":
            return QFormat("uint1")
        unsigned_prefix = "U" if self.kind in ("fixed", "literal") else "u"
        return QFormat(self.spec.removeprefix(unsigned_prefix) if signed else unsigned_prefix + self.spec)

    def to_code(self) -> tuple[int, int, int, int]:
        """Four small integers (kind, signed, integer bits, fraction bits): the format as fixed-shape state."""
        return (_KINDS.index(self.kind), int(self.signed), self.integer_bits, self.fraction_bits)

    @classmethod
    def from_code(cls, code: tuple[int, int, int, int] | list[int]) -> QFormat:
        """The format of ``to_code()``.

        Raises:
            ValueError: if the four integers are no format's code.
        """
        if len(code) != 4 or not 0 <= code[0] < len(_KINDS) or code[1] not in (0, 1):
            raise ValueError(f"{list(code)} is not the code of a number format")
        kind, signed, integer_bits, fraction_bits = _KINDS[code[0]], bool(code[1]), code[2], code[3]
        if not signed and kind in ("float", "binary", "pow2"):
            raise ValueError(f"{list(code)} is not the code of a number format: '{kind}' is signed")
        if kind in ("fixed", "literal"):
            suffix = ":literal" if kind == "literal" else ""
            return cls(f"{'' if signed else 'U'}Q{integer_bits}.{fraction_bits}{suffix}")
        if kind == "int":
            return cls(f"{'' if signed else 'u'}int{integer_bits}")
        if kind == "pow2":
            return cls(f"pow2-{integer_bits}")
        return cls(kind if signed else f"u{kind}")


_KINDS: tuple[Kind, ...] = (
    "float",
    "fixed",
    "literal",
    "int",
    "ternary",
    "binary",
    "pow2",
)  # appended to, never reordered
