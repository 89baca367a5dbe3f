"""Bit-Tactical's front end, TCL (Delmas Lascorz et al., ASPLOS 2019): sparse weights, scheduled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swatfx.accelerators.base import Accelerator, Count
from swatfx.accelerators.compiled import compiled
from swatfx.accelerators.geometry import (
    LANES,
    ROWS,
    TILES,
    Ints,
    Mask,
    Problem,
    ceil_div,
    fold_weights,
)
from swatfx.accelerators.inputs import integer
from swatfx.accelerators.schedule import Rows, candidates, schedule_tile


@compiled
def fill_tile(weights: Mask, first: int, R: int, S: int, rows: Rows) -> int:
    """Lay out filters first.. of [K, C, R * S] as rows in time; most nonzeros of any filter."""
    K, C, _ = weights.shape
    blocks = (C + 15) // 16
    rows[:] = 0
    most = 0
    for f in range(min(16, K - first)):
        nonzeros = 0
        for c in range(C):
            block = c >> 4
            bit = 1 << (c & 15)
            for r in range(R):
                for s in range(S):
                    if weights[first + f, c, r * S + s]:
                        rows[(s * R + r) * blocks + block, f] |= bit
                        nonzeros += 1
        most = max(most, nonzeros)
    return most


@dataclass(frozen=True)
class BitTactical(Accelerator):
    """TCL<lookahead, lookaside> in the dense tile's geometry; one row a cycle (bit-parallel).

    Each filter is a sequence of rows of 16 channels, ordered S, R, channel block; a software
    scheduler moves later weights into empty slots. Sixteen tiles run in lock-step. Cycles are
    ceil(OX * OY / columns) times the issued rows; the gain is at most 1 + lookahead.

    `limits`: "lock-step", rows that tiles wait for the slowest of their sixteen; "lookahead", rows
    beyond what the fullest filter of the slowest tile would need if its weights could go anywhere.
    """

    compresses: ClassVar[tuple[str, ...]] = ("weights",)

    lookahead: int = 2
    lookaside: int = 5
    shape: str = "T"
    columns: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", str(self.shape).upper())
        candidates(self.lookahead, self.lookaside, self.shape)
        integer(self.columns, "columns")

    @property
    def multipliers(self) -> int:
        """As many as the dense tile has."""
        return LANES * ROWS * TILES * self.columns

    @property
    def tile_columns(self) -> int:
        """The dense tile compared with has as many columns."""
        return self.columns

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """Schedule the weights; activations do not matter."""
        tiles = self._tiles(problem, weights)
        issued = fewest = waiting = 0
        for first in range(0, len(tiles), TILES):
            group = tiles[first : first + TILES]
            slowest = int(group[:, 0].max())
            issued += slowest
            fewest += int(group[:, 1].max())
            waiting += slowest - ceil_div(int(group[:, 0].sum()), len(group))
        windows = ceil_div(problem.windows, self.columns)
        limits = {"lock-step": windows * waiting, "lookahead": windows * max(0, issued - fewest)}
        return Count(windows * issued, limits)

    def run_dense(self, problem: Problem) -> int:
        """All filters are alike: one of them tells."""
        one = Problem(**{**problem.__dict__, "K": 1})
        groups = ceil_div(ceil_div(problem.K, ROWS), TILES)
        issued = int(self._tiles(one, one.dense_weights())[0, 0])
        return ceil_div(problem.windows, self.columns) * groups * issued

    def _tiles(self, problem: Problem, weights: Mask) -> Ints:
        """Issued rows, and the fewest that 16 lanes could do, of every 16 filters: [tiles, 2]."""
        p = problem.folded()
        folded = fold_weights(problem, weights).reshape(p.K, p.C, -1)
        offsets = candidates(self.lookahead, self.lookaside, self.shape)
        rows = np.zeros((ceil_div(p.C, LANES) * p.R * p.S, ROWS), dtype=np.int32)
        tiles = np.zeros((ceil_div(p.K, ROWS), 2), dtype=np.int64)
        for tile in range(len(tiles)):
            fullest = fill_tile(folded, tile * ROWS, p.R, p.S, rows)
            tiles[tile] = schedule_tile(rows, offsets, self.lookahead), ceil_div(fullest, LANES)
        return tiles
