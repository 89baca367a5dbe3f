"""Cnvlutin (Albericio et al., ISCA 2016): zero activations are skipped, lane by lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from swatfx.accelerators.base import Accelerator, Count
from swatfx.accelerators.compiled import compiled
from swatfx.accelerators.geometry import LANES, ROWS, TILES, Mask, Problem, ceil_div


@compiled
def _bricks(activations: Mask, top: int, left: int, rows: int, cols: int) -> npt.NDArray[np.int64]:
    """max(1, nonzeros) of every 16 channels of every padded position: [rows, cols, blocks]."""
    C, H, W = activations.shape
    blocks = (C + 15) // 16
    out = np.zeros((rows, cols, blocks), dtype=np.int64)
    for c in range(C):
        for x in range(H):
            for y in range(W):
                out[x + top, y + left, c // 16] += activations[c, x, y]
    for x in range(rows):
        for y in range(cols):
            for b in range(blocks):
                out[x, y, b] = max(1, out[x, y, b])
    return out


@compiled
def window_cycles(
    bricks: npt.NDArray[np.int64], OX: int, OY: int, R: int, S: int, stride: int, dilation: int
) -> tuple[int, int]:
    """Sum over windows of the busiest lane, and of the mean lane rounded up."""
    blocks = bricks.shape[2]
    lanes = np.zeros(16, dtype=np.int64)
    slowest = 0
    mean = 0
    for ox in range(OX):
        for oy in range(OY):
            lanes[:] = 0
            lane = 0
            for s in range(S):
                for r in range(R):
                    for b in range(blocks):
                        x = ox * stride + r * dilation
                        y = oy * stride + s * dilation
                        lanes[lane] += bricks[x, y, b]
                        lane = (lane + 1) & 15
            most = 0
            work = 0
            for i in range(16):
                most = max(most, lanes[i])
                work += lanes[i]
            slowest += most
            mean += (work + 15) // 16
    return slowest, mean


@dataclass(frozen=True)
class Cnvlutin(Accelerator):
    """The dense tile with sixteen independent lanes that pass over zero activations.

    A brick is 16 channels of one position, padding included; it costs one cycle at least. The
    bricks of a window, channel block innermost, then R, then S (the order of Bit-Tactical's rows),
    are dealt to the lanes in turn; with a multiple of 256 channels that is the paper's slice by
    channel (section 3.2), with fewer it keeps all lanes at work. A window ends with its slowest
    lane. `dense_cycles` deals channels, not bricks, to lanes: few channels gain, or lose, by that.
    """

    compresses: ClassVar[tuple[str, ...]] = ("activations",)

    @property
    def multipliers(self) -> int:
        """As many as the dense tile has."""
        return LANES * ROWS * TILES

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """Windows one by one; weights do not matter."""
        p = problem
        bricks = _bricks(activations, p.padding[0], p.padding[2], *p.padded)
        slowest, mean = window_cycles(bricks, p.OX, p.OY, p.R, p.S, p.stride, p.dilation)
        passes = ceil_div(p.K, ROWS * TILES)
        return Count(int(slowest) * passes, {"load imbalance": int(slowest - mean) * passes})

    def run_dense(self, problem: Problem) -> int:
        """Weights do not matter."""
        return self.run(
            problem, np.ones((1, 1, 1, 1), np.bool_), problem.dense_activations()
        ).cycles
