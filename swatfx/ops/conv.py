"""`swatfx::conv` and its backward: convolution with Top-K weights and a packed activation.

Forward is `conv(a, w_s) + bias`; the input gradient sees `w_s`, the weight gradient is dense and
sees what `kept` holds of `a` (paper equations 1 to 3, appendix algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx import layouts, selectors
from swatfx.errors import InputError, SwatError
from swatfx.layouts import BATCH_INNERMOST
from swatfx.ops.autocast import register_autocast
from swatfx.ops.learned import learned_gradient, wanted_gradients, wants_weight_gradient
from swatfx.ops.pack import unpack
from swatfx.ops.saved import in_layout
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

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_state: Tensor,
    kept: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad: Sequence[int] | None = None,
    pad_mode: str = "constant",
    sparse: str = SWAT,
    weight_selector: str = "nchw",
    activation_state: Tensor | None = None,
    activation_selector: str = "nchw",
    gradient_density: str = "",
    gradient_selector: str = "nchw",
    layout: str = "",
    kept_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolution with Top-K weights.

    Args:
        input: (N, C, *spatial) or (C, *spatial), already padded by `pad`.
        weight: dense (F, C / groups, *kernel).
        bias: (F,) or None.
        weight_state: what `weight_selector` made for the weight.
        kept: packed activation for the weight gradient (`swatfx::pack` of the input before `pad`),
            or None: then the dense input is saved, if anything is.
        stride: per spatial dimension.
        padding: symmetric zero padding, per spatial dimension.
        dilation: per spatial dimension.
        groups: as in `F.conv2d`.
        pad: what was padded before, in `F.pad` order; backward pads the unpacked activation so.
        pad_mode: mode of `pad`.
        sparse: what is sparse where, see `swatfx.ops.where`.
        weight_selector: name in `swatfx.selectors`.
        activation_state: threshold of the input, where forward sees Top-K activations.
        activation_selector: name in `swatfx.selectors`.
        gradient_density: of the output gradient; "" keeps it dense.
        gradient_selector: name in `swatfx.selectors`.
        layout: of `swatfx.layouts`; what the result and the input gradient come in. "" takes that
            of `input`, and gives what aten gives. (`kept` says itself in which order it lies.)
        kept_dtype: of the values in `kept`, where narrower than the gradient's; None: the same.

    Returns:
        (N, F, *spatial).
    """
    where = Where.parse(sparse)
    spatial = weight.dim() - 2
    if where.forward_activation and activation_state is not None:
        input = active_input(input, activation_state, activation_selector, spatial, pad, pad_mode)
    used = as_seen(weight, input.dtype)
    if where.forward_weight:
        used = active_weight(weight, weight_state, weight_selector, input.dtype)
    return _in_layout(_run(input, used, bias, stride, padding, dilation, groups), layout)


conv = torch.library.custom_op("swatfx::conv", conv_reference, mutates_args=())


def _in_layout(out: Tensor, layout: str) -> Tensor:
    return in_layout(out, layout) if layout else out


def active_input(
    input: Tensor,
    state: Tensor,
    selector: str,
    spatial: int,
    pad: Sequence[int] | None,
    pad_mode: str,
) -> Tensor:
    """Top-K of a padded activation: that of the activation, padded again.

    A random selector draws a mask of the activation's own shape, the one that `swatfx::pack` draws.
    """
    pad = pad or ()
    core = input
    for i in range(len(pad) // 2):
        d = input.dim() - 1 - i
        core = core.narrow(d, pad[2 * i], input.shape[d] - pad[2 * i] - pad[2 * i + 1])
    keep = selectors.get(selector).keep(core, state, Axes.of(input.dim(), spatial, False))
    core = kept_only(core, keep)
    if not pad:
        return core
    padded = F.pad(core, list(pad), mode=pad_mode)
    return layouts.as_layout(padded, layouts.layout_of(input))


def _run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    call = _CONV[weight.dim() - 2]
    dilation = _dilation_for_aten(weight, dilation)
    # A 1d or unbatched convolution is a 2d or batched one, squeezed.
    out = call(input, weight, bias, list(stride), list(padding), dilation, groups)
    return not_a_view(out)


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
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_state: Tensor,
    kept: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad: Sequence[int] | None = None,
    pad_mode: str = "constant",
    sparse: str = SWAT,
    weight_selector: str = "nchw",
    activation_state: Tensor | None = None,
    activation_selector: str = "nchw",
    gradient_density: str = "",
    gradient_selector: str = "nchw",
    layout: str = "",
    kept_dtype: torch.dtype | None = None,
) -> Tensor:
    out = _run(input, as_seen(weight, input.dtype), bias, stride, padding, dilation, groups)
    return _in_layout(out, layout)


