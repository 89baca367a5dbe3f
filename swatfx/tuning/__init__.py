"""Densities for a budget: what each layer loses, what it costs, and the best choice."""

from swatfx.tuning.costs import check_objective
from swatfx.tuning.search import cost, tune

__all__ = [
    "check_objective",
    "cost",
    "tune",
]
