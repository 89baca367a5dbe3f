"""Erdos-Renyi densities, with and without kernel sizes (paper section 3.3.2, SWAT-ERK)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from swatfx.density import DENSE, Density


def erk(shapes: Sequence[tuple[int, ...]], density: Density) -> list[Density]:
    """d_l = min(1, e * sum(shape_l) / prod(shape_l)), e such that the budget is met.

    Args:
        shapes: weight shapes (F, C, *kernel) or (out, in), in any order.
        density: target over all their weights together.
    """
    return _solve(shapes, shapes, density)


def er(shapes: Sequence[tuple[int, ...]], density: Density) -> list[Density]:
    """As `erk`, but only filters and channels count in the sum and the product."""
    return _solve(shapes, [shape[:2] for shape in shapes], density)


def _solve(
    shapes: Sequence[tuple[int, ...]], scored: Sequence[tuple[int, ...]], density: Density
) -> list[Density]:
    """Layers become dense in the order of their raw score; e is solved over the rest.

    Sorting gives the fixed point in one pass: if a layer is capped at 1, so is every layer with a
    higher score.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in scored]
    order = sorted(range(len(shapes)), key=lambda i: (-raw[i], sizes[i]))
    budget = density.value * sum(sizes)
    # Mass of each layer and all after it, summed from the smallest, so that order does not matter.
    masses = list(itertools.accumulate(raw[i] * sizes[i] for i in reversed(order)))[::-1]
    result = [DENSE] * len(shapes)
    for position, i in enumerate(order):
        scale = budget / masses[position]
        if scale * raw[i] < 1:
            for j in order[position:]:
                result[j] = Density(scale * raw[j])
            break
        budget -= sizes[i]
    return result
