"""The dense tile: DaDianNao (Chen et al., MICRO 2014), the baseline of all others."""

from __future__ import annotations

from dataclasses import dataclass

from swatfx.accelerators.base import CANNOT_SKIP, Accelerator, Count
from swatfx.accelerators.geometry import LANES, ROWS, TILES, Mask, Problem, ceil_div, tile_cycles
from swatfx.accelerators.inputs import integer


@dataclass(frozen=True)
class DenseTile(Accelerator):
    """16 lanes (channels), 16 rows (filters) a tile, 16 tiles, `columns` windows at once.

    Cycles are ceil(OX * OY / columns) * ceil(K / 256) * ceil(C / 16) * R * S, whatever the masks.
    A strided convolution over 3 channels is folded space-to-depth first. Dilation changes
    addresses only.
    """

    columns: int = 1

    def __post_init__(self) -> None:
        integer(self.columns, "columns")

    @property
    def multipliers(self) -> int:
        """One for each lane, row, tile and column."""
        return LANES * ROWS * TILES * self.columns

    @property
    def tile_columns(self) -> int:
        """It is compared with itself."""
        return self.columns

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """The same for all masks."""
        return self._count(problem)

    def run_dense(self, problem: Problem) -> int:
        """The same."""
        return self._count(problem).cycles

    def _count(self, problem: Problem) -> Count:
        cycles = tile_cycles(problem, self.columns)
        full = ceil_div(problem.dense_multiplications, self.multipliers)
        return Count(cycles, {"padding to whole tiles": max(0, cycles - full)}, CANNOT_SKIP)
