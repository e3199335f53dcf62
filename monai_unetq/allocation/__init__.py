"""What a plan costs, and the plan with the least sensitivity under a budget."""

from .allocate import allocate, budgets_reached, omega_of
from .budget import Budget
from .cost import Cost, LayerCost, NetworkCost, cost_of, layer_costs
from .pareto import Point, budget_steps, pareto

__all__ = [
    "Budget",
    "Cost",
    "LayerCost",
    "NetworkCost",
    "Point",
    "allocate",
    "budget_steps",
    "budgets_reached",
    "cost_of",
    "layer_costs",
    "omega_of",
    "pareto",
]
