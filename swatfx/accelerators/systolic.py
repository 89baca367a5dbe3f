"""Systolic arrays, dense (Samajdar et al., SCALE-Sim, ISPASS 2020, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from swatfx.accelerators.base import CANNOT_SKIP, Accelerator, Count
from swatfx.accelerators.geometry import Mask, Problem, ceil_div
from swatfx.accelerators.inputs import integer
from swatfx.errors import InputError

OUTPUT, WEIGHT = "output-stationary", "weight-stationary"
_NAMES = {
    name: flow
    for flow, short in ((OUTPUT, "os"), (WEIGHT, "ws"))
    for name in (flow, short, flow.split("-")[0])
}


@dataclass(frozen=True)
class Systolic(Accelerator):
    """A rows x cols array that computes P x K outputs, each a sum of R * S * C products.

    Output-stationary: ceil(P / A) * ceil(K / B) * (R*S*C + A + B - 2) - 1 cycles;
    weight-stationary: ceil(R*S*C / A) * ceil(K / B) * (P + 2A + B - 2) - 1. Masks do not matter.
    The weight gradient is the same product with P and R * S * C exchanged.

    Args:
        rows: A.
        cols: B.
        dataflow: "output-stationary" ("os") or "weight-stationary" ("ws").
    """

    rows: int = 32
    cols: int = 32
    dataflow: str = OUTPUT

    def __post_init__(self) -> None:
        integer(self.rows, "rows")
        integer(self.cols, "cols")
        flow = _NAMES.get(str(self.dataflow).lower().replace("_", "-"))
        if flow is None:
            raise InputError(
                "unknown dataflow", value=self.dataflow, remedy=f'Give "{OUTPUT}" or "{WEIGHT}"'
            )
        object.__setattr__(self, "dataflow", flow)

    @property
    def multipliers(self) -> int:
        """One an element."""
        return self.rows * self.cols

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """The same for all masks."""
        return self._count(problem.windows, problem.taps, problem.K)

    def run_dense(self, problem: Problem) -> int:
        """The same."""
        return self._count(problem.windows, problem.taps, problem.K).cycles

    def run_weight_gradient(self, problem: Problem, activations: Mask) -> Count:
        """[R*S*C, P] times [P, K]."""
        return self._count(problem.taps, problem.windows, problem.K)

    def _count(self, outputs: int, depth: int, filters: int) -> Count:
        A, B = self.rows, self.cols
        if self.dataflow == OUTPUT:
            folds, busy, fill = ceil_div(outputs, A) * ceil_div(filters, B), depth, A + B - 2
        else:
            folds, busy, fill = ceil_div(depth, A) * ceil_div(filters, B), outputs, 2 * A + B - 2
        return Count(folds * (busy + fill) - 1, {"fill and drain": folds * fill - 1}, CANNOT_SKIP)
