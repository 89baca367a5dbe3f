"""SWAT, dense training, and the variants that the paper measures SWAT by."""

from __future__ import annotations

from typing import Any

from swatfx.policy.fields import Policy


def dense() -> Policy:
    """Nothing is sparse; the graph is left as it was traced."""
    return Policy(
        "dense",
        distribution="dense",
        forward_weight=False,
        backward_weight=False,
        backward_activation=False,
    )


def swat_u(sparsity: float, *, first_dense: bool = True, **options: Any) -> Policy:
    """SWAT with the same density in every layer but the first (paper section 3.3.2, SWAT-U).

    Args:
        sparsity: fraction of weights and activations dropped, in [0, 1).
        first_dense: keep the first layer dense, as the paper does.
        **options: any other field of `Policy`, e.g. `weight_selector="channel"`, `period=1000`.
    """
    return Policy("swat-u", sparsity, first_dense=first_dense, **options)


def swat_erk(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """SWAT with Erdos-Renyi-kernel densities over all layers (section 3.3.2, SWAT-ERK)."""
    return Policy("swat-erk", sparsity, distribution="erk", first_dense=first_dense, **options)


def swat_er(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """SWAT with Erdos-Renyi densities: as ERK, without the kernel sizes in the sum."""
    return Policy("swat-er", sparsity, distribution="er", first_dense=first_dense, **options)


def swat_m(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """SWAT whose densities follow each layer's mean momentum (section 3.3.2, SWAT-M).

    Needs `swatfx.attach(gm, optimizer)` before training.
    """
    return Policy("swat-m", sparsity, distribution="momentum", first_dense=first_dense, **options)


def saw(sparsity: float, *, first_dense: bool = True, **options: Any) -> Policy:
    """Sparse weights and activations in backward only (appendix A.7; figure 2's "W+A")."""
    options.setdefault("forward_weight", False)
    return Policy("saw", sparsity, first_dense=first_dense, **options)


def forward_weights(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """Top-K weights in the forward pass only (figure 1, "weights").

    The input gradient sees the dense weights, the weight gradient the dense activations, and every
    weight is updated: what forward leaves out is out for that pass only (section 3.2).
    """
    return Policy(
        "forward-weights",
        sparsity,
        backward_weight=False,
        backward_activation=False,
        first_dense=first_dense,
        **options,
    )


def forward_activations(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """Top-K activations in the forward pass only (figure 1, "activations").

    Weights are dense, and backward sees the activations as they were before Top-K (section 3.2).
    """
    return Policy(
        "forward-activations",
        sparsity,
        forward_weight=False,
        forward_activation=True,
        backward_weight=False,
        backward_activation=False,
        first_dense=first_dense,
        **options,
    )


def swat_active_update(sparsity: float, *, first_dense: bool = True, **options: Any) -> Policy:
    """SWAT-U that updates active weights only (section 4.5, figure 7).

    The gradient of inactive weights is masked; weight decay and momentum still act on them, and
    Top-K is taken anew, so that a weight may still change sides.
    """
    return Policy(
        "swat-active-update", sparsity, update="active", first_dense=first_dense, **options
    )


def swat_frozen(
    sparsity: float, hold_from_epoch: int = 1, *, first_dense: bool = True, **options: Any
) -> Policy:
    """SWAT-U whose active set stays as it is from epoch `hold_from_epoch` on (figure 8).

    Before, the set rests between two refreshes, where that of `swat_u` follows the weights over its
    threshold: the same at period 1. All weights go on receiving gradients; with update="active" the
    active ones only. Needs
    `swatfx.attach(gm, optimizer, steps_per_epoch=...)`.
    """
    return Policy(
        "swat-frozen",
        sparsity,
        hold_from_epoch=hold_from_epoch,
        first_dense=first_dense,
        **options,
    )
