"""`swatfx::batch_norm` and its backward: batch norm, with the addition and the ReLU that follow it.

Eager keeps the norm's input and ReLU's result. Here backward sees the input alone and finds ReLU's
mask from it ("exact"), or codes of the normalised input ("int8", "int4"; `swatfx.ops.codes`). What
is computed is what aten computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swatfx.errors import InputError
from swatfx.ops import direct
from swatfx.ops.calls import NormBackwardCall, NormCall, schema_of
from swatfx.ops.codes import BITS, Room, decode
from swatfx.ops.norm_codes import NormCode, encode_norm, per_channel
from swatfx.ops.saved import (
    active_bits,
    bits_size,
    in_layout,
    mask_from,
    new_in_layout,
    no_double_backward,
    once_only,
    relu_gradient,
)
from swatfx.tensors import layouts

__all__ = [
    "EXACT",
    "NOTHING",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_reference",
    "batch_norm_reference",
    "is_complete",
    "recomputes",
    "stats_dtype",
]
EXACT, NOTHING = "exact", "nothing"


def recomputes(x: Tensor, training: bool) -> bool:
    """Whether backward finds ReLU's mask anew from `x`, bit for bit: "exact" then keeps no mask."""
    dense = x.is_contiguous() or layouts.layout_of(x) != layouts.ROW_MAJOR
    wide = x.dtype in (torch.float32, torch.float64)
    return training and x.device.type == "cpu" and wide and dense


def batch_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`[relu](batch_norm(x) [+ residual])`, which writes no running statistics.

    Args:
        x: (N, C, *any).
        residual: of x's shape and dtype, or None.
        weight: (C,) or None; so are bias, running_mean and running_var.
        bias: likewise.
        running_mean: likewise; wanted where the call is not `training`.
        running_var: likewise.
        options: fields of `swatfx.ops.calls.NormCall`.

    Returns:
        y: in the layout of x.
        mean, invstd: (C,), those used.
        new_mean, new_var: (C,), what the running statistics become; empty if they do not change.
        code: uint8 [bytes] for backward. "exact": the bits of ReLU's mask, where `recomputes` is
        false or there is a residual; else empty. "int8" and "int4": x-hat as `swatfx.ops.codes`
        has it, channels being rows; the bits of ReLU's mask if there is a residual. Without one the
        border of the codes is where ReLU starts: it lets through what is above, or, where the
        weight is negative, what is below.
    """
    call = NormCall(*options)
    _check_features(
        x.shape, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    layout = layouts.layout_of(x)
    seen = _for_aten(x, layout)
    new_mean, new_var = x.new_empty(0), x.new_empty(0)
    if x.numel() == 0:
        y = torch.empty_like(x)
        dtype = stats_dtype(x, weight, bias, running_mean, call.training)
        mean = x.new_zeros(x.shape[1], dtype=dtype)
        invstd = mean.clone()
        if call.training and running_mean is not None and running_var is not None:
            new_mean, new_var = running_mean.clone(), running_var.clone()
    elif call.training:
        old = [None if s is None else s.clone() for s in (running_mean, running_var)]
        y, mean, invstd = torch.ops.aten.native_batch_norm(
            seen, weight, bias, *old, True, call.momentum, call.eps
        )
        new_mean, new_var = (x.new_empty(0) if s is None else s for s in old)
    else:
        assert running_mean is not None and running_var is not None
        y, _, _ = torch.ops.aten.native_batch_norm(
            seen, weight, bias, running_mean, running_var, False, call.momentum, call.eps
        )
        invstd = _inverse_deviation(running_var, call.eps)
        mean = running_mean.to(invstd.dtype, copy=True)
    if residual is not None:
        y = y.add_(residual)
    if call.relu:
        y = y.relu_()
    y = in_layout(y, layout)
    code = x.new_empty(0, dtype=torch.uint8)
    if call.saves in BITS:
        how = NormCode(call.relu, residual is not None, call.saves, layout)
        code = encode_norm(how, seen, (weight, bias), (y, mean, invstd))
    elif _keeps_mask(call, x, residual):
        code = active_bits(y, layout)
    return y, mean, invstd, new_mean, new_var, code


def _keeps_mask(call: NormCall, x: Tensor, residual: Tensor | None) -> bool:
    """Whether "exact" keeps the bits of ReLU's mask."""
    if call.saves != EXACT or not call.relu:
        return False
    return residual is not None or not recomputes(x, call.training)


