"""``pareto``: the least Ω for each of several budgets; cheap, because sensitivities are measured once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from ..sensitivity.table import Sensitivities
from .allocate import Constraints, allocate, budgets_reached, check_network, omega_of, tightest
from .budget import Budget, Quantity
from .cost import layer_costs

__all__ = ["Point", "budget_steps", "pareto"]

_LOOSE = {"bits": "32", "x": "0.01"}
"""What every plan keeps; the energy of wide integers is above that of float32."""


@dataclass(frozen=True)
class Point:
    """One plan of the front.

    Attributes:
        budget: what was asked for.
        reached: the tightest budget of the kind that the plan keeps.
        omega: its total Ω.
        size_bytes: all parameters, weights as packed, others float32.
        bops: bit operations for one image.
        energy: of the MACs for one image, in picojoules.
    """

    budget: str
    reached: str
    omega: float
    size_bytes: int
    bops: int
    energy: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)


def pareto(
    sensitivities: Sensitivities,
    network: nn.Module | None = None,
    *,
    budgets: Sequence[str],
    beside: Sequence[str] = (),
    **constraints: Any,
) -> list[Point]:
    """The plan with the least Ω for each of several budgets, as a point of what it costs.

    Args:
        sensitivities: Ω of every tensor at every choice.
        network: checked to be the one that was measured, where it is given.
        budgets: one plan for each, such as ``budget_steps`` gives.
        beside: budgets that all of the plans keep, too.
        constraints: choices and constraints of ``allocate``.

    Returns:
        the points, in the order of the budgets.

    Raises:
        ValueError: as ``allocate`` does.
    """
    if network is not None:
        check_network(network, sensitivities)
    points = []
    for budget in budgets:
        plan = allocate(sensitivities, budget=[budget, *beside], **constraints)
        cost = layer_costs(sensitivities.units, plan, sensitivities.other_parameters)
        (reached,) = budgets_reached(sensitivities, [budget], plan)
        total = math.fsum(omega_of(sensitivities, plan).values())
        points.append(Point(budget, reached, total, cost.size_bytes, cost.bops, cost.energy))
    return points


def budget_steps(
    sensitivities: Sensitivities,
    quantity: Quantity,
    *,
    steps: int = 13,
    **constraints: Any,
) -> list[str]:
    """Budgets from the tightest that is in reach to one beyond which Ω does not fall any more.

    Averages of bits in equal steps, ratios in equal factors.

    Args:
        sensitivities: what is to be allocated.
        quantity: what the budgets limit.
        steps: how many, at least 2.
        constraints: choices and constraints of ``allocate``.

    Raises:
        ValueError: as ``allocate`` does.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2")
    unit = "bits" if quantity in ("weights", "activations") else "x"
    loose = f"{quantity}={_LOOSE[unit]}{unit}"
    first = tightest(sensitivities, loose, Constraints(**constraints))
    plan = allocate(sensitivities, budget=loose, **constraints)
    (last,) = budgets_reached(sensitivities, [loose], plan)
    low, high = (float(Budget.parse(text).number) for text in (first, last))
    between = []
    for step in range(1, steps - 1):
        share = step / (steps - 1)
        number = low * (high / low) ** share if unit == "x" else low + (high - low) * share
        between.append(str(Budget(quantity, Fraction(number), unit)))
    return list(dict.fromkeys([first, *between, last]))
