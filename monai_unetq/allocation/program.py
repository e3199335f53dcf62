"""``least``: one option for each of many variables, the least total Ω under limits, by integer programming.

The solver works in floating point with tolerances of its own; what is returned was checked in whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

__all__ = ["Option", "least"]

_TOP = 1e4
"""What the total is scaled to: the solver stops 1e-6 from the optimum, which is then 1e-10 of the total."""

_STABLE = 10.0
_ROUGH = 0.3
"""Relative gap at which the first answers are good enough: they only say what to leave out, and the scale."""

_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Option:
    """What one variable may be.

    Attributes:
        omega: what it adds to the total; not negative.
        amounts: what it takes of each limit.
    """

    omega: float
    amounts: tuple[int, ...]


Variables = Sequence[Sequence[Option]]


def least(variables: Variables, limits: Sequence[int]) -> list[int]:
    """The options with the least total Ω.

    Exact in the limits. The total is the least to within 1e-9 of what it exceeds the sum of the least Ω by; where
    options have the same Ω, later ones are taken as far as the limits allow.

    The solver's tolerances do not bite: an option whose Ω alone exceeds its variable's least by more than the best
    total known exceeds the sum of the least is in no optimum, so it is left out, what remains is scaled to that excess,
    and solved again, until the excess stays. Variables that add next to nothing are then solved on their own, the
    others held, on their own scale. Variables that share no limit are solved apart.

    Args:
        variables: the options of each, from narrow to wide: the first one takes the least of every limit.
        limits: what the amounts may add up to, of each; the first options together keep them.

    Returns:
        the index of each variable's option.

    Raises:
        RuntimeError: if the solver fails.
    """
    chosen = [0] * len(variables)
    for members in _components(variables, len(limits)):
        apart = [variables[v] for v in members]
        others = [v for v in range(len(variables)) if v not in set(members)]
        taken = totals([variables[v] for v in others], [chosen[v] for v in others], len(limits))
        found = _solved(apart, [limit - amount for limit, amount in zip(limits, taken, strict=True)])
        for v, index in zip(members, found, strict=True):
            chosen[v] = index
    return _widened(variables, limits, chosen)


def totals(variables: Variables, chosen: Sequence[int], count: int) -> list[int]:
    """What the chosen options take of each of ``count`` limits."""
    return [
        sum(options[index].amounts[k] for options, index in zip(variables, chosen, strict=True))
        for k in range(count)
    ]


def _components(variables: Variables, count: int) -> list[list[int]]:
    """Variables that no limit connects, apart; what others take of a limit is then the same whatever they are."""
    found: list[tuple[set[int], list[int]]] = []
    for v, options in enumerate(variables):
        uses = {k for k in range(count) if len({option.amounts[k] for option in options}) > 1}
        connected = [entry for entry in found if entry[0] & uses]
        found = [entry for entry in found if entry not in connected]
        merged = sorted([v, *(other for _, members in connected for other in members)])
        found.append((uses.union(*(limits for limits, _ in connected)), merged))
    return [members for _, members in found]


def _solved(variables: Variables, limits: Sequence[int]) -> list[int]:
    best = [0] * len(variables)
    excess = [_excess(options) for options in variables]
    useful = [_undominated(options) for options in variables]
    total = _total(excess, best)
    gap = _ROUGH
    while total > 0:
        before = total
        kept = [
            [i for i in indices if values[i] <= total] for indices, values in zip(useful, excess, strict=True)
        ]
        found = _programmed(variables, limits, excess, kept, total, gap)
        if _total(excess, found) < total:
            best, total = found, _total(excess, found)
        if total > before / _STABLE:
            if gap == 0:
                break
            gap = 0.0
    small = [v for v, index in enumerate(best) if excess[v][index] <= _NEGLIGIBLE * total]
    if 0 < len(small) < len(best) and any(excess[v][best[v]] for v in small):
        held = [v for v in range(len(best)) if v not in set(small)]
        taken = totals([variables[v] for v in held], [best[v] for v in held], len(limits))
        left = [limit - amount for limit, amount in zip(limits, taken, strict=True)]
        for v, index in zip(small, _solved([variables[v] for v in small], left), strict=True):
            best[v] = index
    return best


def _undominated(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other one beats, or equals and comes before, in Ω and in every limit."""
    order = sorted(range(len(options)), key=lambda i: (options[i].omega, options[i].amounts))
    kept: list[int] = []
    for i in order:
        if not any(
            all(a <= b for a, b in zip(options[j].amounts, options[i].amounts, strict=True)) for j in kept
        ):
            kept.append(i)
    return sorted(kept)


