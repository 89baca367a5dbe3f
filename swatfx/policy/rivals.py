"""The methods that the paper measures SWAT against (tables 1 and 3), each a value of Policy.

All but meProp keep masks: an inactive weight is zero, receives no gradient and stays zero until it
is grown. Forward and input gradient see the active weights; activations in the weight gradient are
dense, which the paper's accounting counts as half zero (appendix A.3). Those that change their
masks want `swatfx.attach(gm, optimizer, total_steps=..., steps_per_epoch=...)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from swatfx.errors import PolicyError
from swatfx.policy.fields import Policy

_DEFAULT_DENSITY = 0.5  # "default sparsity" of activations, appendix A.3


def _masked(name: str, sparsity: float, options: Mapping[str, Any], **fields: Any) -> Policy:
    """Weights held under a mask from the first step on; activations dense."""
    common: dict[str, Any] = {
        "weight_selector": "random",
        "backward_activation": False,
        "update": "active",
        "hold_from_epoch": 0,
        "zero_inactive": "always",
        "assumed_activation_density": _DEFAULT_DENSITY,
    }
    return Policy(name, sparsity, **{**common, **fields, **options})


def meprop(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """Top-K output gradients, everything else dense (meProp; figure 2's "gradient").

    Sun et al., meProp, ICML 2017: input and weight gradient see the largest output gradients.
    """
    return Policy(
        "meprop",
        0.0,
        forward_weight=False,
        backward_weight=False,
        backward_activation=False,
        gradient_sparsity=sparsity,
        first_dense=first_dense,
        **options,
    )


def static(sparsity: float, **options: Any) -> Policy:
    """A random mask with Erdos-Renyi-kernel densities that never changes.

    The lower bound of every method that moves its mask.
    """
    return _masked("static", sparsity, options, distribution="erk")


def set_(sparsity: float, **options: Any) -> Policy:
    """SET: once an epoch, 0.3 of the active weights give way to random ones.

    Mocanu et al., Nature Communications 2018: a random mask of Erdos-Renyi-kernel densities. The
    smallest positive and the largest negative weights of each layer are dropped, and as many are
    grown at random in the same layer, from zero.
    """
    return _masked(
        "set",
        sparsity,
        options,
        distribution="erk",
        drop="signed",
        grow="random",
        drop_fraction=0.3,
    )


def rigl(sparsity: float, **options: Any) -> Policy:
    """RigL: every 100 steps, the smallest weights give way to those of the largest gradient.

    Evci et al., ICML 2020: 0.3 of the active weights at first, decayed to none along a cosine at
    three quarters of training. Densities are uniform with a dense first layer, or
    `distribution="erk"`. The dense gradient is computed at the steps that grow only; the optimizer
    sees the active weights' part of it.
    """
    return _masked(
        "rigl",
        sparsity,
        options,
        first_dense=options.get("distribution", "uniform") == "uniform",
        drop="magnitude",
        grow="gradient",
        drop_fraction=0.3,
        drop_decay="cosine",
        update_every=100,
        update_until=0.75,
    )


def snfs(sparsity: float, **options: Any) -> Policy:
    """SNFS: once an epoch, the smallest weights give way to those of the largest momentum.

    Dettmers and Zettlemoyer, 2019 (sparse momentum): half of the active weights at first, decayed
    along a cosine. What is dropped anywhere is grown where the layers' mean momentum is large, so
    densities move. Momentum, and so the gradient, is dense at every step; the optimizer has to keep
    one (SGD with momentum, Adam, AdamW).
    """
    return _masked(
        "snfs",
        sparsity,
        options,
        update="all",
        drop="magnitude",
        grow="momentum",
        grow_share="momentum",
        drop_fraction=0.5,
        drop_decay="cosine",
    )


def dsr(sparsity: float, **options: Any) -> Policy:
    """DSR: weights below one threshold for all layers are dropped, and random ones are grown.

    Mostafa and Wang, ICML 2019: the threshold doubles or halves until it drops about
    `drop_fraction` of the active weights. Layers grow in proportion to the weights that survived in
    them, so densities move.
    """
    return _masked(
        "dsr",
        sparsity,
        options,
        drop="global-magnitude",
        grow="random",
        grow_share="survivors",
        drop_fraction=0.1,
        update_every=300,
    )


def dst(penalty: float = 1e-4, **options: Any) -> Policy:
    """DST: a learned threshold a filter decides which weights are active, at every step.

    Liu et al., ICLR 2020: thresholds t start at zero and are trained by a straight-through estimate
    of the step function's derivative; `penalty` times the sum of exp(-t) drives them up, and with
    them the sparsity, for which there is no target. Weights recover by themselves.
    """
    return Policy(
        "dst",
        0.0,
        weight_selector="learned",
        backward_activation=False,
        penalty=penalty,
        assumed_activation_density=_DEFAULT_DENSITY,
        **options,
    )


def gradual_magnitude(sparsity: float, **options: Any) -> Policy:
    """Gradual magnitude pruning: from dense to the target along a cubic ramp.

    Zhu and Gupta, 2017: every 100 steps, until three quarters of training, the smallest weights of
    each layer are dropped for good.
    """
    return _masked(
        "gradual-magnitude",
        sparsity,
        options,
        weight_selector="nchw",
        first_dense=True,
        drop="magnitude",
        ramp="cubic",
        update_every=100,
        update_until=0.75,
    )


def soft_filter(sparsity: float, **options: Any) -> Policy:
    """Soft filter pruning: after every epoch, the filters of smallest L2 norm are set to zero.

    He et al., IJCAI 2018: they go on being updated and may recover, so training itself is dense;
    after the last epoch they stay zero.
    """
    return _masked(
        "soft-filter",
        sparsity,
        options,
        weight_selector="filter-l2",
        forward_weight=False,
        backward_weight=False,
        update="all",
        zero_inactive="updates",
        drop="unselected",
        grow="selected",
    )


def ssc(
    g: int | str | Mapping[int, int],
    p: int | str | Mapping[int, int],
    q: int | str | Mapping[int, int] | None = None,
    **options: Any,
) -> Policy:
    """Structured sparse convolutions: a fixed pattern a layer, given by (g, p).

    Verma et al., Pushing the Efficiency Limit Using Structured Sparse Convolutions: see
    `swatfx.selectors.ssc_pattern` for the pattern, which is reconstructed from the supplement's
    counts. `g` and `p` may depend on the number of filters, {64: 1, 128: 2} or "64=1/128=2": layers
    with another number stay dense. `q` is the `p` of 1x1 layers, where it differs. Layers'
    densities follow from their shapes; first and last layer are dense.
    """
    _check_periods(g=g, p=p, **({} if q is None else {"q": q}))
    name = f"ssc:g{_periods(g)}:p{_periods(p)}" + ("" if q is None else f":q{_periods(q)}")
    ends = {"first_dense": True, "last_dense": True}
    return _masked("ssc", 0.0, options, weight_selector=name, **ends)


def _check_periods(**periods: Any) -> None:
    for name, period in periods.items():
        values = [*period, *period.values()] if isinstance(period, Mapping) else [period]
        whole = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
        text = isinstance(period, str) and re.fullmatch(r"[0-9=/]+", period)
        if not values or not (whole or text):
            raise PolicyError(
                f"{name} of ssc is a period, or periods by number of filters",
                value=period,
                remedy='write 4, {64: 2, 128: 4} or "64=2/128=4"',
            )


def _periods(period: int | str | Mapping[int, int]) -> str:
    if isinstance(period, Mapping):
        return "/".join(f"{filters}={value}" for filters, value in period.items())
    return str(period)
