"""Constants fitted to measurements: least squares of the relative error, none below zero."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swatfx.forecast.constants import Constants, Table, key
from swatfx.forecast.work import Work

_HELD_OUT = 4  # one sample of so many


@dataclass(frozen=True)
class Sample:
    """Seconds that one call took on one side."""

    work: Work
    side: str
    seconds: float

    @property
    def key(self) -> str:
        """The row of the table that it is fitted to."""
        return key(self.work.dtype, self.work.kind, self.side)


def fit(samples: Sequence[Sample]) -> tuple[Table, list[float]]:
    """(table, relative errors where they were not fitted to).

    The table is of all samples; errors are of every fourth, predicted from the others.

    Args:
        samples: at least four a row of the table, better many.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.key, []).append(sample)
    missed: list[float] = []
    for name, group in groups.items():
        for first in range(_HELD_OUT):
            held = group[first::_HELD_OUT]
            known = [sample for sample in group if sample not in held]
            if held and known:
                missed += errors(Constants({name: _solved(known)}), held)
    return {name: _solved(group) for name, group in groups.items()}, missed


def errors(constants: Constants, samples: Sequence[Sample]) -> list[float]:
    """Relative errors, without their signs."""
    return [abs(constants.seconds(s.work, s.side) / s.seconds - 1) for s in samples]


def summary(missed: Sequence[float]) -> tuple[float, float]:
    """(median, worst)."""
    return statistics.median(missed), max(missed)


def _solved(samples: Sequence[Sample]) -> tuple[float, ...]:
    rows = np.array([s.work.quantities(s.side) for s in samples], dtype=np.float64)
    rows /= np.array([[s.seconds] for s in samples])
    size = np.abs(rows).max(axis=0)
    used = size > 0
    rates = np.zeros(len(size))
    rates[used] = nonnegative(rows[:, used] / size[used], np.ones(len(rows))) / size[used]
    return tuple(float(rate) for rate in rates)


def nonnegative(
    rows: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Find x >= 0 that minimises |rows x - wanted|: Lawson and Hanson (1974, ch. 23)."""
    count = rows.shape[1]
    x = np.zeros(count)
    free = np.zeros(count, dtype=bool)
    for _ in range(3 * count):
        slope = rows.T @ (wanted - rows @ x)
        slope[free] = -np.inf
        at = int(slope.argmax())
        if slope[at] <= 1e-12:
            break
        free[at] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(rows[:, free], wanted, rcond=None)[0]
            below = free & (trial <= 0)
            if not below.any():
                break
            step = (x[below] / np.maximum(x[below] - trial[below], 1e-300)).min()
            x = x + step * (trial - x)
            x[below & (x <= 1e-15)] = 0
            gone = free & (x <= 0)
            gone |= below & (x == x[below].min())
            x[gone], free[gone] = 0, False
        x = trial
    return x
