"""The integer program against every combination of options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_unetq.allocation import program
from monai_unetq.allocation.program import Option, least, totals


def brute(variables: list[list[Option]], limits: list[int]) -> float:
    """The least total Ω that keeps the limits, of all combinations."""
    return min(
        math.fsum(option.omega for option in options)
        for options in itertools.product(*variables)
        if all(sum(o.amounts[k] for o in options) <= limit for k, limit in enumerate(limits))
    )


OMEGAS = st.one_of(
    st.just(0.0),
    st.floats(1e-12, 1e3),
    st.builds(lambda digits, power: digits * 10.0**power, st.integers(1, 99), st.integers(-12, 1)),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Option]], list[int]]:
    """Up to five variables with up to four options, one to three limits, amounts of up to 10^13."""
    count = draw(st.integers(1, 3))
    amounts = st.one_of(st.integers(0, 9), st.integers(0, 10**13))
    variables = []
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 4))
        taken = [sorted(draw(st.lists(amounts, min_size=size, max_size=size))) for _ in range(count)]
        omegas = draw(st.lists(OMEGAS, min_size=size, max_size=size))
        variables.append([Option(w, a) for w, a in zip(omegas, zip(*taken, strict=True), strict=True)])
    lowest = [sum(options[0].amounts[k] for options in variables) for k in range(count)]
    highest = [sum(options[-1].amounts[k] for options in variables) for k in range(count)]
    limits = [draw(st.integers(low, high)) for low, high in zip(lowest, highest, strict=True)]
    return variables, limits


@settings(max_examples=150)
@given(problems())
def test_equals_brute_force(problem: tuple[list[list[Option]], list[int]]) -> None:
    variables, limits = problem
    chosen = least(variables, limits)
    assert all(t <= limit for t, limit in zip(totals(variables, chosen, len(limits)), limits, strict=True))
    found = math.fsum(options[index].omega for options, index in zip(variables, chosen, strict=True))
    floor = math.fsum(min(option.omega for option in options) for options in variables)
    best = brute(variables, limits)
    assert found - best <= 1e-9 * (best - floor)


def test_small_omegas_beside_a_large_one_that_cannot_be_avoided() -> None:
    """Without a scale of its own, 10^-12 beside 10^3 would be below any tolerance."""
    stuck = [Option(1000.0, (0,)), Option(0.0, (100,))]
    small = [[Option(digit * 1e-12, (0,)), Option(0.0, (cost,))] for digit, cost in ((7, 5), (4, 3), (4, 2))]
    assert least([stuck, *small], [5]) == [0, 0, 1, 1]  # 7, not 4 + 4


def test_limits_are_kept_to_the_last_of_many_digits() -> None:
    """One more than the limit is below the solver's tolerance, and would be better."""
    over = 10**15
    variables = [[Option(5.0, (0,)), Option(4.0, (over - 1,)), Option(1.0, (over,))]]
    assert least(variables, [over - 1]) == [1]
    assert least(variables, [over]) == [2]


def test_answers_that_miss_a_limit_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    solve = scipy.optimize.milp

    def counted(*args: object, **options: Any) -> object:
        rows.append(len(options["constraints"]))
        return solve(*args, **options)

    monkeypatch.setattr(program, "milp", counted)
    ten = 10**12
    variables = [[Option(3.0, (0,)), Option(1.0, (ten + 1,))], [Option(3.0, (0,)), Option(0.9, (ten,))]]
    assert least(variables, [2 * ten]) == [0, 1]
    assert max(rows) == 3, "one for each variable, the limit, and an answer that was excluded"


def test_equal_omega_goes_to_the_later_option_where_it_fits() -> None:
    flat = [Option(0.0, (2,)), Option(0.0, (3,)), Option(0.0, (8,))]
    assert least([flat, flat], [11]) == [2, 1]
    assert least([flat, flat], [4]) == [0, 0]


def test_a_solver_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        status, message = 4, "numerical trouble"

    monkeypatch.setattr(program, "milp", lambda *_, **__: Answer())
    with pytest.raises(RuntimeError, match="numerical trouble"):
        least([[Option(1.0, (0,)), Option(0.0, (1,))]], [1])
