"""Budgets: what their spellings mean, counted by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_unetq.allocation.budget import Budget
from monai_unetq.allocation.cost import FLOAT, mac_energy
from monai_unetq.formats import QFormat
from monai_unetq.parts import WHOLE
from monai_unetq.surgery.workload import Unit

UNITS = (Unit("a", WHOLE, 101, 64, 32, 1000, 1), Unit("b", WHOLE, 50, 36, 8, 300, 3))
OTHERS = 7
INT4, INT8 = QFormat("int4"), QFormat("int8")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("size=8x", (4 * 158 // 8) - 28),
        ("size=1KiB", 1024 - 28),
        ("size=1.5kB", 1500 - 28),
        ("size=0.5MiB", 2**19 - 28),
        ("weights=4bits", 4 * 151),
        ("weights=4.1bit", 619),  # 619.1
        ("activations=6.0 bits", 600),
        ("bops=12x", 1300 * 1024 // 12),
        ("energy=2x", 1300 * 4_600_000 // 2),
    ],
)
def test_limit(text: str, amount: int) -> None:
    assert Budget.parse(text).limit(UNITS, OTHERS) == amount


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("size=1x", 51),  # 101 weights of four bits end in the middle of a byte
        ("weights=1bits", 404),
        ("activations=1bits", 512),
        ("bops=1x", 32_000),
        ("energy=1x", 1000 * mac_energy(INT4, INT8)),
    ],
)
def test_amount_of_a_unit(text: str, amount: int) -> None:
    assert Budget.parse(text).amount(UNITS[0], INT4, INT8) == amount


@given(
    st.sampled_from(["size=1x", "size=1B", "size=1KiB", "weights=1bits", "activations=1bits", "bops=1x", "energy=1x"]),
    st.integers(2, 24),
    st.integers(2, 24),
)  # fmt: skip
def test_what_is_reached_is_a_budget_that_is_kept(text: str, weight: int, input: int) -> None:
    """Given back as it is printed, and tight to three decimals."""
    formats = QFormat(f"int{weight}"), QFormat(f"int{input}")
    budget = Budget.parse(text)
    amount = sum(budget.amount(unit, *formats) for unit in UNITS)
    reached = Budget.parse(budget.reached(amount, UNITS, OTHERS))
    assert amount <= reached.limit(UNITS, OTHERS)
    step = Fraction(1 if reached.unit == "x" else -1, 1000)
    tighter = Budget(reached.quantity, reached.number + step, reached.unit)
    assert tighter.number <= 0 or tighter.limit(UNITS, OTHERS) < amount


def test_everything_in_float_is_one_time() -> None:
    for text in ("size=1x", "bops=1x", "energy=1x"):
        budget = Budget.parse(text)
        assert sum(budget.amount(u, FLOAT, FLOAT) for u in UNITS) == budget.limit(UNITS, OTHERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8x", "budget '8x' is none; accepted: size=8x"),
        ("sizes=8x", "is none"),
        ("size=8", "is none"),
        ("size=-8x", "is none"),
        ("size=nanx", "is none"),
        ("size=4bits", "'size' has no unit 'bits'"),
        ("weights=8x", "'weights' has no unit 'x'"),
        ("bops=3MiB", "'bops' has no unit 'MiB'"),
        ("size=0x", "expected a number above 0"),
    ],
)
def test_what_is_no_budget(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)
