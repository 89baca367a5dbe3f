"""What is trained for each figure, and by which rule its claim is judged.

A grid is (network, scale) -> arms, a judge outcome on one network -> findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.reproduce import claims
from benchmarks.reproduce.claims import Finding
from benchmarks.reproduce.jobs import Arm, Network, Scale
from benchmarks.reproduce.outcomes import DENSE, Outcome
from benchmarks.reproduce.table_rows import Row
from swatfx.policy import (
    Policy,
    as_policy,
    dense,
    forward_activations,
    forward_weights,
    meprop,
    saw,
    swat_active_update,
    swat_frozen,
    swat_u,
)

_PAPER_SHARE = 1000 / (150 * 391)  # epochs of appendix table 5, steps an epoch of section 3.3.3


def _baseline() -> Arm:
    return Arm(DENSE, None, dense())


def _sweep(curve: str, build: Callable[[float], Policy], sparsities: Iterable[float]) -> list[Arm]:
    return [Arm(curve, sparsity, build(sparsity)) for sparsity in sparsities]


# Figure 1: forward sensitivity.
def figure1(network: Network, scale: Scale) -> list[Arm]:
    """Top-K in the forward pass: of weights, or of activations."""
    at = (0.5, 0.6, 0.7, 0.8, 0.9) if scale.whole_grid else (0.5, 0.7, 0.9)
    return [
        _baseline(),
        *_sweep("weights", forward_weights, at),
        *_sweep("activations", forward_activations, at),
    ]


def judge_figure1(outcome: Outcome) -> list[Finding]:
    """Weights tolerate it better, at each sparsity.

    Not the mean over sparsities: at the highest ones the forward and backward passes of sparse
    weights differ so much that gradients grow from layer to layer, and runs may diverge.
    """
    weights, activations = outcome.samples("weights"), outcome.samples("activations")
    return [
        claims.better(
            f"at {arm.x:.0%}, sparse weights in forward cost less accuracy than sparse activations",
            [ours],
            [theirs],
            pool=[*weights, *activations],
        )
        for arm, ours, theirs in zip(outcome.arms("weights"), weights, activations, strict=True)
    ]


# Figure 2: backward sensitivity, and appendix A.7.
BOTH, GRADIENT = "weights and activations (SAW)", "output gradients (meProp)"


def figure2(network: Network, scale: Scale) -> list[Arm]:
    """Top-K in the backward pass: of weights and activations, or of output gradients."""
    at = (0.5, 0.6, 0.7, 0.8, 0.9) if scale.whole_grid else (0.5, 0.8, 0.9)
    return [_baseline(), *_sweep(BOTH, saw, at), *_sweep(GRADIENT, meprop, at)]


def judge_figure2(outcome: Outcome) -> list[Finding]:
    """Weights and activations tolerate it, gradients do not."""
    both = outcome.samples(BOTH)
    return [
        claims.better(
            "sparse weights and activations in backward cost less accuracy than sparse output"
            " gradients, mean over sparsities",
            both,
            outcome.samples(GRADIENT),
        ),
        claims.no_harm(
            "sparse weights and activations in backward do no harm against dense training, mean"
            " over sparsities",
            both,
            outcome.samples(DENSE),
        ),
    ]


def saw_meprop(network: Network, scale: Scale) -> list[Arm]:
    """SAW at 80% beside meProp at 30% and 50%."""
    return [
        _baseline(),
        *_sweep("SAW", saw, (0.8,)),
        *_sweep("meProp", meprop, (0.3, 0.5)),
    ]


def judge_saw_meprop(outcome: Outcome) -> list[Finding]:
    """SAW tolerates more than meProp."""
    both = outcome.samples("SAW")
    return [
        claims.better(
            "SAW at 80% is better than meProp at 50%",
            both,
            outcome.samples("meProp", lambda x: x == 0.5),
        ),
        claims.no_harm("SAW at 80% does no harm against dense", both, outcome.samples(DENSE)),
    ]


# Figures 4 and 5: periods.
def figure4(network: Network, scale: Scale) -> list[Arm]:
    """SWAT-U at 90%, to be recorded."""
    return [Arm("SWAT-U", 0.9, swat_u(0.9))]


def figure5(network: Network, scale: Scale) -> list[Arm]:
    """SWAT-U at 90% with longer and longer periods."""
    at = (1, 10, 100, 500, 1000) if scale.whole_grid else (1, 10, 100, 1000)
    arms = [Arm("SWAT-U, 90%", period, swat_u(0.9, period=period)) for period in at]
    return [_baseline(), *arms]


def judge_figure5(outcome: Outcome) -> list[Finding]:
    """No period does harm."""
    first, *rest = outcome.arms("SWAT-U, 90%")
    base = [[run.accuracy for run in outcome.runs[first]]]
    findings = []
    for arm in rest:
        runs = outcome.runs[arm]
        share = arm.policy.period / max(run.steps for run in runs)
        what = (
            f"a period of {arm.policy.period} steps, {share:.1%} of training (the paper's 1000 are"
            f" {_PAPER_SHARE:.1%} of its), does no harm against 1"
        )
        findings.append(claims.no_harm(what, [[run.accuracy for run in runs]], base))
    return findings


def appendix_figure2(network: Network, scale: Scale) -> list[Arm]:
    """SWAT-U at 90% with a period of 100, to be recorded."""
    return [Arm("SWAT-U, period 100", 0.9, swat_u(0.9, period=100))]


# Figures 7 and 8: updates of inactive weights.
def figure7(network: Network, scale: Scale) -> list[Arm]:
    """Updates of all weights, or of the active ones."""
    at = (0.5, 0.6, 0.7, 0.8, 0.9) if scale.whole_grid else (0.8, 0.9)
    return [
        _baseline(),
        *_sweep("all weights updated", swat_u, at),
        *_sweep("active weights updated", swat_active_update, at),
    ]


def judge_figure7(outcome: Outcome) -> list[Finding]:
    """Masking updates hurts."""
    return [
        claims.better(
            "updating all weights is better than updating active ones, mean over sparsities",
            outcome.samples("all weights updated"),
            outcome.samples("active weights updated"),
        )
    ]


_FROZEN, _FREE = "frozen after epoch x", "never frozen"


def figure8(network: Network, scale: Scale) -> list[Arm]:
    """The active set frozen after some epochs, or never."""
    epochs = scale.epochs_of(network)
    shares = (0, 1 / 15, 1 / 5, 1 / 3, 2 / 3) if scale.whole_grid else (0, 1 / 12, 1 / 4, 1 / 2)
    after = dict.fromkeys(int(share * epochs + 1e-9) for share in shares)
    arms = [Arm(_FROZEN, e, swat_frozen(0.9, hold_from_epoch=e)) for e in after]
    return [_baseline(), *arms, Arm(_FREE, None, swat_u(0.9))]


def judge_figure8(outcome: Outcome) -> list[Finding]:
    """Freezing early hurts."""
    arms = outcome.arms(_FROZEN)
    epochs = outcome.runs[arms[0]][0].job.epochs
    free = outcome.samples(_FREE)
    return [
        claims.better(
            "never freezing is better than freezing within the first quarter of training",
            free,
            outcome.samples(_FROZEN, lambda x: 4 * x <= epochs),
        )
    ]


# Appendix figure 1: scopes of Top-K.
_SCOPES = ("nchw", "chw", "hw", "random")


def appendix_figure1(network: Network, scale: Scale) -> list[Arm]:
    """SAW with each scope of Top-K, and with a random choice."""
    few = {"nchw": (0.5, 0.8), "chw": (0.8,), "hw": (0.8,), "random": (0.5, 0.8)}
    return [
        Arm(scope, s, saw(s, weight_selector=scope, activation_selector=scope))
        for scope in _SCOPES
        for s in ((0.5, 0.6, 0.7, 0.8) if scale.whole_grid else few[scope])
    ]


def judge_appendix_figure1(outcome: Outcome) -> list[Finding]:
    """At the highest sparsity, the more constrained the worse, and random is the worst."""

    def compare(rule: Callable[..., Finding], word: str, wide: str, narrow: str) -> Finding:
        sides = [outcome.samples(scope, lambda x: x == 0.8) for scope in (wide, narrow)]
        return rule(f"at 80%, {wide} is {word} {narrow}", *sides)

    return [
        compare(claims.at_least, "at least as good as", "nchw", "chw"),
        compare(claims.at_least, "at least as good as", "chw", "hw"),
        compare(claims.better, "better than", "hw", "random"),
    ]


# Tables: every row's policy on one network.
def table_arms(rows: Sequence[Row]) -> Callable[[Network, Scale], list[Arm]]:
    """The grid of a table: dense, and the policies of the network's rows.

    On a network that is in no row, those of all rows.
    """

    def arms(network: Network, scale: Scale) -> list[Arm]:
        own = [row for row in rows if row.network == network] or rows
        policies = dict.fromkeys(row.policy for row in own if row.policy is not None)
        return [_baseline(), *(Arm(text, None, as_policy(text)) for text in policies)]

    return arms


def no_judge(outcome: Outcome) -> list[Finding]:
    """A table makes no claim about accuracy."""
    return []
