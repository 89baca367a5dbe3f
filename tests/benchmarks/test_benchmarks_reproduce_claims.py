"""benchmarks.reproduce: by which rules a claim shows, on numbers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.reproduce import claims, figures, recorded_claims, writing
from benchmarks.reproduce.experiments import EXPERIMENTS
from benchmarks.reproduce.jobs import Arm
from benchmarks.reproduce.outcomes import Outcome, representative
from benchmarks.reproduce.recording import Recorded
from benchmarks.reproduce.running import Run
from swatfx.policy import swat_u
from tests.nets.reproducing import CASES, DIGITS, TINY, job, outcome

# Rules.


def test_a_difference_is_held_against_two_standard_errors() -> None:
    # Variances 2 and 2, one degree of freedom each: pooled 2; errors 2/2 + 2/2 = 2.
    difference, noise = claims.contrast([[1.0, 3.0]], [[5.0, 7.0]])
    assert difference == -4.0 and noise == pytest.approx(2 * math.sqrt(2))
    # Two arms a side: each mean of two means has a quarter of the summed errors.
    difference, noise = claims.contrast([[1.0, 3.0], [2.0, 4.0]], [[5.0, 7.0], [6.0, 8.0]])
    assert difference == -4.0 and noise == pytest.approx(2 * math.sqrt(2 * 4 / (4 * 2)))
    assert claims.contrast([[1.0]], [[0.0]]) == (1.0, None)
    # The deviation of others: variance 8 with one degree of freedom, errors 8/2 + 8/2.
    difference, noise = claims.contrast([[1.0, 3.0]], [[5.0, 7.0]], pool=[[0.0, 4.0]])
    assert difference == -4.0 and noise == pytest.approx(2 * math.sqrt(8))
    with pytest.raises(ValueError, match="both sides"):
        claims.contrast([[1.0]], [])
    with pytest.raises(ValueError, match="both sides"):
        claims.contrast([[1.0], []], [[1.0]])


@pytest.mark.parametrize(
    ("plus", "minus", "better", "at_least", "no_harm"),
    [
        ([0.80, 0.81], [0.70, 0.71], "shows", "shows", "shows"),
        ([0.70, 0.71], [0.80, 0.81], "does not show", "does not show", "does not show"),
        ([0.80, 0.801], [0.805, 0.806], "does not show", "does not show", "shows"),
        ([0.80, 0.81], [0.805, 0.815], claims.UNDECIDED, "shows", "shows"),
        ([0.70, 0.80], [0.72, 0.82], claims.UNDECIDED, "shows", claims.UNDECIDED),
        ([0.70, 0.80], [0.85, 0.95], "does not show", "does not show", "does not show"),
        ([0.9], [0.1], claims.ONE_SEED, claims.ONE_SEED, claims.ONE_SEED),
    ],
)
def test_rules_by_hand(
    plus: list[float], minus: list[float], better: str, at_least: str, no_harm: str
) -> None:
    sides = [plus], [minus]
    assert claims.better("", *sides).verdict == better
    assert claims.at_least("", *sides).verdict == at_least
    assert claims.no_harm("", *sides).verdict == no_harm
    finding = claims.no_harm("x", *sides).to_json()
    assert finding["what"] == "x" and finding["rule"] in claims.RULES
    assert finding["difference"] == pytest.approx(sum(plus) / len(plus) - sum(minus) / len(minus))


def test_a_bound_holds_for_every_seed_or_the_seeds_disagree() -> None:
    assert claims.every_seed("a", [0.1, 0.2], 0.2).verdict == claims.SHOWS
    assert claims.every_seed("a", [0.3, 0.2], 0.1).verdict == claims.SHOWS_NOT
    found = claims.every_seed("a", [0.1, 0.3], 0.2)
    assert found.verdict == claims.DISAGREE and found.difference == 0.3
    with pytest.raises(ValueError, match="no seed"):
        claims.every_seed("a", [], 1.0)


def test_a_claim_shows_if_all_its_findings_do() -> None:
    def verdict(*words: str) -> str:
        return claims.combine([claims.Finding("", "better", word) for word in words])

    assert verdict(claims.SHOWS, claims.SHOWS) == claims.SHOWS
    assert verdict(claims.SHOWS, claims.UNDECIDED) == claims.UNDECIDED
    assert verdict(claims.UNDECIDED, claims.SHOWS_NOT) == claims.SHOWS_NOT
    assert verdict(claims.UNDECIDED, claims.SHOWS_NOT, claims.SHOWS) == claims.PARTLY
    assert verdict(claims.SHOWS, claims.PARTLY) == claims.PARTLY


# Figures, judged on accuracies made by hand.


@pytest.mark.parametrize("name", CASES)
def test_figures_are_judged_by_their_numbers(name: str) -> None:
    experiment = EXPERIMENTS[name]
    good, bad = CASES[name]
    assert claims.combine(experiment.judge(outcome(name, good))) == claims.SHOWS
    one_claim = name in ("figure7", "figure8")
    verdict = claims.SHOWS_NOT if one_claim else claims.PARTLY
    assert claims.combine(experiment.judge(outcome(name, bad))) == verdict
    drowned = experiment.judge(outcome(name, good, noise=2.0))
    assert any(finding.verdict == claims.UNDECIDED for finding in drowned)


def test_figure8_judges_what_was_frozen_in_the_first_quarter() -> None:
    found = outcome("figure8", CASES["figure8"][0])
    (finding,) = figures.judge_figure8(found)
    assert [arm.x for arm in found.arms("frozen after epoch x")] == [0, 1, 3, 6]
    assert finding.difference == pytest.approx(0.7 - (0.5 + 0.6 + 0.7) / 3)


def test_figure5_says_how_much_of_training_a_period_is() -> None:
    findings = figures.judge_figure5(outcome("figure5", CASES["figure5"][1]))
    assert [f.verdict for f in findings] == ["shows", "shows", "does not show"]
    assert "period of 100 steps, 10.7% of training (the paper's 1000 are 1.7%" in findings[1].what


def recorded(thresholds: list[float], density: list[float]) -> tuple[Recorded, ...]:
    return tuple(
        Recorded(step, {"a": t}, {"a": d}, {"a": 2 * d})
        for step, (t, d) in enumerate(zip(thresholds, density, strict=True))
    )


def test_thresholds_settle_where_their_last_quarters_hardly_move() -> None:
    def judged(*series: list[float]) -> list[str]:
        arm = Arm("SWAT-U", 0.9, swat_u(0.9))
        runs = [Run(job(), (0.5,), recorded=recorded(ts, ts)) for ts in series]
        return [f.verdict for f in recorded_claims.judge_thresholds(Outcome(DIGITS, {arm: runs}))]

    settled = [1.0, 2.0, 3.0, 4.0, 5.0, 5.2, 5.0, 5.1]
    assert judged(settled, settled) == ["shows", "shows"]
    assert judged(settled, [*settled[:6], 5.0, 6.0]) == ["shows", claims.DISAGREE]
    assert judged([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]) == ["does not show", "shows"]
    run = Run(job(), (0.5,), recorded=recorded(settled, settled))
    assert recorded_claims.movement(run, 0) == pytest.approx(1.0 / 1.5)
    assert recorded_claims.quarters(run, "threshold") == {"a": [1.5, 3.5, 5.1, 5.05]}


def test_sparsity_concentrates_where_it_stays_near_its_target() -> None:
    arm = Arm("SWAT-U", 0.9, swat_u(0.9))
    density = [0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.11, 0.1]
    run = Run(job(), (0.5,), recorded=recorded([1.0] * 8, density))
    near, calm, far, calm_too = recorded_claims.judge_sparsity(Outcome(DIGITS, {arm: [run]}))
    assert near.verdict == "shows" and near.difference == pytest.approx(0.005)
    assert calm.verdict == "shows" and calm.difference == pytest.approx(0.1)
    assert far.verdict == "does not show" and far.difference == pytest.approx(0.11)
    assert calm_too.difference == pytest.approx(0.1)
    assert recorded_claims.quarters(run, "activation sparsity")["a"][0] == pytest.approx(0.7)


def test_representative_layers_are_spread() -> None:
    assert representative(list("abcdefghij")) == ["a", "d", "g", "j"]
    assert representative(["a", "b"]) == ["a", "b"]


def test_numbers_of_a_page() -> None:
    """Accuracies, their distance to dense, and the verdict are in the Markdown."""
    found = outcome("figure7", CASES["figure7"][0])
    result = writing.result_of(EXPERIMENTS["figure7"], TINY, "a command", [], [found])
    assert result["verdict"] == "shows"
    assert writing.sentence(result) == "figure7: masking inactive updates hurts: shows"
    text = writing.to_markdown(result, (), None)
    assert "| 80.05%     | 0.07% | +0.00" in text and "-10.00" in text
    assert "+15.00 points" in text and '- Rule "better"' in text and '"no harm"' not in text


def test_runs_that_diverged_are_told() -> None:
    found = outcome("figure7", CASES["figure7"][0])
    arm, runs = list(found.runs.items())[0]
    found.runs[arm] = [replace(run, diverged=True) for run in runs]
    result = writing.result_of(EXPERIMENTS["figure7"], TINY, "a command", [], [found])
    assert writing.sentence(result).endswith("2 runs diverged and count as guessing")
    assert result["outcomes"][0]["points"][0]["diverged"] == 2
