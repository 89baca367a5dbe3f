"""Cambricon-X (Zhang et al., MICRO 2016): every element indexes its own nonzero weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swatfx.accelerators.base import CANNOT_SKIP, Accelerator, Count
from swatfx.accelerators.compiled import compiled
from swatfx.accelerators.geometry import Ints, Mask, Problem, ceil_div

ELEMENTS = 16
MULTIPLIERS = 16  # an element
BLOCK = 256  # inputs that one indexing step looks at


@compiled
def steps_per_filter(weights: Mask, R: int, S: int) -> Ints:
    """Sum over blocks of 256 inputs of ceil(nonzero weights / 16): [K, C, R * S] -> [K]."""
    K, C, taps = weights.shape
    steps = np.zeros(K, dtype=np.int64)
    blocks = np.zeros((C * taps + 255) // 256, dtype=np.int64)
    for k in range(K):
        blocks[:] = 0
        for c in range(C):
            for r in range(R):
                for s in range(S):
                    blocks[((s * R + r) * C + c) // 256] += weights[k, c, r * S + s]
        for block in range(blocks.size):
            steps[k] += (blocks[block] + 15) // 16
    return steps


@dataclass(frozen=True)
class CambriconX(Accelerator):
    """16 elements of 16 multipliers; sixteen filters at once wait for the fullest one.

    The inputs of a window are numbered with the channel innermost, then R, then S (the order of
    Bit-Tactical's rows), and every 256 of them in succession are one block. Activations are not
    skipped. The weight gradient is a product over the output's pixels, in such blocks as well.
    """

    compresses: ClassVar[tuple[str, ...]] = ("weights",)

    @property
    def multipliers(self) -> int:
        """Of all elements."""
        return ELEMENTS * MULTIPLIERS

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """Windows times the slowest of every 16 filters."""
        p = problem
        steps = steps_per_filter(weights.reshape(p.K, p.C, p.R * p.S), p.R, p.S)
        slowest = waiting = 0
        for first in range(0, p.K, ELEMENTS):
            group = steps[first : first + ELEMENTS]
            slowest += int(group.max())
            waiting += int(group.max()) - ceil_div(int(group.sum()), ELEMENTS)
        return Count(p.windows * slowest, {"load imbalance": p.windows * waiting})

    def run_dense(self, problem: Problem) -> int:
        """All filters are alike."""
        return problem.windows * ceil_div(problem.K, ELEMENTS) * _dense_steps(problem.taps)

    def run_weight_gradient(self, problem: Problem, activations: Mask) -> Count:
        """Each of R * S * C outputs of 16 filters is a dense sum over the pixels."""
        steps = _dense_steps(problem.windows)
        return Count(problem.taps * ceil_div(problem.K, ELEMENTS) * steps, note=CANNOT_SKIP)


def _dense_steps(inputs: int) -> int:
    whole, rest = divmod(inputs, BLOCK)
    return whole * (BLOCK // MULTIPLIERS) + ceil_div(rest, MULTIPLIERS)
