"""Budgets in proportion to each layer's mean momentum (paper section 3.3.2, SWAT-M)."""

from __future__ import annotations

import math
from collections.abc import Sequence

_NEARLY_DENSE = 0.99


def momentum_budgets(momenta: Sequence[float], sizes: Sequence[int], density: float) -> list[int]:
    """Number of active weights a layer.

    Args:
        momenta: mean |momentum| over each layer's active weights; not negative.
        sizes: weights a layer.
        density: target over all weights together.

    Returns:
        Budgets, at least 1 each: the share of the momentum times the total, whatever the layer's
        size. A layer whose budget passes 0.99 of its size becomes dense, and its excess is shared
        out equally over the others until none is left.
    """
    total = density * sum(sizes)
    mass = math.fsum(momenta)
    if not mass > 0 or not math.isfinite(mass):
        return [max(1, math.ceil(density * size - 1e-6)) for size in sizes]
    budgets = [float(max(1, math.ceil(m / mass * total))) for m in momenta]
    is_dense = [False] * len(sizes)
    excess = 0.0
    while True:
        for i, size in enumerate(sizes):
            if not is_dense[i] and budgets[i] > _NEARLY_DENSE * size:
                excess += budgets[i] - size
                budgets[i] = size
                is_dense[i] = True
        rest = [i for i, full in enumerate(is_dense) if not full]
        if not rest or abs(excess) < 1:
            break
        for i in rest:
            budgets[i] = max(1.0, budgets[i] + excess / len(rest))
        excess = 0.0
    return [min(size, math.floor(b)) for b, size in zip(budgets, sizes, strict=True)]
