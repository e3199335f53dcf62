"""The front: one optimal plan for each budget."""

from __future__ import annotations

import math

import pytest

from monai_unetq.allocation import allocate, budget_steps, layer_costs, omega_of, pareto
from monai_unetq.allocation.budget import Budget, Quantity

from .problems import large

SENSITIVITIES = large(6, 3)


@pytest.mark.parametrize("quantity", ["size", "weights", "activations", "bops", "energy"])
def test_steps_reach_from_the_narrowest_to_the_widest(quantity: Quantity) -> None:
    steps = budget_steps(SENSITIVITIES, quantity, steps=5)
    points = pareto(SENSITIVITIES, budgets=steps)
    assert len(points) == 5
    omegas = [point.omega for point in points]
    assert omegas == sorted(omegas, reverse=True)
    assert omegas[0] > 10 * omegas[-1]
    kind = "input" if quantity == "activations" else "weight"
    for point, bits in ((points[0], 2), (points[-1], 8)):
        plan = allocate(SENSITIVITIES, budget=point.budget)
        chosen = {
            layer.weight.bits if kind == "weight" else layer.input.bits for layer in plan.layers.values()
        }
        assert chosen == {bits}
    with pytest.raises(ValueError, match="out of reach"):
        first = Budget.parse(steps[0])
        more = first.number * (2 if first.unit == "x" else 1) / (1 if first.unit == "x" else 2)
        allocate(SENSITIVITIES, budget=f"{quantity}={float(more):.3f}{first.unit}")


def test_points_are_plans_of_allocate() -> None:
    (point,) = pareto(SENSITIVITIES, budgets=["size=8x"], beside=["bops=50x"], at_least={"layer0": 3})
    plan = allocate(SENSITIVITIES, budget=["size=8x", "bops=50x"], at_least={"layer0": 3})
    cost = layer_costs(SENSITIVITIES.units, plan, SENSITIVITIES.other_parameters)
    assert point.omega == pytest.approx(math.fsum(omega_of(SENSITIVITIES, plan).values()))
    assert (point.size_bytes, point.bops, point.energy) == (cost.size_bytes, cost.bops, cost.energy)
    assert Budget.parse(point.reached).number >= 8


def test_one_step_is_none() -> None:
    with pytest.raises(ValueError, match="steps is 1"):
        budget_steps(SENSITIVITIES, "size", steps=1)
