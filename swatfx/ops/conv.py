"""`swatfx::conv` and its backward: convolution with Top-K weights and a packed activation.

Forward is `conv(a, w_s) + bias`; the input gradient sees `w_s`, the weight gradient is dense and
sees what `kept` holds of `a` (paper equations 1 to 3, appendix algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx import selectors
from swatfx.errors import InputError
from swatfx.ops import direct
from swatfx.ops.autocast import register_autocast
from swatfx.ops.calls import BACKWARD, FORWARD, ConvCall, Saved, schema_of
from swatfx.ops.learned import wanted_gradients, wants_weight_gradient
from swatfx.ops.pack import unpack
from swatfx.ops.saved import in_layout, no_double_backward, not_a_view
from swatfx.ops.where import as_seen, kept_only
from swatfx.selectors import Axes
from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_reference(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """Convolution with Top-K weights.

    Args:
        input: (N, C, *spatial) or (C, *spatial), already padded by `ConvCall.pad`.
        weight: dense (F, C / groups, *kernel).
        bias: (F,) or None.
        rest: weight_state, what the call's `weight_selector` made for the weight; kept, the packed
            activation for the weight gradient (`swatfx::pack` of the input before it was padded),
            or None: then the dense input is saved, if anything is; and the fields of
            `swatfx.ops.calls.ConvCall`.

    Returns:
        (N, F, *spatial).
    """
    weight_state, _, *options = rest
    call = ConvCall(*options)
    seen = input_in_forward(call, input, weight.dim() - 2)
    used = call.weight_in_forward(weight, weight_state, input.dtype)
    return _in_layout(_run(call, seen, used, bias), call.layout)


conv = torch.library.custom_op(
    "swatfx::conv",
    conv_reference,
    mutates_args=(),
    schema=schema_of(FORWARD, ConvCall, "Tensor"),
)


def _in_layout(out: Tensor, layout: str) -> Tensor:
    return in_layout(out, layout) if layout else out


def input_in_forward(call: ConvCall, input: Tensor, spatial: int) -> Tensor:
    """The activation that forward sees: its Top-K (figure 1), padded again, or all of it.

    A random selector draws a mask of the activation's own shape, the one that `swatfx::pack` draws.
    """
    state = call.activation_state
    if not call.where.forward_activation or state is None:
        return input
    pad = call.pad or ()
    core = input
    for i in range(len(pad) // 2):
        d = input.dim() - 1 - i
        core = core.narrow(d, pad[2 * i], input.shape[d] - pad[2 * i] - pad[2 * i + 1])
    axes = Axes.of(input.dim(), spatial, False)
    keep = selectors.get(call.activation_selector).keep(core, state, axes)
    core = kept_only(core, keep)
    if not pad:
        return core
    padded = F.pad(core, list(pad), mode=call.pad_mode)
    return layouts.as_layout(padded, layouts.layout_of(input))


def _run(call: ConvCall, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolve = _CONV[weight.dim() - 2]
    dilation = _dilation_for_aten(weight, call.dilation)
    steps = list(call.stride), list(call.padding), dilation, call.groups
    # A 1d or unbatched convolution is a 2d or batched one, squeezed.
    return not_a_view(convolve(input, weight, bias, *steps))


def _dilation_for_aten(weight: Tensor, dilation: Sequence[int]) -> list[int]:
    """`dilation`, 1 where the kernel has one tap, which nothing can spread.

    PyTorch 2.14 reads past an input of size 1 in channels_last if such a tap is dilated, strided
    and padded, and dies.
    """
    kernel = weight.shape[2:]
    if len(dilation) != len(kernel):
        return list(dilation)
    return [1 if size == 1 and d > 0 else d for size, d in zip(kernel, dilation, strict=True)]


@conv.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **named: Any) -> Tensor:
    call = ConvCall(*rest[2:], **named)  # behind the weight's state, and what is kept
    return _in_layout(_run(call, input, as_seen(weight, input.dtype), bias), call.layout)


def conv_backward_reference(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::conv` for input, weight and bias; those not in `wants` are empty.

    Args:
        grad: of the output, (N, F, *spatial) or (F, *spatial).
        rest: what forward left, see `swatfx.ops.calls.Saved`, and the fields of `ConvCall`; its
            layout is the padded input's.
    """
    saved, call = Saved.split(rest, ConvCall)
    input, kept, weight, weight_state, input_shape, wants = saved
    batched = grad.dim() == weight.dim()
    wants_input, wants_weight, wants_bias = wants
    spatial = weight.dim() - 2
    bias_grad = None
    if call.sparsifies_gradients and wants_bias:
        # Biases never take part: theirs is the sum of the whole gradient.
        bias_grad = grad.sum([d for d in range(grad.dim()) if d != (1 if batched else 0)])
    grad = call.gradient(grad, spatial)
    if not wants_weight:
        input = kept = None
    elif input is None and kept is None:
        raise InputError(
            "a weight gradient needs the activation",
            remedy="pass what swatfx::conv saved: `input` or `kept`",
        )
    seen = input
    if seen is None:
        seen = _unpacked(call, grad, kept, input_shape)
    used = as_seen(weight, grad.dtype)
    if wants_input:
        used = call.weight_in_backward(weight, weight_state, grad.dtype)
    mask = [wants_input, wants_weight, wants_bias and bias_grad is None]
    input_grad, weight_grad, summed = _products(call, grad, seen, used, mask)
    if wants_weight:
        weight_grad = call.weight_gradient(weight_grad.to(weight.dtype), weight, weight_state)
    empty = grad.new_empty(0)
    return (
        input_grad if wants_input else empty,
        weight_grad if wants_weight else empty.clone(),
        (summed if bias_grad is None else bias_grad) if wants_bias else empty.clone(),
    )


