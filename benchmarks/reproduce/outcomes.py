"""What a grid gave on one network, and the pictures and tables that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reproduce.jobs import Arm, Network
from benchmarks.reproduce.plotting import Line, Panel
from benchmarks.reproduce.recording import Recorded
from benchmarks.reproduce.running import Run

DENSE = "dense"


@dataclass(frozen=True)
class Outcome:
    """The runs of every arm, a seed each, on one network."""

    network: Network
    runs: dict[Arm, list[Run]]

    def curves(self) -> list[str]:
        """Names of the curves, in the grid's order."""
        return list(dict.fromkeys(arm.curve for arm in self.runs))

    def arms(self, curve: str) -> list[Arm]:
        """The arms of `curve`, in the grid's order."""
        found = [arm for arm in self.runs if arm.curve == curve]
        if not found:
            raise KeyError(curve)
        return found

    def samples(
        self, curve: str, where: Callable[[float], bool] | None = None
    ) -> list[list[float]]:
        """Final accuracies by seed of the arms of `curve` (whose x satisfies `where`)."""
        return [
            [run.accuracy for run in self.runs[arm]]
            for arm in self.arms(curve)
            if where is None or (arm.x is not None and where(arm.x))
        ]

    def points(self) -> list[dict[str, Any]]:
        """One JSON-able record an arm: accuracy over seeds, densities, seconds."""
        return [
            {
                "curve": arm.curve,
                "x": arm.x,
                "accuracy_mean": statistics.fmean(run.accuracy for run in runs),
                "accuracy_std": deviation([run.accuracy for run in runs]),
                "seeds": len(runs),
                "weight_density": _mean([run.weight_density for run in runs]),
                "activation_density": _mean([run.activation_density for run in runs]),
                "diverged": sum(run.diverged for run in runs),
                "seconds_mean": statistics.fmean(run.seconds for run in runs),
            }
            for arm, runs in self.runs.items()
        ]


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def accuracy_over_x(outcome: Outcome, x_label: str, *, log_x: bool = False) -> Panel:
    """Accuracy at the last epoch over the arms' x, a line a curve; error bars are deviations."""
    lines = []
    for index, curve in enumerate(outcome.curves()):
        arms = sorted(outcome.arms(curve), key=lambda arm: arm.x or 0)
        samples = [[100 * run.accuracy for run in outcome.runs[arm]] for arm in arms]
        xs = tuple(arm.x for arm in arms if arm.x is not None)
        ys = tuple(statistics.fmean(values) for values in samples)
        spread = tuple(deviation(values) or 0.0 for values in samples)
        lines.append(Line(curve, xs, ys, spread, index))
    return Panel(str(outcome.network), x_label, "test accuracy, %", tuple(lines), log_x)


def accuracy_over_epochs(outcome: Outcome) -> Panel:
    """Accuracy after every epoch, a line an arm (means over seeds)."""
    lines = []
    for index, (arm, runs) in enumerate(outcome.runs.items()):
        ys = [100 * statistics.fmean(v) for v in zip(*(r.accuracies for r in runs), strict=True)]
        xs = tuple(float(epoch) for epoch in range(1, len(ys) + 1))
        lines.append(Line(str(arm), xs, tuple(ys), None, index))
    return Panel(str(outcome.network), "epoch", "test accuracy, %", tuple(lines))


def series(
    recorded: Sequence[Recorded], values: Callable[[Recorded], dict[str, float]]
) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Layer -> (steps, values) of one run's recording."""
    layers = dict.fromkeys(name for step in recorded for name in values(step))
    return {
        name: (
            tuple(float(step.step) for step in recorded if name in values(step)),
            tuple(values(step)[name] for step in recorded if name in values(step)),
        )
        for name in layers
    }


def representative(names: Sequence[str], count: int = 4) -> list[str]:
    """`count` of the names, evenly spread from the first to the last."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]
