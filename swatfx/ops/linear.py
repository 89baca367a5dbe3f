"""`swatfx::linear` and its backward: a linear layer with Top-K weights and a packed activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx import layouts, selectors
from swatfx.errors import InputError
from swatfx.ops.autocast import register_autocast
from swatfx.ops.conv import no_double_backward, stored_dtype
from swatfx.ops.learned import wanted_gradients, wants_weight_gradient
from swatfx.ops.pack import unpack
from swatfx.ops.where import (
    SWAT,
    Where,
    active_weight,
    as_seen,
    kept_only,
    not_a_view,
    reaching_gradient,
    sparse_gradient,
)
from swatfx.selectors import Axes


def linear_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_state: Tensor,
    kept: Tensor | None,
    sparse: str = SWAT,
    weight_selector: str = "nchw",
    activation_state: Tensor | None = None,
    activation_selector: str = "nchw",
    gradient_density: str = "",
    gradient_selector: str = "nchw",
    kept_dtype: torch.dtype | None = None,
    sparse_kernels: bool = False,
) -> Tensor:
    """`F.linear` with Top-K weights.

    Args:
        input: (*any, in).
        weight: dense (out, in).
        bias: (out,) or None.
        weight_state: what `weight_selector` made for the weight.
        kept: packed input for the weight gradient, or None: then the dense input is saved, if
            anything is.
        sparse: what is sparse where, see `swatfx.ops.where`; the rest as in `swatfx::conv`.
        weight_selector: name in `swatfx.selectors`.
        activation_state: threshold of the input, where forward sees Top-K activations.
        activation_selector: name in `swatfx.selectors`.
        gradient_density: of the output gradient; "" keeps it dense.
        gradient_selector: name in `swatfx.selectors`.
        kept_dtype: of the values in `kept`, where narrower than the gradient's; None: the same.
        sparse_kernels: a wish: run kernels that skip zeros, where there are any for the input.

    Returns:
        (*any, out).
    """
    where = Where.parse(sparse)
    if where.forward_activation and activation_state is not None:
        axes = Axes.of(input.dim(), 0, False)
        keep = selectors.get(activation_selector).keep(input, activation_state, axes)
        input = kept_only(input, keep)
    used = as_seen(weight, input.dtype)
    if where.forward_weight:
        used = active_weight(weight, weight_state, weight_selector, input.dtype)
    return _run(input, used, bias)


linear = torch.library.custom_op("swatfx::linear", linear_reference, mutates_args=())


def _run(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, which takes rows one batch at a time only where no weight gradient is wanted.

    Below autograd it cannot know that one is, and its sums would round otherwise than the model's.
    """
    if input.dim() < 3 or input.is_contiguous():
        return not_a_view(F.linear(input, weight, bias))
    rows = F.linear(input.reshape(-1, input.shape[-1]), weight)
    out = rows.view(*input.shape[:-1], weight.shape[0])
    return not_a_view(out if bias is None else out.add_(bias))


@linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **options: Any) -> Tensor:
    return F.linear(input, as_seen(weight, input.dtype), bias)


def linear_backward_reference(
    grad: Tensor,
    input: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    weight_state: Tensor,
    input_shape: Sequence[int],
    sparse: str,
    weight_selector: str,
    gradient_density: str,
    gradient_selector: str,
    wants: Sequence[bool],
    kept_dtype: torch.dtype | None = None,
    sparse_kernels: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::linear` for input, weight and bias; those not in `wants` are empty."""
    where = Where.parse(sparse)
    features, inputs = weight.shape
    # Biases never take part: theirs is the sum of the whole gradient.
    bias_grad = grad.reshape(-1, features).sum(0) if wants[2] else grad.new_empty(0)
    if where.gradient and gradient_density:
        grad = sparse_gradient(grad, gradient_density, gradient_selector, 0)
    rows = grad.reshape(-1, features)
    input_grad, weight_grad = grad.new_empty(0), grad.new_empty(0)
    if wants[0]:
        used = as_seen(weight, grad.dtype)
        if where.backward_weight:
            used = active_weight(weight, weight_state, weight_selector, grad.dtype)
        input_grad = (rows @ used).view(tuple(input_shape))
    if wants[1]:
        if input is None:
            if kept is None:
                raise InputError(
                    "a weight gradient needs the activation",
                    remedy="pass what swatfx::linear saved: `input` or `kept`",
                )
            stored = stored_dtype(grad, kept_dtype)
            input = unpack(kept, tuple(input_shape), stored).to(grad.dtype)
        weight_grad = (rows.t() @ input.reshape(-1, inputs)).to(weight.dtype)
        if where.active_only:
            weight_grad = reaching_gradient(weight_grad, weight, weight_state, weight_selector)
    return input_grad, weight_grad, bias_grad


linear_backward = torch.library.custom_op(
    "swatfx::linear_backward", linear_backward_reference, mutates_args=()
)


@linear_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    weight_state: Tensor,
    input_shape: Sequence[int],
    sparse: str,
    weight_selector: str,
    gradient_density: str,
    gradient_selector: str,
    wants: Sequence[bool],
    kept_dtype: torch.dtype | None = None,
    sparse_kernels: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(tuple(input_shape)) if wants[0] else grad.new_empty(0),
        weight.new_empty(tuple(weight.shape)) if wants[1] else grad.new_empty(0),
        grad.new_empty(weight.shape[0]) if wants[2] else grad.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, weight_state, kept = inputs[:5]
    ctx.options = inputs[5:]
    ctx.input_shape = tuple(input.shape)
    ctx.order = layouts.order_of(input)
    wants_weight = wants_weight_gradient(ctx)
    saved = input if kept is None and wants_weight else None
    ctx.save_for_backward(weight, weight_state, kept if wants_weight else None, saved)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_state, kept, input = ctx.saved_tensors
    sparse, weight_selector, _, _, gradient_density, gradient_selector, *last = ctx.options
    wants = [ctx.needs_input_grad[0], wants_weight_gradient(ctx), ctx.needs_input_grad[2]]
    grads = linear_backward(
        grad,
        input,
        kept,
        weight,
        weight_state,
        ctx.input_shape,
        sparse,
        weight_selector,
        gradient_density,
        gradient_selector,
        wants,
        *last,
    )
    first, *wanted = wanted_gradients(ctx, grads, weight, weight_state, weight_selector)
    if first is not None and ctx.order is not None:
        # PyTorch's batch norm (2.14) misreads the gradient of a batch of one that was transposed on
        # its way to it.
        first = layouts.in_order(first, ctx.order)
    return (first, *wanted, *[None] * (1 + len(ctx.options)))


linear.register_autograd(_backward, setup_context=_setup_context)
linear_backward.register_autograd(no_double_backward)
register_autocast("swatfx::linear", casts=(0, 2))