def conv_backward_reference(
    grad: Tensor,
    input: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    weight_state: Tensor,
    input_shape: Sequence[int],
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad: Sequence[int],
    pad_mode: str,
    sparse: str,
    weight_selector: str,
    gradient_density: str,
    gradient_selector: str,
    wants: Sequence[bool],
    kept_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::conv` for input, weight and bias; those not in `wants` are empty.

    `input_shape` and `layout` describe the padded input; exactly one of `input` and `kept`
    is given if the weight gradient is wanted.
    """
    where = Where.parse(sparse)
    batched = grad.dim() == weight.dim()
    wants_input, wants_weight, wants_bias = wants
    spatial = weight.dim() - 2
    bias_grad = None
    if where.gradient and gradient_density:
        # Biases never take part: theirs is the sum of the whole gradient.
        if wants_bias:
            bias_grad = grad.sum([d for d in range(grad.dim()) if d != (1 if batched else 0)])
        grad = sparse_gradient(grad, gradient_density, gradient_selector, spatial)
    if not wants_weight:
        input = kept = None
    elif input is None and kept is None:
        raise InputError(
            "a weight gradient needs the activation",
            remedy="pass what swatfx::conv saved: `input` or `kept`",
        )
    seen = _seen_input(grad, input, kept, input_shape, layout, pad, pad_mode, kept_dtype)
    used = as_seen(weight, grad.dtype)
    if where.backward_weight and wants_input:
        used = active_weight(weight, weight_state, weight_selector, grad.dtype)
    if not batched:
        grad, seen = grad.unsqueeze(0), seen.unsqueeze(0)
    mask = [wants_input, wants_weight, wants_bias and bias_grad is None]
    grads = torch.ops.aten.convolution_backward(
        grad,
        seen,
        used,
        [weight.shape[0]],
        list(stride),
        list(padding),
        _dilation_for_aten(weight, dilation),
        False,
        [0] * spatial,
        groups,
        mask,
    )
    input_grad, weight_grad, summed = grads
    if wants_input and not batched:
        input_grad = input_grad.squeeze(0)
    if wants_input and layout == BATCH_INNERMOST:
        input_grad = _in_layout(input_grad, layout)
    if wants_weight:
        weight_grad = weight_grad.to(weight.dtype)
        if where.active_only:
            weight_grad = reaching_gradient(weight_grad, weight, weight_state, weight_selector)
    empty = grad.new_empty(0)
    return (
        input_grad if wants_input else empty,
        weight_grad if wants_weight else empty.clone(),
        (summed if bias_grad is None else bias_grad) if wants_bias else empty.clone(),
    )


conv_backward = torch.library.custom_op(
    "swatfx::conv_backward", conv_backward_reference, mutates_args=()
)


def stored_dtype(grad: Tensor, kept_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of packed values: the gradient's, or `kept_dtype` if that is narrower."""
    narrow = kept_dtype is not None and kept_dtype.itemsize < grad.dtype.itemsize
    return kept_dtype if narrow and kept_dtype is not None else grad.dtype


def _seen_input(
    grad: Tensor,
    input: Tensor | None,
    kept: Tensor | None,
    input_shape: Sequence[int],
    layout: str,
    pad: Sequence[int],
    pad_mode: str,
    kept_dtype: torch.dtype | None,
) -> Tensor:
    """The activation that backward sees, padded; contents undefined if nothing was saved."""
    shape = list(input_shape)
    if input is not None:
        return input
    if kept is None:
        return layouts.empty(shape, layout, dtype=grad.dtype, device=grad.device)
    for i in range(len(pad) // 2):
        shape[-1 - i] -= pad[2 * i] + pad[2 * i + 1]
    dense = unpack(kept, tuple(shape), stored_dtype(grad, kept_dtype)).to(grad.dtype)
    padded = F.pad(dense, list(pad), mode=pad_mode) if pad else dense
    return layouts.as_layout(padded, layout)


@conv_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    weight_state: Tensor,
    input_shape: Sequence[int],
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad: Sequence[int],
    pad_mode: str,
    sparse: str,
    weight_selector: str,
    gradient_density: str,
    gradient_selector: str,
    wants: Sequence[bool],
    kept_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    seen = layouts.empty(input_shape, layout, dtype=grad.dtype, device=grad.device)
    batched = grad.dim() == weight.dim()
    grads = torch.ops.aten.convolution_backward(
        grad if batched else grad.unsqueeze(0),
        seen if batched else seen.unsqueeze(0),
        as_seen(weight, grad.dtype),
        [weight.shape[0]],
        list(stride),
        list(padding),
        _dilation_for_aten(weight, dilation),
        False,
        [0] * (weight.dim() - 2),
        groups,
        [True, True, True],
    )
    input_grad = grads[0] if batched else grads[0].squeeze(0)
    if layout == BATCH_INNERMOST:
        input_grad = _in_layout(input_grad, layout)
    return (
        input_grad if wants[0] else grad.new_empty(0),
        grads[1].to(weight.dtype) if wants[1] else grad.new_empty(0),
        grads[2] if wants[2] else grad.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, weight_state, kept = inputs[:5]
    ctx.options = inputs[5:]
    ctx.input_shape = tuple(input.shape)
    ctx.layout = ctx.options[12] or layouts.layout_of(input)
    wants_weight = wants_weight_gradient(ctx)
    saved = input if kept is None and wants_weight else None
    ctx.save_for_backward(weight, weight_state, kept if wants_weight else None, saved)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_state, kept, input = ctx.saved_tensors
    (stride, padding, dilation, groups, pad, pad_mode, sparse, weight_selector) = ctx.options[:8]
    _, _, gradient_density, gradient_selector, _, kept_dtype = ctx.options[8:]
    wants = [ctx.needs_input_grad[0], wants_weight_gradient(ctx), ctx.needs_input_grad[2]]
    grads = conv_backward(
        grad,
        input,
        kept,
        weight,
        weight_state,
        ctx.input_shape,
        ctx.layout,
        stride,
        padding,
        dilation,
        groups,
        pad or (),
        pad_mode,
        sparse,
        weight_selector,
        gradient_density,
        gradient_selector,
        wants,
        kept_dtype,
    )
    wanted = wanted_gradients(ctx, grads, weight, weight_state, weight_selector)
    return (*wanted, *[None] * (1 + len(ctx.options)))


def no_double_backward(ctx: Any, *grads: Tensor) -> None:
    """Backward of our backward ops: a sparse weight gradient has no second derivative to offer."""
    raise SwatError(
        "double backward through a sparse layer is not defined",
        remedy="call backward without create_graph, or compile the layer with the policy 'dense'",
    )


conv.register_autograd(_backward, setup_context=_setup_context)
conv_backward.register_autograd(no_double_backward)
learned_gradient.register_autograd(no_double_backward)
register_autocast("swatfx::conv", casts=(0, 2))
