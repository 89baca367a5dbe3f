"""`swatfx::features_norm`: layer norm of a tensor whose features lie outermost in memory.

Between convolutions and linear layers that run sparse, features (channels) come outermost. Aten's
layer norm copies such a tensor first; here every row is normalised as it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swatfx.ops.saved import in_layout, new_in_layout, no_double_backward
from swatfx.tensors import layouts

aten = torch.ops.aten


def features_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`F.layer_norm(x, x.shape[-1:], weight, bias, eps)`, and what backward wants.

    Args:
        x: (*rows, F), float32 or bfloat16, lying in "features_major" or "images_innermost".
        weight: (F,), or None.
        bias: likewise.
        eps: added to the variance.

    Returns:
        y: in x's layout.
        mean: float32, (rows,), in the order of rows of x's layout.
        rstd: likewise, one over the standard deviation.
    """
    layout = layouts.elementwise_layout_of(x)
    rows = layouts.images_behind(x, layout).contiguous()
    wide = [None if p is None else p.float() for p in (weight, bias)]
    y, mean, rstd = aten.native_layer_norm(rows.float(), list(x.shape[-1:]), *wide, eps)
    y = layouts.rows_back(y.to(x.dtype), layout)
    return in_layout(y, layout), mean.reshape(-1), rstd.reshape(-1)


features_norm = torch.library.custom_op(
    "swatfx::features_norm",
    features_norm_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
)


@features_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = new_in_layout(x.shape, layouts.elementwise_layout_of(x), x)
    rows = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


def features_norm_backward_reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::features_norm` for x, weight and bias; those not wanted: empty.

    Args:
        grad: of y, in any memory order.
        x: as forward had it; that gradient lies as it does.
        mean: as forward returned it.
        rstd: likewise.
        weight: as forward had it.
        wants: gradients for x, weight and bias.
    """
    layout, shape = layouts.elementwise_layout_of(x), list(x.shape[-1:])
    rows = layouts.images_behind(x, layout).contiguous().float()
    up = layouts.images_behind(grad, layout).contiguous().float()
    sizes = (*rows.shape[:-1], 1)
    wide = rows.new_ones(shape) if weight is None else weight.float()
    dx, dweight, dbias = aten.native_layer_norm_backward(
        up, rows, shape, mean.view(sizes), rstd.view(sizes), wide, wide, list(wants)
    )
    own = x.dtype if weight is None else weight.dtype
    return (
        in_layout(layouts.rows_back(dx.to(x.dtype), layout), layout) if wants[0] else _none(x),
        dweight.to(own) if wants[1] else _none(x),
        dbias.to(own) if wants[2] else _none(x),
    )


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0)


features_norm_backward = torch.library.custom_op(
    "swatfx::features_norm_backward",
    features_norm_backward_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, bool[] wants)"
    " -> (Tensor, Tensor, Tensor)",
)


@features_norm_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    features = x.new_empty(x.shape[-1:], dtype=x.dtype if weight is None else weight.dtype)
    return (
        new_in_layout(x.shape, layouts.elementwise_layout_of(x), x) if wants[0] else _none(x),
        torch.empty_like(features) if wants[1] else _none(x),
        torch.empty_like(features) if wants[2] else _none(x),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    ctx.layout = layouts.elementwise_layout_of(x)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], weight)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    wants = list(ctx.needs_input_grad[:3])
    x, *others = ctx.saved_tensors
    x = layouts.as_layout(x, ctx.layout)  # hooks may bring it back in another order than statistics
    grads = features_norm_backward(grad, x, *others, wants)
    return (*(g if want else None for g, want in zip(grads, wants, strict=True)), None)


features_norm.register_autograd(_backward, setup_context=_setup_context)
features_norm_backward.register_autograd(no_double_backward)
