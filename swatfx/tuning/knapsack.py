"""One option an item, least loss, within a budget: the multiple-choice knapsack problem.

Solved by dynamic programming over the budget, cut into cells; what rounding to cells leaves of it
is spent greedily. It knows nothing of layers or densities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from swatfx.errors import InputError

CELLS = 20_000

Floats = npt.NDArray[np.float64]


def choose(
    costs: Sequence[Sequence[float]],
    losses: Sequence[Sequence[float]],
    budget: float,
    *,
    cells: int = CELLS,
) -> list[int]:
    """Choose one option of every item, so that losses are least and costs stay within `budget`.

    Costs are rounded up to cells, so the budget is never exceeded, and the losses are never more
    than the least that `budget * (1 - items / cells)` allows; they are the least for `budget`
    itself where costs and budget are whole numbers and no more than `cells` are left to choose
    with. The same input gives the same choice; of equal losses the cheaper option wins.

    Args:
        costs: of each item's options, not negative; items may differ in their number of options.
        losses: likewise; may be negative.
        budget: that the chosen costs may add up to.
        cells: that the budget is cut into; time and memory grow with it.

    Returns:
        The index of the chosen option, an item.

    Raises:
        InputError: numbers that are not finite, or a budget below the cheapest choice.
    """
    cost = [np.asarray(c, dtype=np.float64) for c in costs]
    loss = [np.asarray(v, dtype=np.float64) for v in losses]
    for c, v in zip(cost, loss, strict=True):
        if c.shape != v.shape or not c.size or not (np.isfinite(c) & np.isfinite(v)).all():
            raise InputError("every option wants a finite cost and a finite loss")
    floors = [float(c.min()) for c in cost]
    if sum(floors) > budget:
        raise InputError(
            "the budget is less than the cheapest choice",
            value=budget,
            remedy=f"the least reachable is {sum(floors):g}",
        )
    picked = _dynamic(cost, loss, floors, budget - sum(floors), cells)
    _spend_rest(cost, loss, picked, budget)
    return picked


def _dynamic(
    cost: list[Floats], loss: list[Floats], floors: list[float], free: float, cells: int
) -> list[int]:
    """The best choice with costs above the cheapest rounded up to cells of the `free` budget."""
    whole = all(float(value).is_integer() for c in cost for value in c)
    exact = whole and free <= cells
    # A little less than a cell: sums of rounded floats must not pass the budget by their last bit.
    width = 1.0 if exact else max(free / cells * (1 - 1e-12), 1e-300)
    count = int(free) if exact else cells
    best = np.zeros(count + 1)  # least loss so far, by cells spent at most
    chosen = np.zeros((len(cost), count + 1), dtype=np.int32)
    steps = []
    for item, (c, v) in enumerate(zip(cost, loss, strict=True)):
        step = np.ceil((c - floors[item]) / width).clip(0, 2.0**62).astype(np.int64)
        steps.append(step)
        after = np.full(count + 1, np.inf)
        for option in np.argsort(step, kind="stable"):
            need = int(step[option])
            if need > count:
                continue
            candidate = best[: count + 1 - need] + v[option]
            better = candidate < after[need:]
            after[need:][better] = candidate[better]
            chosen[item, need:][better] = option
        best = after
    left = int(np.argmin(best))
    picked = []
    for item in reversed(range(len(cost))):
        option = int(chosen[item, left])
        picked.append(option)
        left -= int(steps[item][option])
    return picked[::-1]


def _spend_rest(cost: list[Floats], loss: list[Floats], picked: list[int], budget: float) -> None:
    """Take the exchange that gains most, again and again, while one fits what is left."""
    while True:
        left = budget - sum(float(c[k]) for c, k in zip(cost, picked, strict=True))
        gain, found = 0.0, None
        for item, (c, v) in enumerate(zip(cost, loss, strict=True)):
            now = picked[item]
            fits = np.where(c - c[now] <= left, v, np.inf)
            option = int(np.argmin(fits))
            if v[now] - fits[option] > gain:
                gain, found = float(v[now] - fits[option]), (item, option)
        if found is None:
            return
        picked[found[0]] = found[1]
