"""What the recorded thresholds and densities say: figure 4, and figure 2 of the appendix."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.reproduce.claims import Finding, every_seed
from benchmarks.reproduce.outcomes import Outcome, representative, series
from benchmarks.reproduce.plotting import Line, Panel
from benchmarks.reproduce.recording import Recorded
from benchmarks.reproduce.running import Run

SETTLED = 0.1  # of a threshold's mean: the range it may still move in
NEAR = 0.02  # distance of a realised sparsity from its target

Values = Callable[[Recorded], dict[str, float]]


def _thresholds(step: Recorded) -> dict[str, float]:
    return step.thresholds


def _weight_sparsity(step: Recorded) -> dict[str, float]:
    return {name: 1 - density for name, density in step.weight_density.items()}


def _activation_sparsity(step: Recorded) -> dict[str, float]:
    return {name: 1 - density for name, density in step.activation_density.items()}


def quarter(values: Sequence[float], which: int) -> Sequence[float]:
    """The `which`-th quarter of a series, counted from 0; of one value at least."""
    edges = [len(values) * i // 4 for i in range(5)]
    return values[edges[which] : max(edges[which + 1], edges[which] + 1)]


def movement(run: Run, which: int) -> float:
    """Range of a threshold within a quarter of training, over its mean; median over layers."""
    ranges = []
    for _, ys in series(run.recorded, _thresholds).values():
        part = quarter(ys, which)
        mean = statistics.fmean(part)
        ranges.append((max(part) - min(part)) / mean if mean else 0.0)
    return statistics.median(ranges)


def judge_thresholds(outcome: Outcome) -> list[Finding]:
    """Thresholds settle: in the last two quarters of training they hardly move."""
    (runs,) = outcome.runs.values()
    return [
        every_seed(
            f"range of a threshold within quarter {which + 1} of training, over its mean (median"
            " of layers)",
            [movement(run, which) for run in runs],
            SETTLED,
        )
        for which in (2, 3)
    ]


def distance(run: Run, values: Values, target: float, which: int) -> float:
    """Mean distance of realised sparsity from its target within a quarter of training."""
    gaps = [
        abs(y - target)
        for _, ys in series(run.recorded, values).values()
        for y in quarter(ys, which)
    ]
    return statistics.fmean(gaps)


def fluctuation(run: Run, values: Values, which: int) -> float:
    """Standard deviation over the steps of a quarter of training, mean over layers."""
    return statistics.fmean(
        statistics.pstdev(quarter(ys, which)) for _, ys in series(run.recorded, values).values()
    )


def judge_sparsity(outcome: Outcome) -> list[Finding]:
    """Realised sparsity stays near its target, and fluctuates less at the end."""
    ((arm, runs),) = outcome.runs.items()
    target = arm.policy.sparsity
    findings = []
    for name, values in (("weight", _weight_sparsity), ("activation", _activation_sparsity)):
        findings.append(
            every_seed(
                f"mean distance of {name} sparsity from {target:g}, last quarter of training",
                [distance(run, values, target, 3) for run in runs],
                NEAR,
            )
        )
        findings.append(
            every_seed(
                f"fluctuation of {name} sparsity, last quarter of training over the first",
                [_ratio(fluctuation(run, values, 3), fluctuation(run, values, 0)) for run in runs],
                1.0,
            )
        )
    return findings


def _ratio(last: float, first: float) -> float:
    return last / first if first else float(last > 0) * 2


_KINDS: dict[str, Values] = {
    "threshold": _thresholds,
    "weight sparsity": _weight_sparsity,
    "activation sparsity": _activation_sparsity,
}


def quarters(run: Run, kind: str) -> dict[str, list[float]]:
    """Layer -> mean of what was recorded in each quarter of training.

    `kind` is "threshold", "weight sparsity" or "activation sparsity".
    """
    return {
        layer: [statistics.fmean(quarter(ys, which)) for which in range(4)]
        for layer, (_, ys) in series(run.recorded, _KINDS[kind]).items()
    }


def threshold_panel(outcome: Outcome) -> Panel:
    """Thresholds of four layers over the steps, of the first seed."""
    (runs,) = outcome.runs.values()
    found = series(runs[0].recorded, _thresholds)
    lines = tuple(
        Line(name, *found[name], colour=index, thin=True)
        for index, name in enumerate(representative(list(found)))
    )
    return Panel(str(outcome.network), "step", "weight threshold", lines)


def sparsity_panel(outcome: Outcome) -> Panel:
    """Realised sparsities over the steps, a line a layer, of the first seed; and the target."""
    ((arm, runs),) = outcome.runs.items()
    lines = []
    for index, (label, values) in enumerate(
        (("weights", _weight_sparsity), ("activations", _activation_sparsity))
    ):
        for number, (xs, ys) in enumerate(series(runs[0].recorded, values).values()):
            lines.append(Line(None if number else label, xs, ys, colour=index, thin=True))
    lines.append(Line("target", (), (arm.policy.sparsity,), colour=3))
    return Panel(str(outcome.network), "step", "realised sparsity", tuple(lines))