def _excess(options: Sequence[Option]) -> list[float]:
    least_omega = min(option.omega for option in options)
    return [option.omega - least_omega for option in options]


def _total(excess: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return math.fsum(values[index] for values, index in zip(excess, chosen, strict=True))


def _programmed(
    variables: Variables,
    limits: Sequence[int],
    excess: Sequence[Sequence[float]],
    kept: Sequence[Sequence[int]],
    scale: float,
    gap: float,
) -> list[int]:
    """The solver's answer to one integer program: a 0 or 1 for each option, one 1 for each variable.

    The solver allows limits to be missed by its tolerance. An answer that does is excluded, and it is asked again.
    """
    columns = [(v, i) for v, indices in enumerate(kept) for i in indices]
    owner = np.array([v for v, _ in columns])
    costs = np.array([excess[v][i] for v, i in columns]) / scale * _TOP
    shape = (len(variables), len(columns))
    one_each = coo_array((np.ones(len(columns)), (owner, np.arange(len(columns)))), shape=shape)
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    for k, limit in enumerate(limits):
        row, bound = _row([variables[v][i].amounts[k] for v, i in columns], owner, limit)
        if row.any():
            constraints.append(LinearConstraint(row[None], -np.inf, bound))
    while True:
        answer = milp(
            costs, integrality=np.ones(len(columns)), bounds=Bounds(0, 1), constraints=constraints,
            options={"mip_rel_gap": gap},
        )  # fmt: skip
        if answer.status != 0:
            raise RuntimeError(f"the integer program could not be solved: {answer.message}")
        ones = answer.x > 0.5
        chosen = [0] * len(variables)
        for column in np.flatnonzero(ones):
            chosen[columns[column][0]] = columns[column][1]
        taken = totals(variables, chosen, len(limits))
        if all(amount <= limit for amount, limit in zip(taken, limits, strict=True)):
            return chosen
        constraints.append(LinearConstraint(ones[None].astype(float), -np.inf, len(variables) - 1))


def _row(amounts: Sequence[int], owner: np.ndarray, limit: int) -> tuple[np.ndarray, float]:
    """One limit as the solver gets it: amounts above each variable's least, so scaled that the room is 1000."""
    lowest: dict[int, int] = {}
    for v, amount in zip(owner.tolist(), amounts, strict=True):
        lowest[v] = min(amount, lowest.get(v, amount))
    room = limit - sum(lowest.values())
    above = [amount - lowest[v] for v, amount in zip(owner.tolist(), amounts, strict=True)]
    scale = 1000 / max(room, 1)
    # More than the room is more than the room, however much: no coefficient has to be large.
    return np.array([min(value, 2 * max(room, 1)) * scale for value in above]), room * scale


def _widened(variables: Variables, limits: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Later options, where Ω does not grow by it and the limits allow it, in the order of the variables."""
    chosen = list(chosen)
    left = [
        limit - amount for limit, amount in zip(limits, totals(variables, chosen, len(limits)), strict=True)
    ]
    changed = True
    while changed:
        changed = False
        for v, options in enumerate(variables):
            now = options[chosen[v]]
            room = [free + amount for free, amount in zip(left, now.amounts, strict=True)]
            fitting = [
                index
                for index, option in enumerate(options)
                if all(amount <= free for amount, free in zip(option.amounts, room, strict=True))
            ]
            best = min(fitting, key=lambda index: (options[index].omega, -index))
            if best != chosen[v]:
                left = [free - amount for free, amount in zip(room, options[best].amounts, strict=True)]
                chosen[v], changed = best, True
    return chosen
