"""The bound: every product of two nonzeros, and nothing else, on multipliers that never idle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from swatfx.accelerators.base import Accelerator, Count
from swatfx.accelerators.geometry import Mask, Problem, ceil_div, count_multiplications
from swatfx.accelerators.inputs import integer


@dataclass(frozen=True)
class Ideal(Accelerator):
    """ceil(products of nonzero pairs that reach the output / multipliers), in every pass.

    `own_dense_cycles` leaves out products with the padding's zeros, `full_slot_cycles` does not.
    """

    compresses: ClassVar[tuple[str, ...]] = ("weights", "activations")

    multipliers: int = 1024

    def __post_init__(self) -> None:
        integer(self.multipliers, "multipliers")

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """Count the products."""
        return self._count(count_multiplications(problem, weights, activations))

    def run_dense(self, problem: Problem) -> int:
        """Count the products of the geometry."""
        return self._count(count_multiplications(problem, None, None)).cycles

    def run_weight_gradient(self, problem: Problem, activations: Mask) -> Count:
        """Count the products with the dense output gradient."""
        return self._count(count_multiplications(problem, None, activations))

    def _count(self, products: int) -> Count:
        return Count(ceil_div(products, self.multipliers))
