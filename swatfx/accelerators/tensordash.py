"""TensorDash (Mahmoud et al., MICRO 2020): Bit-Tactical's scheduler at run time, for training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import numpy as np

from swatfx.accelerators.base import Accelerator, Count
from swatfx.accelerators.bit_tactical import BitTactical
from swatfx.accelerators.compiled import compiled
from swatfx.accelerators.geometry import LANES, ROWS, TILES, Mask, Problem, ceil_div
from swatfx.accelerators.schedule import Rows, candidates, schedule_tile


@compiled
def fill_tile(
    activations: Mask,
    OX: int,
    OY: int,
    stride: int,
    first_x: int,
    first_y: int,
    rows: Rows,
) -> int:
    """Lay out 16 channels of one tap as rows in time; most nonzeros of any channel.

    Args:
        activations: of up to 16 channels, [C, H, W].
        OX: rows of the output.
        OY: its columns.
        stride: of the layer.
        first_x: row of the input that the tap meets at the first output, padding below 0.
        first_y: its column.
        rows: out, [ceil(OX * OY / 16), 16].
    """
    C, H, W = activations.shape
    rows[:] = 0
    most = 0
    for f in range(C):
        nonzeros = 0
        for ox in range(OX):
            x = first_x + ox * stride
            if x < 0 or x >= H:
                continue
            for oy in range(OY):
                y = first_y + oy * stride
                if y >= 0 and y < W and activations[f, x, y]:
                    pixel = ox * OY + oy
                    rows[pixel >> 4, f] |= 1 << (pixel & 15)
                    nonzeros += 1
        most = max(most, nonzeros)
    return most


@dataclass(frozen=True)
class TensorDash(Accelerator):
    """T<2,5> over one sparse operand: weights in forward and input gradient, activations in dW.

    Forward and input gradient are the dense tile's dataflow with the weights, which SWAT makes
    sparse in both, as the scheduled operand: Bit-Tactical's count. Weight gradient: for each tap
    and each 16 channels (rows of a tile), the activation that meets output pixel i is at time
    i div 16, lane i mod 16; 16 tiles take 16 filters.
    """

    compresses: ClassVar[tuple[str, ...]] = ("weights", "activations")

    @property
    def multipliers(self) -> int:
        """As many as the dense tile has."""
        return LANES * ROWS * TILES

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """As Bit-Tactical."""
        return BitTactical().run(problem, weights, activations)

    def run_dense(self, problem: Problem) -> int:
        """As Bit-Tactical."""
        return BitTactical().run_dense(problem)

    def run_weight_gradient(self, problem: Problem, activations: Mask) -> Count:
        """ceil(K / 16) times the issued rows."""
        p = problem
        offsets = candidates(2, 5, "T")
        rows = np.zeros((ceil_div(p.windows, LANES), ROWS), dtype=np.int32)
        issued = fewest = 0
        for r, s, first in product(range(p.R), range(p.S), range(0, p.C, ROWS)):
            start = r * p.dilation - p.padding[0], s * p.dilation - p.padding[2]
            some = activations[first : first + ROWS]
            fewest += ceil_div(fill_tile(some, p.OX, p.OY, p.stride, *start, rows), LANES)
            issued += schedule_tile(rows, offsets, 2)
        passes = ceil_div(p.K, TILES)
        limits = {"lookahead": max(0, issued - fewest) * passes}
        return Count(issued * passes, limits)

    def run_weight_gradient_dense(self, problem: Problem) -> int:
        """All channels are alike; zeros of the padding are zeros here too."""
        one = replace(problem, C=1)
        count = self.run_weight_gradient(one, one.dense_activations())
        return count.cycles * ceil_div(problem.C, ROWS)
