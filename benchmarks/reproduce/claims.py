"""Rules that say whether a claim of the paper shows in accuracies of a few seeds.

Accuracies are fractions of 1. Each side of a comparison is a list of *arms*, each arm a list with
one accuracy a seed; a side's value is the mean of its arms' means. The noise of a difference is
`STANDARD_ERRORS` standard errors of it, from the standard deviation over seeds, pooled over all
arms that are compared, or over more where a rule is given a `pool`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHOWS = "shows"
SHOWS_NOT = "does not show"
PARTLY = "shows in part"
UNDECIDED = "not decided (difference within seed noise)"
DISAGREE = "not decided (seeds disagree)"
ONE_SEED = "not decided (one seed has no noise to compare with)"

STANDARD_ERRORS = 2.0
TOLERANCE = 0.02  # loss of accuracy that "no harm" allows: two points

RULES = {
    "better": "A is better than B if mean(A) - mean(B) exceeds the noise, worse if it falls below"
    " minus the noise. Noise: two standard errors of the difference, from the standard deviation"
    " over seeds pooled over the arms compared (figure 1: over all its arms).",
    "at least": "A is at least as good as B unless mean(B) - mean(A) exceeds the noise.",
    "no harm": "A does no harm if its mean loss against B plus the noise stays within two points of"
    " accuracy; it harms if the loss exceeds two points and the noise.",
    "every seed": "The bound holds for every seed, or for none.",
}

Arms = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        what: the statement that was tried.
        rule: name of a rule in `RULES`.
        verdict: one of this module's verdicts.
        difference: what was compared, in the unit of the quantity; None where there is no one
            number.
        noise: that it was compared with; None where the rule knows none.
    """

    what: str
    rule: str
    verdict: str
    difference: float | None = None
    noise: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


def contrast(plus: Arms, minus: Arms, pool: Arms = ()) -> tuple[float, float | None]:
    """(difference, noise) of two sides; the noise is None where no arm has two seeds.

    The deviation is that over `pool`, by default the arms of both sides.
    """
    if not plus or not minus or not all([*plus, *minus]):
        raise ValueError("a comparison wants arms with runs on both sides")
    arms = pool or [*plus, *minus]
    difference = _side(plus) - _side(minus)
    freedom = sum(len(arm) - 1 for arm in arms)
    if freedom == 0:
        return difference, None
    pooled = sum(statistics.variance(arm) * (len(arm) - 1) for arm in arms if len(arm) > 1)
    weights = [1 / (len(side) ** 2 * len(arm)) for side in (plus, minus) for arm in side]
    return difference, STANDARD_ERRORS * math.sqrt(pooled / freedom * sum(weights))


def _side(arms: Arms) -> float:
    return statistics.fmean(statistics.fmean(arm) for arm in arms)


def better(what: str, plus: Arms, minus: Arms, pool: Arms = ()) -> Finding:
    """Whether `plus` is better than `minus`."""
    difference, noise = contrast(plus, minus, pool)
    if noise is None:
        verdict = ONE_SEED
    elif abs(difference) <= noise:
        verdict = UNDECIDED
    else:
        verdict = SHOWS if difference > 0 else SHOWS_NOT
    return Finding(what, "better", verdict, difference, noise)


def at_least(what: str, plus: Arms, minus: Arms) -> Finding:
    """Whether `plus` is better than `minus`, or as good as far as the noise lets one see."""
    difference, noise = contrast(plus, minus)
    if noise is None:
        return Finding(what, "at least", ONE_SEED, difference)
    verdict = SHOWS if difference >= -noise else SHOWS_NOT
    return Finding(what, "at least", verdict, difference, noise)


def no_harm(what: str, plus: Arms, minus: Arms, tolerance: float = TOLERANCE) -> Finding:
    """Whether `plus` loses no more than `tolerance` against `minus`."""
    difference, noise = contrast(plus, minus)
    if noise is None:
        verdict = ONE_SEED
    elif -difference + noise <= tolerance:
        verdict = SHOWS
    elif -difference > max(tolerance, noise):
        verdict = SHOWS_NOT
    else:
        verdict = UNDECIDED
    return Finding(what, "no harm", verdict, difference, noise)


def every_seed(what: str, values: Sequence[float], bound: float) -> Finding:
    """Whether the value of every seed is at most `bound`; the worst is reported."""
    if not values:
        raise ValueError("no seed has a value")
    inside = [value <= bound for value in values]
    verdict = SHOWS if all(inside) else DISAGREE if any(inside) else SHOWS_NOT
    return Finding(f"{what} (at most {bound:g})", "every seed", verdict, max(values))


def combine(findings: Sequence[Finding]) -> str:
    """A claim shows if all its findings do, and in part if some do and others do not."""
    verdicts = [finding.verdict for finding in findings]
    if SHOWS in verdicts and SHOWS_NOT in verdicts:
        return PARTLY
    for verdict in (PARTLY, SHOWS_NOT, ONE_SEED, DISAGREE, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return SHOWS
