"""Ampere's sparse tensor cores (NVIDIA A100 whitepaper, 2020): two of every four weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swatfx.accelerators.base import Accelerator, Count
from swatfx.accelerators.geometry import (
    LANES,
    ROWS,
    TILES,
    Mask,
    Problem,
    ceil_div,
    fold_weights,
    tile_cycles,
)


@dataclass(frozen=True)
class Ampere(Accelerator):
    """The dense tile, twice as fast along C where all groups of four weights are 2:4.

    Groups are channels 4i to 4i + 3 of one filter and tap, the last one filled up with zeros, in
    the layout that the dense tile runs (folded space-to-depth, where it folds).
    """

    compresses: ClassVar[tuple[str, ...]] = ("weights",)

    @property
    def multipliers(self) -> int:
        """As many as the dense tile has."""
        return LANES * ROWS * TILES

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """Half the channel blocks if the pattern holds everywhere, else the dense tile."""
        if not fits_two_of_four(fold_weights(problem, weights)):
            return Count(tile_cycles(problem), note="dense: the weights are not 2:4 everywhere")
        p = problem.folded()
        passes = ceil_div(p.K, ROWS * TILES) * ceil_div(p.C, 2 * LANES) * p.R * p.S
        return Count(problem.windows * passes)


def fits_two_of_four(weights: Mask) -> bool:
    """Whether every four weights along C of [K, C, R, S] have at most two nonzeros."""
    filters, channels = weights.shape[:2]
    whole = channels // 4 * 4
    fours = weights[:, :whole].reshape(filters, -1, 4, *weights.shape[2:])
    if whole and int(fours.sum(axis=2, dtype=np.uint8).max()) > 2:
        return False
    rest = weights[:, whole:]
    return rest.shape[1] == 0 or int(rest.sum(axis=1, dtype=np.uint8).max()) <= 2