batch_norm = torch.library.custom_op(
    "swatfx::batch_norm",
    batch_norm_reference,
    mutates_args=(),
    schema=schema_of(
        "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias,"
        " Tensor? running_mean, Tensor? running_var",
        NormCall,
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
)


def _check_features(shape: Sequence[int], **parameters: Tensor | None) -> None:
    """Raise as `F.batch_norm` does, which the op below it leaves to its callers."""
    for name, p in parameters.items():
        if p is not None and (p.dim() != 1 or p.shape[0] != shape[1]):
            count = p.numel()
            raise RuntimeError(f"{name} should contain {shape[1]} elements not {count}")


def _for_aten(x: Tensor, layout: str) -> Tensor:
    """`x` where aten knows its layout, else a row-major copy: of others it has no fast way.

    The stride of a dimension of size 1 means nothing, but aten's backward goes by it where one
    tensor is channels_last and the other is not (2.14): it gets that of a larger dimension.
    """
    if layout == layouts.BATCH_INNERMOST:
        x = x.contiguous()
    return layouts.with_plain_strides(x) if 1 in x.shape and x.dim() > 2 else x


def _inverse_deviation(variance: Tensor, eps: float) -> Tensor:
    # aten's backward forms it in double precision, which MPS does not have.
    wide = variance if variance.device.type == "mps" else variance.double()
    return (wide + eps).sqrt().reciprocal().to(torch.promote_types(variance.dtype, torch.float32))


def stats_dtype(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    training: bool,
) -> torch.dtype:
    """Dtype of the mean and invstd that `batch_norm` returns: in training, that of aten's."""
    if not training and running_mean is not None:
        return torch.promote_types(running_mean.dtype, torch.float32)
    mixed = any(p is not None and p.dtype != x.dtype for p in (weight, bias, running_mean))
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow and (mixed or x.device.type != "cpu") else x.dtype


@batch_norm.register_fake
def _(x: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
    residual, weight, bias, running_mean, running_var = rest[:5]
    call = NormCall(*rest[5:], **named)
    y = new_in_layout(x.shape, layouts.layout_of(x), x)
    dtype = stats_dtype(x, weight, bias, running_mean, call.training)
    mean, invstd = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    new_mean, new_var = (
        x.new_empty(0) if s is None or not call.training else torch.empty_like(s)
        for s in (running_mean, running_var)
    )
    size = 0
    if call.saves in BITS:
        size = Room.of(x.shape, call.saves).total
        size += bits_size(x.numel()) if call.relu and residual is not None else 0
    elif _keeps_mask(call, x, residual):
        size = bits_size(x.numel())
    return y, mean, invstd, new_mean, new_var, x.new_empty(size, dtype=torch.uint8)


def is_complete(
    call: NormBackwardCall, x: Tensor | None, code: Tensor, wants: Sequence[bool]
) -> bool:
    """Whether `x` and `code` are what forward kept for such a backward."""
    elements = torch.Size(call.shape).numel()
    mask = bits_size(elements)
    if code.dtype is not torch.uint8 or code.dim() != 1 or len(wants) != 4:
        return False
    if call.saves in BITS:
        kept = Room.of(call.shape, call.saves).total
        return code.numel() == kept + (mask if call.relu and call.has_residual else 0)
    reads_x = (call.training and wants[0]) or wants[2]
    if call.relu and not code.numel():
        return x is not None and call.training and not call.has_residual
    return code.numel() == (mask if call.relu else 0) and (x is not None or not reads_x)


def batch_norm_backward_reference(
    grad: Tensor,
    x: Tensor | None,
    code: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    wants: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::batch_norm` for x, residual, weight and bias; those not wanted: empty.

    `x` is None where it is in codes, and where nothing of it is needed. Options are the fields of
    `swatfx.ops.calls.NormBackwardCall`.
    """
    call = NormBackwardCall(*options)
    shape, layout = call.shape, call.layout
    wants_x, wants_residual, wants_weight, wants_bias = wants
    _check_features(shape, weight=weight, bias=bias, mean=mean, invstd=invstd)
    if mean is None or invstd is None:  # what the dispatcher makes of None
        raise InputError("backward of a batch norm needs the statistics of its forward")
    if grad.shape != torch.Size(shape) or (x is not None and x.shape != grad.shape):
        raise InputError(
            "a gradient of another shape than the norm's input",
            value=tuple(grad.shape),
            remedy=f"the norm saw {tuple(shape)}",
        )
    # Aten reads statistics and parameters of channels_last activations as if they had no gaps.
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    mean, invstd, code = mean.contiguous(), invstd.contiguous(), code.contiguous()
    elements, dims = torch.Size(shape).numel(), len(shape)
    if elements == 0:
        return _zero_gradients(call, grad, weight, bias, wants)
    if not is_complete(call, x, code, wants):
        raise InputError(
            "backward of a batch norm got other bytes than its forward kept",
            value=f"{code.numel()} bytes for {tuple(shape)}",
            remedy="pass on what swatfx::batch_norm returned and saved as it is",
        )
    above: Tensor | None = None
    if call.saves in BITS:
        seen, above = decode(code, shape, layout, call.saves, call.training)
        seen, code = seen.to(grad.dtype), code[Room.of(shape, call.saves).total :]
    elif x is not None:
        seen = x
    else:  # neither a batch's gradient nor a weight's is wanted
        seen = layouts.empty(shape, layout, dtype=grad.dtype, device=grad.device)
    seen = _for_aten(seen, layout)
    scale = invstd if weight is None else weight * invstd
    if call.relu:
        if code.numel():
            active = mask_from(code, shape, layout)
        elif above is not None:
            active = above if weight is None else above == per_channel(weight >= 0, dims)
        else:
            # One for the deviation: weight * invstd is what aten's forward multiplied by, too.
            ones = torch.ones_like(invstd)
            shift = None if bias is None else bias.to(scale.dtype)
            active, _, _ = torch.ops.aten.native_batch_norm(
                seen, scale, shift, mean, ones, False, 0.0, 0.0
            )
        grad = relu_gradient(grad, active)
    moments = (mean, invstd)
    if call.saves in BITS:  # what is normalised already has these
        moments = torch.zeros_like(mean), torch.ones_like(invstd)
        weight_seen: Tensor | None = scale
    else:
        weight_seen = weight
    # In half precision throughout, aten wants all of it so on a CPU, and float32 moments on a GPU.
    if weight_seen is not None and not grad.is_cuda:
        moments = moments[0].to(weight_seen.dtype), moments[1].to(weight_seen.dtype)
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        _for_aten(grad, layout),
        seen,
        weight_seen,
        None,
        None,
        *moments,
        True,
        0.0,
        [wants_x and call.training, wants_weight, wants_bias],
    )
    if not call.training:
        dx = grad.to(invstd.dtype) * per_channel(invstd, dims)
        dx = (dx if weight is None else dx * per_channel(weight, dims)).to(grad.dtype)
    empty = [grad.new_empty(0) for _ in range(4)]
    residual_grad = empty[1]
    if wants_residual:
        residual_grad = in_layout(grad if call.relu else grad.clone(), layout)
    return (
        in_layout(dx, layout) if wants_x else empty[0],
        residual_grad,
        dweight.to(weight.dtype) if wants_weight and weight is not None else empty[2],
        dbias.to(bias.dtype) if wants_bias and bias is not None else empty[3],
    )


def _zero_gradients(
    call: NormBackwardCall,
    grad: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(owner: Tensor | None, wanted: bool) -> Tensor:
        return torch.zeros_like(owner) if wanted and owner is not None else grad.new_empty(0)

    dx, residual = (
        new_in_layout(call.shape, call.layout, grad) if wanted else grad.new_empty(0)
        for wanted in wants[:2]
    )
    return dx, residual, like(weight, wants[2]), like(bias, wants[3])


batch_norm_backward = torch.library.custom_op(
    "swatfx::batch_norm_backward",
    batch_norm_backward_reference,
    mutates_args=(),
    schema=schema_of(
        "Tensor grad, Tensor? x, Tensor code, Tensor? weight, Tensor? bias, Tensor mean,"
        " Tensor invstd, bool[] wants",
        NormBackwardCall,
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
)


@batch_norm_backward.register_fake
def _(grad: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, weight, bias, _, _, wants = rest[:7]
    return _zero_gradients(NormBackwardCall(*rest[7:], **named), grad, weight, bias, wants)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias = inputs[:4]
    call = NormCall.of(inputs[6:])
    _, mean, invstd, new_mean, new_var, code = output
    ctx.mark_non_differentiable(mean, invstd, new_mean, new_var, code)
    ctx.set_materialize_grads(False)
    has_residual = residual is not None
    shape, layout = tuple(x.shape), layouts.layout_of(x)
    told = (shape, layout, call.training, call.relu, has_residual, call.saves)
    ctx.call = NormBackwardCall.of(told)
    wants_x, _, wants_weight, _ = ctx.needs_input_grad[:4]
    masked = call.relu and residual is None and recomputes(x, call.training)
    reads_x = (call.training and wants_x) or wants_weight or masked
    kept = x if reads_x and call.saves == EXACT else None
    ctx.save_for_backward(kept, code, weight, bias, mean, invstd)


def _backward(ctx: Any, grad: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    wants = list(ctx.needs_input_grad[:4])
    given = (grad, *ctx.saved_tensors, wants, *ctx.call.options)
    grads = direct.call(batch_norm_backward, *given)
    if ctx.call.saves in BITS:
        grads = once_only(*grads)
    wanted = [g if want else None for g, want in zip(grads, wants, strict=True)]
    return (*wanted, *[None] * 7)


batch_norm.register_autograd(_backward, setup_context=_setup_context)
batch_norm_backward.register_autograd(no_double_backward)