def _products(
    call: ConvCall, grad: Tensor, seen: Tensor, used: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients of a convolution of `seen` by `used`; None where `mask` is False."""
    spatial = used.dim() - 2
    batched = grad.dim() == used.dim()
    input_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        grad if batched else grad.unsqueeze(0),
        seen if batched else seen.unsqueeze(0),
        used,
        [used.shape[0]],
        list(call.stride),
        list(call.padding),
        _dilation_for_aten(used, call.dilation),
        False,
        [0] * spatial,
        call.groups,
        mask,
    )
    if mask[0]:
        input_grad = input_grad if batched else input_grad.squeeze(0)
        if call.layout == BATCH_INNERMOST:
            input_grad = _in_layout(input_grad, call.layout)
    return input_grad, weight_grad, bias_grad


conv_backward = torch.library.custom_op(
    "swatfx::conv_backward",
    conv_backward_reference,
    mutates_args=(),
    schema=schema_of(BACKWARD, ConvCall, "(Tensor, Tensor, Tensor)"),
)


def _unpacked(
    call: ConvCall, grad: Tensor, kept: Tensor | None, input_shape: Sequence[int]
) -> Tensor:
    """The activation that backward sees, padded; contents undefined if nothing was kept."""
    shape = list(input_shape)
    if kept is None:
        return layouts.empty(shape, call.layout, dtype=grad.dtype, device=grad.device)
    pad = list(call.pad or ())
    for i in range(len(pad) // 2):
        shape[-1 - i] -= pad[2 * i] + pad[2 * i + 1]
    dense = unpack(kept, tuple(shape), call.stored_dtype(grad)).to(grad.dtype)
    padded = F.pad(dense, pad, mode=call.pad_mode) if pad else dense
    return layouts.as_layout(padded, call.layout)


@conv_backward.register_fake
def _(grad: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved, call = Saved.split(rest, ConvCall, **named)
    weight, wants = saved.weight, saved.wants
    seen = _unpacked(call, grad, None, saved.input_shape)
    found = _products(call, grad, seen, as_seen(weight, grad.dtype), [True] * 3)
    empty = [grad.new_empty(0) for _ in wants]
    first, second, third = (
        g if want else e for g, e, want in zip(found, empty, wants, strict=True)
    )
    return first, second.to(weight.dtype) if wants[1] else second, third


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, weight_state, kept = inputs[:5]
    call = ConvCall.of(inputs[5:])
    ctx.call = call
    if not call.layout or call.activation_state is not None or call.open is not None:
        layout = call.layout or layouts.layout_of(input)
        ctx.call = replace(call, layout=layout, activation_state=None, open=None)
    ctx.input_shape = tuple(input.shape)
    wants_weight = wants_weight_gradient(ctx)
    saved = input if kept is None and wants_weight else None
    kept, opened = (kept, call.open) if wants_weight else (None, None)
    ctx.save_for_backward(weight, weight_state, kept, saved, opened)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_state, kept, input, opened = ctx.saved_tensors
    call = ctx.call if opened is None else replace(ctx.call, open=opened)
    wants = [ctx.needs_input_grad[0], wants_weight_gradient(ctx), ctx.needs_input_grad[2]]
    given = (grad, input, kept, weight, weight_state, ctx.input_shape, wants)
    grads = direct.call(conv_backward, *given, *call.options)
    wanted = wanted_gradients(ctx, grads, weight, weight_state, ctx.call.weight_selector)
    return (*wanted, *[None] * (1 + len(ctx.call.options)))


conv.register_autograd(_backward, setup_context=_setup_context)
conv_backward.register_autograd(no_double_backward)
register_autocast("swatfx::conv", casts=(0, 2))
