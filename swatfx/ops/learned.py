"""Learned thresholds (DST): the selector "learned", and gradients through its mask.

Forward sees the weights whose magnitude reaches a threshold t a filter, as with the selector "chw";
but t is trained, so backward goes on from the gradient of what forward saw to w and to t. The mask
is step(|w| - t), and the derivative that stands in for the step's is long-tailed: 2 - 4|q| where
|q| <= 0.4, 0.4 up to |q| = 1, else 0, with q = |w| - t. Inactive weights so receive a gradient, and
recover.

Source: Liu, Xu, Shi, Cheung and So, Dynamic Sparse Training, ICLR 2020 (arXiv 2005.06870), and its
public code. That drops a weight at exactly t; here ties stay, as with every selector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swatfx import selectors
from swatfx.density import Density
from swatfx.errors import PolicyError
from swatfx.ops.saved import no_double_backward
from swatfx.ops.where import kept_only, weight_keep
from swatfx.selectors import Selector

LEARNED = "learned"
_TAIL, _END = 0.4, 1.0  # the derivative's least value but zero, and how far it reaches


@dataclass(frozen=True)
class LearnedSelector(Selector):
    """Keep what reaches its filter's threshold; the thresholds (F, 1, ...) are parameters."""

    def check(self, density: Density, layer: str) -> None:
        """The density is what training makes of it: none can be asked for."""
        if not density.is_dense:
            raise PolicyError(
                f"selector {self.name!r} finds its density by itself",
                layer=layer,
                value=f"sparsity {1 - density.value:g}",
                remedy="use sparsity 0, and the policy's penalty to drive the sparsity up",
            )


selectors.register(
    LearnedSelector(LEARNED, groups=("sample",), weights_only=True, fixed_density=True)
)


def is_learned(selector: str) -> bool:
    """Whether the state of the selector called `selector` is trained by gradients."""
    return isinstance(selectors.get(selector), LearnedSelector)


def learned_gradient_reference(
    grad: Tensor, weight: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `weight * step(|weight| - threshold)`, straight through the step.

    Args:
        grad: of the masked weight: (F, C, *kernel) or (out, in).
        weight: dense, of the same shape.
        threshold: (F, 1, ...) or (out, 1).

    Returns:
        weight_grad: of `weight`: `grad` where the weight is active, plus grad * |w| * h(q).
        threshold_grad: of `threshold`: minus the sum of grad * w * h(q) over each filter.
    """
    size = weight.abs()
    distance = (size - threshold).abs_()
    # The slope meets the tail where the slope ends: the larger of the two is the derivative.
    through = torch.mul(distance, -4).add_(2).clamp_(min=_TAIL).mul_(size).mul_(grad)
    through.masked_fill_(distance > _END, 0)
    weight_grad = kept_only(grad, weight_keep(weight, threshold, LEARNED)).add_(through)
    rest = list(range(1, weight.dim()))
    total = through.mul_(weight.sign()).sum(rest, keepdim=True)
    return weight_grad, torch.empty_like(threshold).copy_(total).neg_()


learned_gradient = torch.library.custom_op(
    "swatfx::learned_gradient", learned_gradient_reference, mutates_args=()
)


@learned_gradient.register_fake
def _(grad: Tensor, weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(threshold)


learned_gradient.register_autograd(no_double_backward)


def wants_weight_gradient(ctx: Any) -> bool:
    """Whether backward of a layer's op forms a weight gradient: for argument 1, the weight, or for
    argument 3, the thresholds learned from it.
    """
    return bool(ctx.needs_input_grad[1] or ctx.needs_input_grad[3])


def wanted_gradients(
    ctx: Any, grads: Sequence[Tensor], weight: Tensor, state: Tensor, selector: str
) -> tuple[Tensor | None, ...]:
    """What backward of a layer's op returns for its first four arguments.

    Args:
        ctx: of its backward.
        grads: for input, effective weight and bias.
        weight: dense, as forward got it; argument 1.
        state: the selector's; argument 3.
        selector: name in `swatfx.selectors`.
    """
    input_grad, weight_grad, bias_grad = grads
    state_grad = state
    if is_learned(selector) and wants_weight_gradient(ctx):
        weight_grad, state_grad = learned_gradient(weight_grad, weight, state)
    found = (input_grad, weight_grad, bias_grad, state_grad)
    return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False))
