"""Sides that take turns, and the spread of what they took.

Sides that are compared run in turn within one process, and their ratio is taken round by round, so
that a slow minute of the machine meets all of them alike.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

Side = Callable[[], Mapping[str, float]]
Rounds = dict[str, dict[str, list[float]]]  # side -> quantity -> one value a round


@dataclass(frozen=True)
class Spread:
    """Median and spread of some values; `iqr` is the distance between the quartiles."""

    median: float
    minimum: float
    maximum: float
    lower_quartile: float
    upper_quartile: float
    iqr: float
    count: int

    def to_json(self) -> dict[str, float]:
        """A JSON-able dict."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """The spread of `values`, of which there must be one at least."""
    if not values:
        raise ValueError("spread of no values")
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    middle = statistics.median(values)
    return Spread(middle, min(values), max(values), low, high, high - low, len(values))


def ratio(rounds: Rounds, side: str, base: str, quantity: str = "seconds") -> dict[str, float]:
    """Spread of `side` over `base`, round by round."""
    pairs = zip(rounds[side][quantity], rounds[base][quantity], strict=True)
    return spread([a / b for a, b in pairs]).to_json()


def summary(rounds: Rounds) -> dict[str, dict[str, dict[str, float]]]:
    """Spread of every quantity of every side."""
    return {
        side: {name: spread(values).to_json() for name, values in quantities.items()}
        for side, quantities in rounds.items()
    }


def fastest(rounds: Rounds, sides: Sequence[str], quantity: str = "seconds") -> str:
    """The side of `sides` with the smallest median."""
    return min(sides, key=lambda side: statistics.median(rounds[side][quantity]))


def clock() -> float:
    """Seconds: of the processor, where one thread is all, whatever else runs on it meanwhile."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(function: Callable[[], object]) -> Side:
    """A side that measures the seconds of one call."""

    def side() -> dict[str, float]:
        start = time.perf_counter()
        function()
        return {"seconds": time.perf_counter() - start}

    return side


@dataclass(frozen=True)
class Limit:
    """Seconds after which no further round begins, once there are `least` of them."""

    seconds: float = math.inf
    least: int = 1


NO_LIMIT = Limit()


def alternate(
    sides: Mapping[str, Side],
    repeats: int,
    *,
    warmup: int = 1,
    limit: Limit = NO_LIMIT,
    tick: Callable[[], object] = lambda: None,
) -> Rounds:
    """Run the sides in turn, `repeats` rounds after `warmup` unrecorded ones.

    Every other round runs backwards, so that no side always follows the same one.

    Args:
        sides: what to measure, by name; each call returns its quantities.
        repeats: recorded rounds, at most.
        warmup: rounds before them.
        limit: when to stop earlier.
        tick: called after each call of a side.
    """
    rounds: Rounds = {name: {} for name in sides}
    start = time.perf_counter()
    for index in range(-warmup, repeats):
        if index >= limit.least and time.perf_counter() - start > limit.seconds:
            break
        order = list(sides) if index % 2 == 0 else list(sides)[::-1]
        for name in order:
            gc.collect()
            result = sides[name]()
            tick()
            if index >= 0:
                for quantity, value in result.items():
                    rounds[name].setdefault(quantity, []).append(value)
    return rounds
