"""Number formats: spelling, limits by hand, and what a format must be to serve as a value everywhere."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_unetq.formats import MAX_BITS, QFormat


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """Any canonical spelling of a format."""
    kind = draw(st.sampled_from(("fixed", "literal", "int", "name", "pow2")))
    if kind == "name":
        return draw(st.sampled_from(("ternary", "uternary", "binary", "float")))
    if kind == "pow2":
        return f"pow2-{draw(st.integers(2, 6))}"
    bits = draw(st.integers(1, MAX_BITS))
    if kind == "int":
        unsigned = draw(st.booleans()) or bits == 1
        return f"{'u' if unsigned else ''}int{bits}"
    fraction = draw(st.integers(0, bits))
    prefix, suffix = draw(st.sampled_from(("", "U"))), ":literal" if kind == "literal" else ""
    return f"{prefix}Q{bits - fraction}.{fraction}{suffix}"


def literal_values(integer_bits: int, fraction_bits: int) -> set[float]:
    """Every value that the formula printed in the 2019 paper takes, by running it on a fine grid."""

    def quantize(x: float, n: int) -> float:
        return round(min(x, 2**n - 1) * 2**n) / 2**n

    step = 2.0 ** -(fraction_bits + 3)
    magnitudes = [k * step for k in range(int(2 ** (integer_bits + 1) / step))]
    values = set()
    for x in magnitudes:
        whole = float(math.floor(x))
        clamped = min(whole, 2**integer_bits - 1)  # whole numbers need no rounding
        values.add(clamped + quantize(x - whole, fraction_bits))
    return values | {-v for v in values}


@given(spellings())
def test_parse_and_print_round_trip(spelling: str) -> None:
    number_format = QFormat(spelling)
    assert str(number_format) == number_format.spec == spelling
    assert repr(number_format) == f"QFormat({spelling!r})"
    assert QFormat(str(number_format)) == number_format
    assert QFormat(number_format) == number_format  # type: ignore[arg-type]


@given(spellings())
def test_integer_code_round_trip(spelling: str) -> None:
    number_format = QFormat(spelling)
    code = number_format.to_code()
    assert all(type(part) is int for part in code)
    assert QFormat.from_code(code) == number_format
    assert QFormat.from_code(list(code)) == number_format


@given(spellings())
def test_limits_hang_together(spelling: str) -> None:
    f = QFormat(spelling)
    assert 2 ** (f.bits - 1) < f.levels <= 2**f.bits
    if f.is_float:
        return
    assert f.qmin <= 0 <= f.qmax
    assert f.signed == (f.qmin < 0)
    if f.kind != "binary":
        assert f.levels == f.qmax - f.qmin + 1
    if f.kind in ("fixed", "int", "pow2"):
        assert f.bits == f.integer_bits + f.fraction_bits
    assert f.has_free_scale == (f.step is None)
    if f.step is not None:
        assert f.min == f.qmin * f.step
        assert f.max == f.qmax * f.step
    assert max(-f.qmin, f.qmax) <= 2**24, "codes are exact in float32"


@pytest.mark.parametrize(
    ("spelling", "bits", "levels", "step", "low", "high"),
    [
        ("Q0.4", 4, 16, 0.0625, -0.5, 0.4375),
        ("UQ6.0", 6, 64, 1.0, 0.0, 63.0),
        ("UQ0.8", 8, 256, 0.00390625, 0.0, 0.99609375),
        ("Q8.8", 16, 65536, 0.00390625, -128.0, 127.99609375),
        ("Q6.0", 6, 64, 1.0, -32.0, 31.0),
        ("Q1.0", 1, 2, 1.0, -1.0, 0.0),
        ("Q0.4:literal", 6, 33, 0.0625, -1.0, 1.0),
        ("UQ0.4:literal", 5, 17, 0.0625, 0.0, 1.0),
        ("Q6.0:literal", 7, 127, 1.0, -63.0, 63.0),
        ("Q2.1:literal", 5, 17, 0.5, -4.0, 4.0),
    ],
)
def test_fixed_point_by_hand(
    spelling: str, bits: int, levels: int, step: float, low: float, high: float
) -> None:
    f = QFormat(spelling)
    assert (f.bits, f.levels, f.step, f.min, f.max) == (bits, levels, step, low, high)


@pytest.mark.parametrize(("integer_bits", "fraction_bits"), [(0, 4), (1, 1), (2, 3), (3, 0), (6, 0), (0, 1)])
def test_literal_levels_are_those_that_the_printed_formula_takes(
    integer_bits: int, fraction_bits: int
) -> None:
    f = QFormat(f"Q{integer_bits}.{fraction_bits}:literal")
    assert f.step is not None
    assert literal_values(integer_bits, fraction_bits) == {c * f.step for c in range(f.qmin, f.qmax + 1)}


@pytest.mark.parametrize(
    ("spelling", "bits", "levels", "codes"),
    [
        ("int4", 4, 16, (-8, 7)),
        ("uint8", 8, 256, (0, 255)),
        ("int2", 2, 4, (-2, 1)),
        ("uint1", 1, 2, (0, 1)),
        ("ternary", 2, 3, (-1, 1)),
        ("uternary", 2, 3, (0, 2)),
        ("pow2-2", 2, 3, (-1, 1)),
        ("pow2-4", 4, 9, (-4, 4)),
        ("pow2-6", 6, 33, (-16, 16)),
        ("binary", 1, 2, (-1, 1)),
    ],
)
def test_free_scale_by_hand(spelling: str, bits: int, levels: int, codes: tuple[int, int]) -> None:
    f = QFormat(spelling)
    assert (f.bits, f.levels, (f.qmin, f.qmax)) == (bits, levels, codes)
    assert f.step is f.min is f.max is None


def test_float_is_stored_in_32_bits_and_has_no_codes() -> None:
    f = QFormat("float")
    assert (f.is_float, f.bits, f.levels, f.step) == (True, 32, 2**32, None)
    assert [g.is_float for g in map(QFormat, ("int8", "Q0.4", "binary"))] == [False] * 3
    for limit in ("qmin", "qmax"):
        with pytest.raises(ValueError, match="'float' has no integer codes"):
            getattr(f, limit)


def test_leading_zeros_are_the_same_format() -> None:
    assert QFormat("Q00.04") == QFormat("Q0.4")
    assert str(QFormat("UQ06.000")) == "UQ6.0"
    assert str(QFormat("int08")) == "int8"


def test_is_a_value() -> None:
    f = QFormat("Q0.4")
    same, bits = QFormat("Q0.4"), f.bits  # a cached property must not take part in equality
    assert f == same
    assert hash(f) == hash(same)
    assert len({f, same, QFormat("UQ0.4"), QFormat("Q0.4:literal")}) == 3
    for copied in (copy.copy(f), copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert copied == f
        assert copied.bits == bits
    with pytest.raises(FrozenInstanceError):
        f.signed = False  # type: ignore[misc]


@given(spellings())
def test_json_is_the_spelling(spelling: str) -> None:
    f = QFormat(spelling)
    assert QFormat(json.loads(json.dumps({"format": str(f)}))["format"]) == f


@pytest.mark.parametrize(
    "spelling",
    [
        "", "Q", "Q4", "Q.4", "Q4.", "q0.4", "Q0,4", " Q0.4", "Q0.4 ", "Q0.4\n", "Q-1.4", "Q+1.4", "SQ0.4",
        "Q0.4:paper", "UQ", "int", "int-4", "Int8", "uInt8", "UINT8", "int8.0", "int4:literal", "float32",
        "Float", "Ternary", "Q٣.٤", "Q1e1.0", "8", "None", "utern", "ubinary", "ufloat", "pow2", "pow2-", "pow-4",
        "upow2-4", "Pow2-4", "pow2-4.0", "pow2-٤",
    ],
)  # fmt: skip
def test_unparsable_shows_what_is_accepted(spelling: str) -> None:
    with pytest.raises(ValueError, match="is not a number format; accepted: ") as caught:
        QFormat(spelling)
    message = str(caught.value)
    assert repr(spelling) in message
    for accepted in ("Q<i>.<f>", "Q0.4", "UQ6.0", ":literal", "int4", "uint8", "ternary", "uternary", "binary",
                     "pow2-<B>", "float"):  # fmt: skip
        assert accepted in message


@pytest.mark.parametrize("spelling", ["Q0.0", "UQ0.0", "int0", "uint0", "Q12.13", "int25", "Q999.999"])
def test_too_few_or_too_many_bits(spelling: str) -> None:
    with pytest.raises(ValueError, match=f"bits, expected 1 to {MAX_BITS}; accepted: "):
        QFormat(spelling)


def test_signed_single_bit_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="use 'binary' or 'uint1'"):
        QFormat("int1")


@pytest.mark.parametrize("spelling", ["pow2-0", "pow2-1", "pow2-7", "pow2-99"])
def test_powers_of_two_have_two_to_six_bits(spelling: str) -> None:
    with pytest.raises(ValueError, match=f"'{spelling}' has .* bits, expected 2 to 6; accepted: "):
        QFormat(spelling)


@pytest.mark.parametrize("spec", [None, 4, 0.4, b"Q0.4", ["Q0.4"], {"format": "Q0.4"}])
def test_other_types_are_a_value_error(spec: Any) -> None:
    with pytest.raises(ValueError, match=f"is a string, found {type(spec).__name__}; accepted: "):
        QFormat(spec)


@pytest.mark.parametrize(
    "code",
    [(), (1, 1, 0), (1, 1, 0, 4, 0), (6, 1, 0, 4), (-1, 1, 0, 4), (1, 2, 0, 4), (1, 1, -1, 4), (1, 1, 0, 0),
     (1, 1, 20, 20), (3, 1, 1, 0), (6, 1, 7, 0), (6, 0, 4, 0), (7, 1, 0, 0), (5, 0, 0, 0), (0, 0, 0, 0)],
)  # fmt: skip
def test_foreign_integer_code(code: Any) -> None:
    with pytest.raises(ValueError):
        QFormat.from_code(code)


def test_integer_codes_are_those_of_saved_networks() -> None:
    # Written into checkpoints: they must never change their meaning.
    spellings = ("float", "Q0.4", "UQ6.0:literal", "int4", "ternary", "binary", "pow2-4", "uternary")
    codes = [(0, 1, 0, 0), (1, 1, 0, 4), (2, 0, 6, 0), (3, 1, 4, 0), (4, 1, 0, 0), (5, 1, 0, 0), (6, 1, 4, 0)]
    codes.append((4, 0, 0, 0))
    assert [QFormat(s).to_code() for s in spellings] == codes


@pytest.mark.parametrize(
    ("signed", "unsigned"),
    [
        ("Q6.0", "UQ6.0"),
        ("Q0.4:literal", "UQ0.4:literal"),
        ("int8", "uint8"),
        ("Q1.0", "UQ1.0"),
        ("ternary", "uternary"),
    ],
)
def test_with_sign(signed: str, unsigned: str) -> None:
    pair = QFormat(signed), QFormat(unsigned)
    for f, wanted in product(pair, (True, False)):
        assert f.with_sign(wanted) == pair[0 if wanted else 1]


def test_binary_without_a_sign_is_uint1() -> None:
    assert QFormat("binary").with_sign(False) == QFormat("uint1")
    assert QFormat("binary").with_sign(True) == QFormat("binary")


@pytest.mark.parametrize("spelling", ["float", "pow2-4"])
def test_with_sign_leaves_formats_that_have_no_unsigned_form(spelling: str) -> None:
    assert QFormat(spelling).with_sign(False) == QFormat(spelling).with_sign(True) == QFormat(spelling)


def test_uint1_has_no_signed_form() -> None:
    with pytest.raises(ValueError, match="no positive code"):
        QFormat("uint1").with_sign(True)


def test_needs_neither_torch_nor_numpy() -> None:
    program = "import sys, monai_unetq.formats; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
