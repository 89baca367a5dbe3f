"""Jobs and outcomes for the tests of benchmarks.reproduce."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.reproduce import figures
from benchmarks.reproduce.experiments import EXPERIMENTS
from benchmarks.reproduce.jobs import SCALES, Arm, Job, Network
from benchmarks.reproduce.outcomes import Outcome
from benchmarks.reproduce.running import Run
from swatfx.policy import swat_u

DIGITS = Network("digits/cnn", "digits")
TINY = SCALES["tiny"]


def job(seed: int = 0, **options: Any) -> Job:
    given = {"limit": 96, "batch_size": 32, "epochs": 2} | options
    return Job(DIGITS, given.pop("policy", swat_u(0.5)), seed, **given)


def outcome(name: str, accuracies: dict[str, tuple[float, ...]], noise: float = 0.001) -> Outcome:
    """The outcome of a figure's small grid where each curve has these accuracies, arm by arm."""
    runs: dict[Arm, list[Run]] = {}
    left = {curve: list(values) for curve, values in accuracies.items()}
    for arm in EXPERIMENTS[name].arms(DIGITS, replace(TINY, epochs=12)):
        value = left[arm.curve].pop(0)
        runs[arm] = [
            Run(job(seed, policy=arm.policy, epochs=12), (value + noise * seed,), steps=936)
            for seed in (0, 1)
        ]
    assert not any(left.values())
    return Outcome(DIGITS, runs)


# Figure -> accuracies of each curve that its claim shows in, and some that it does not show in.
CASES = {
    "figure1": (
        {"dense": (0.8,), "weights": (0.8, 0.79, 0.7), "activations": (0.7, 0.6, 0.5)},
        {"dense": (0.8,), "weights": (0.8, 0.7, 0.1), "activations": (0.7, 0.78, 0.5)},
    ),
    "figure2": (
        {"dense": (0.8,), figures.BOTH: (0.8, 0.79, 0.78), figures.GRADIENT: (0.7, 0.5, 0.3)},
        {"dense": (0.8,), figures.BOTH: (0.8, 0.7, 0.5), figures.GRADIENT: (0.7, 0.4, 0.3)},
    ),
    "saw-meprop": (
        {"dense": (0.8,), "SAW": (0.79,), "meProp": (0.78, 0.5)},
        {"dense": (0.8,), "SAW": (0.79,), "meProp": (0.7, 0.8)},
    ),
    "figure5": (
        {"dense": (0.8,), "SWAT-U, 90%": (0.7, 0.7, 0.71, 0.69)},
        {"dense": (0.8,), "SWAT-U, 90%": (0.7, 0.7, 0.7, 0.5)},
    ),
    "figure7": (
        {
            "dense": (0.8,),
            "all weights updated": (0.8, 0.7),
            "active weights updated": (0.7, 0.5),
        },
        {
            "dense": (0.8,),
            "all weights updated": (0.8, 0.5),
            "active weights updated": (0.7, 0.7),
        },
    ),
    "figure8": (
        {"dense": (0.8,), "never frozen": (0.7,), "frozen after epoch x": (0.5, 0.6, 0.7, 0.75)},
        {"dense": (0.8,), "never frozen": (0.7,), "frozen after epoch x": (0.7, 0.75, 0.7, 0.2)},
    ),
    "appendix-figure1": (
        {"nchw": (0.8, 0.7), "chw": (0.6,), "hw": (0.6,), "random": (0.8, 0.1)},
        {"nchw": (0.8, 0.7), "chw": (0.6,), "hw": (0.1,), "random": (0.1, 0.6)},
    ),
}
