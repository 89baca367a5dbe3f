"""The knapsack behind swatfx.tune, against every choice there is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swatfx.errors import InputError
from swatfx.tuning.knapsack import choose

SETTINGS = settings(max_examples=60, deadline=None)


def best_loss(costs: list[list[float]], losses: list[list[float]], budget: float) -> float:
    found = math.inf
    for options in itertools.product(*(range(len(c)) for c in costs)):
        if sum(c[k] for c, k in zip(costs, options, strict=True)) <= budget:
            found = min(found, sum(v[k] for v, k in zip(losses, options, strict=True)))
    return found


def problems(number: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    option = st.tuples(number, st.floats(-5, 5))
    items = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=4)
    return st.tuples(items, number)


def solved(problem: Any, cells: int) -> tuple[float, float, float, list[Any], list[Any], float]:
    """(loss, spent, cheapest, costs, losses, budget)."""
    items, extra = problem
    costs = [[c for c, _ in options] for options in items]
    losses = [[v for _, v in options] for options in items]
    cheapest = sum(min(c) for c in costs)
    budget = cheapest + extra
    picked = choose(costs, losses, budget, cells=cells)
    assert picked == choose(costs, losses, budget, cells=cells)
    loss = sum(v[k] for v, k in zip(losses, picked, strict=True))
    spent = sum(c[k] for c, k in zip(costs, picked, strict=True))
    return loss, spent, cheapest, costs, losses, budget


@SETTINGS
@given(problems(st.integers(0, 40)))
def test_whole_costs_are_solved_exactly(problem: Any) -> None:
    loss, spent, _, costs, losses, budget = solved(problem, cells=100)
    assert spent <= budget
    assert loss == pytest.approx(best_loss(costs, losses, budget), abs=1e-9)


@SETTINGS
@given(problems(st.integers(0, 4000).map(lambda n: n / 97)))
def test_other_costs_are_solved_within_the_bound(problem: Any) -> None:
    cells = 50
    loss, spent, cheapest, costs, losses, budget = solved(problem, cells)
    assert spent <= budget + 1e-9
    # Rounding each item's cost up by a cell at most is like a budget smaller by as many cells.
    smaller = cheapest + (budget - cheapest) * (1 - (len(costs) + 1e-6) / cells)
    assert loss <= best_loss(costs, losses, smaller) + 1e-9


def test_what_rounding_leaves_is_spent() -> None:
    # Cells of 0.75: each upgrade takes one of two, of which one is left over.
    costs, losses = [[0.0, 0.1], [0.0, 0.8], [0.0, 0.6]], [[1.0, 0.9], [1.0, 0.3], [1.0, 0.5]]
    assert choose(costs, losses, 1.5, cells=2) == [1, 1, 1]
    assert choose(costs, losses, 0.95, cells=1) == [1, 1, 0]


def test_of_equal_losses_the_cheaper_wins() -> None:
    assert choose([[3, 1, 2]], [[1.0, 1.0, 1.0]], 3) == [1]


@pytest.mark.parametrize(
    ("costs", "losses", "budget", "message"),
    [
        ([[2.0], [3.0]], [[0.0], [0.0]], 4.0, "least reachable is 5"),
        ([[1.0, math.nan]], [[0.0, 0.0]], 4.0, "finite"),
        ([[1.0]], [[math.inf]], 4.0, "finite"),
        ([[]], [[]], 4.0, "finite"),
    ],
)
def test_a_knapsack_that_cannot_be(
    costs: list[list[float]], losses: list[list[float]], budget: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose(costs, losses, budget)
