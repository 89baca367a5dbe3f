"""`swatfx::linear` and its backward: a linear layer with Top-K weights and a packed activation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx import selectors
from swatfx.errors import InputError
from swatfx.ops import direct
from swatfx.ops.autocast import register_autocast
from swatfx.ops.calls import BACKWARD, FORWARD, LinearCall, Saved, schema_of
from swatfx.ops.learned import wanted_gradients, wants_weight_gradient
from swatfx.ops.pack import unpack
from swatfx.ops.saved import in_layout, new_in_layout, no_double_backward, not_a_view
from swatfx.ops.where import as_seen, kept_only
from swatfx.selectors import Axes
from swatfx.tensors import layouts


def linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """`F.linear` with Top-K weights.

    Args:
        input: (*any, in).
        weight: dense (out, in).
        bias: (out,) or None.
        rest: weight_state, what the call's `weight_selector` made for the weight; kept, the packed
            input for the weight gradient, or None: then the dense input is saved, if anything is;
            and the fields of `swatfx.ops.calls.LinearCall`.

    Returns:
        (*any, out), in `layout` of the call.
    """
    weight_state, _, *options = rest
    call = LinearCall(*options)
    used = call.weight_in_forward(weight, weight_state, input.dtype)
    return _in_layout(_run(input_in_forward(call, input), used, bias), call.layout)


def _in_layout(x: Tensor, layout: str) -> Tensor:
    return in_layout(x, layout) if layout else x


def input_in_forward(call: LinearCall, input: Tensor) -> Tensor:
    """The activation that forward sees: its Top-K (figure 1), or all of it."""
    state = call.activation_state
    if not call.where.forward_activation or state is None:
        return input
    axes = Axes.of(input.dim(), 0, False)
    return kept_only(input, selectors.get(call.activation_selector).keep(input, state, axes))


linear = torch.library.custom_op(
    "swatfx::linear",
    linear_reference,
    mutates_args=(),
    schema=schema_of(FORWARD, LinearCall, "Tensor"),
)


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
    out = F.linear(input, as_seen(weight, input.dtype), bias)
    layout = LinearCall(*rest[2:], **options).layout
    return new_in_layout(out.shape, layout, out) if layout else out


def linear_backward_reference(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::linear` for input, weight and bias; those not in `wants` are empty.

    Arguments are those of `swatfx::conv_backward`, with the fields of `LinearCall`.
    """
    saved, call = Saved.split(rest, LinearCall)
    input, kept, weight, weight_state, input_shape, wants = saved
    features, inputs = weight.shape
    # Biases never take part: theirs is the sum of the whole gradient.
    bias_grad = grad.reshape(-1, features).sum(0) if wants[2] else grad.new_empty(0)
    grad = call.gradient(grad, 0)
    rows = grad.reshape(-1, features)
    input_grad, weight_grad = grad.new_empty(0), grad.new_empty(0)
    if wants[0]:
        used = call.weight_in_backward(weight, weight_state, grad.dtype)
        input_grad = _in_layout((rows @ used).view(tuple(input_shape)), call.layout)
    if wants[1]:
        if input is None:
            if kept is None:
                raise InputError(
                    "a weight gradient needs the activation",
                    remedy="pass what swatfx::linear saved: `input` or `kept`",
                )
            input = unpack(kept, tuple(input_shape), call.stored_dtype(grad)).to(grad.dtype)
        weight_grad = (rows.t() @ input.reshape(-1, inputs)).to(weight.dtype)
        weight_grad = call.weight_gradient(weight_grad, weight, weight_state)
    return input_grad, weight_grad, bias_grad


linear_backward = torch.library.custom_op(
    "swatfx::linear_backward",
    linear_backward_reference,
    mutates_args=(),
    schema=schema_of(BACKWARD, LinearCall, "(Tensor, Tensor, Tensor)"),
)


@linear_backward.register_fake
def _(grad: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved, call = Saved.split(rest, LinearCall, **named)
    weight, input_shape, wants = saved.weight, saved.input_shape, saved.wants
    layout = call.layout or layouts.ROW_MAJOR
    return (
        new_in_layout(tuple(input_shape), layout, grad) if wants[0] else grad.new_empty(0),
        weight.new_empty(tuple(weight.shape)) if wants[1] else grad.new_empty(0),
        grad.new_empty(weight.shape[0]) if wants[2] else grad.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, weight_state, kept = inputs[:5]
    call = LinearCall(*inputs[5:])
    outermost = () if input.is_contiguous() else layouts.FEATURES_OUTERMOST
    layout = next((one for one in outermost if layouts.lies_in(input, one)), "")
    layout = layout and layouts.between_linear(input.shape, layout)
    ctx.call = replace(call, layout=layout, activation_state=None, open=None)
    ctx.input_shape = tuple(input.shape)
    ctx.order = layouts.order_of(input)
    wants_weight = wants_weight_gradient(ctx)
    saved = input if kept is None and wants_weight else None
    kept, opened = (kept, call.open) if wants_weight else (None, None)
    ctx.save_for_backward(weight, weight_state, kept, saved, opened)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_state, kept, input, opened = ctx.saved_tensors
    call = ctx.call if opened is None else replace(ctx.call, open=opened)
    wants = [ctx.needs_input_grad[0], wants_weight_gradient(ctx), ctx.needs_input_grad[2]]
    given = (grad, input, kept, weight, weight_state, ctx.input_shape, wants)
    grads = direct.call(linear_backward, *given, *call.options)
    selector = ctx.call.weight_selector
    first, *wanted = wanted_gradients(ctx, grads, weight, weight_state, selector)
    if first is not None and ctx.order is not None:
        # PyTorch's batch norm (2.14) misreads the gradient of a batch of one that was transposed on
        # its way to it.
        first = layouts.in_order(first, ctx.order)
    return (first, *wanted, *[None] * (1 + len(ctx.call.options)))


linear.register_autograd(_backward, setup_context=_setup_context)
linear_backward.register_autograd(no_double_backward)
register_autocast("swatfx::linear", casts=(0, 2))
