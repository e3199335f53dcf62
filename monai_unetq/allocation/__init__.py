"""What a plan costs."""

from .cost import Cost, cost_of

__all__ = ["Cost", "cost_of"]
