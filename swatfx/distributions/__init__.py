"""Distributions: how a global budget of active weights is shared over layers.

A distribution is a function `(shapes, density) -> densities` of weight shapes and the target; it
knows nothing of graphs. Add one by adding it here, or at run time to `DISTRIBUTIONS`.
"""

from collections.abc import Callable, Sequence

from swatfx.density import Density
from swatfx.distributions.erk import er, erk
from swatfx.distributions.momentum import momentum_budgets
from swatfx.distributions.uniform import uniform
from swatfx.errors import UnknownNameError

Shape = tuple[int, ...]
Distribution = Callable[[Sequence[Shape], Density], list[Density]]

# "momentum" starts uniform; `swatfx.attach` moves it.
DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": uniform,
    "erk": erk,
    "er": er,
    "momentum": uniform,
}


def get(name: str) -> Distribution:
    """The distribution called `name`."""
    if name not in DISTRIBUTIONS:
        raise UnknownNameError("distribution", name, DISTRIBUTIONS)
    return DISTRIBUTIONS[name]


__all__ = [
    "DISTRIBUTIONS",
    "Distribution",
    "Shape",
    "er",
    "erk",
    "get",
    "momentum_budgets",
    "uniform",
]
