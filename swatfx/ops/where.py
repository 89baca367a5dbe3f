"""What is sparse where, as the short string that stands on a compiled graph's nodes.

"w/wa" is SWAT: Top-K weights in forward; Top-K weights and activations in backward. "/wa" is SAW,
"/g" meProp, "w/" and "a/" figure 1. A trailing "!" lets only active weights receive a gradient
(figure 7).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from swatfx import selectors
from swatfx.density import Density
from swatfx.selectors import Axes, RandomSelector
from swatfx.tensors.replaceable import Replaceable

SWAT = "w/wa"


@dataclass(frozen=True)
class Where:
    """The flags behind the string."""

    forward_weight: bool = True
    forward_activation: bool = False
    backward_weight: bool = True
    backward_activation: bool = True
    gradient: bool = False
    active_only: bool = False

    @staticmethod
    @functools.cache
    def parse(text: str) -> Where:
        """Read the string form."""
        forward, _, backward = text.rstrip("!").partition("/")
        return Where(
            "w" in forward,
            "a" in forward,
            "w" in backward,
            "a" in backward,
            "g" in backward,
            text.endswith("!"),
        )

    def __str__(self) -> str:
        forward = "w" * self.forward_weight + "a" * self.forward_activation
        backward = "w" * self.backward_weight + "a" * self.backward_activation
        return f"{forward}/{backward}{'g' * self.gradient}{'!' * self.active_only}"


def kept_only(x: Tensor, keep: Tensor) -> Tensor:
    """`x` where `keep`, else zero, in the memory format of `x` (`masked_fill` is row-major)."""
    return x.clone().masked_fill_(keep.logical_not(), 0)


@Replaceable
def kept_top(x: Tensor, state: Tensor, selector: str, axes: Axes) -> Tensor:
    """`x` where `selector` keeps it by `state`, else zero, in the memory format of `x`."""
    return kept_only(x, selectors.get(selector).keep(x, state, axes))


def weight_keep(weight: Tensor, state: Tensor, selector: str) -> Tensor:
    """Mask of active weights, broadcastable to `weight`."""
    return selectors.get(selector).keep(weight, state, Axes(0, 1))


def as_seen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in the half precision that autocast gave the activation.

    Any other difference between the two is the user's mistake: eager's own error tells it.
    """
    return weight.to(dtype) if dtype in (torch.float16, torch.bfloat16) else weight


def active_weight(weight: Tensor, state: Tensor, selector: str, dtype: torch.dtype) -> Tensor:
    """Top-K weight as a dense tensor in the weight's memory format, as `dtype` sees it."""
    return as_seen(kept_top(weight, state, selector, Axes(0, 1)), dtype)


def sparse_gradient(grad: Tensor, density: str, selector: str, spatial: int) -> Tensor:
    """Top-K of an output gradient; `density` as `Density` prints it, "9/10" or "0.9"."""
    exact = Fraction(density)
    value = Density(float(exact), exact if "/" in density else None)
    axes = Axes.of(grad.dim(), spatial, False)
    chosen = selectors.get(selector)
    seed = 0
    if isinstance(chosen, RandomSelector):
        # Drawn anew at every step: the gradient itself is what tells one step from another.
        norm = grad.abs().sum(dtype=torch.float32).cpu()
        seed = int(norm.double().view(torch.int64).item()) & (2**53 - 1)
    state = chosen.state(grad, value, axes, seed)
    return kept_top(grad, state, selector, axes)


def density_text(density: Density) -> str:
    """The inverse of what `sparse_gradient` reads."""
    exact = density.exact
    return repr(density.value) if exact is None else f"{exact.numerator}/{exact.denominator}"
