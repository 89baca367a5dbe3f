"""`swatfx::features_norm` and its backward in C: csrc/layer_norm.c.

Fast are float32 and bfloat16 activations with parameters of float32, or of their own dtype.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from swatfx.kernels import library
from swatfx.kernels.library import pointer, result, size
from swatfx.ops.features_norm import (
    features_norm,
    features_norm_backward,
    features_norm_backward_reference,
    features_norm_reference,
)
from swatfx.ops.layout import converted
from swatfx.ops.saved import new_in_layout
from swatfx.tensors import layouts


def _layout(x: Tensor, *parameters: Tensor | None) -> str | None:
    """That of `x`; None if C cannot run it."""
    if not library.available() or x.dtype not in library.ELEMENTS or not x.numel():
        return None
    layout = layouts.elementwise_layout_of(x)
    given = [p for p in parameters if p is not None]
    known = all(p.shape == x.shape[-1:] and p.dtype in library.ELEMENTS for p in given)
    return layout if known and layout in layouts.FEATURES_OUTERMOST else None


def _wide(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    features = x.shape[-1]
    return size(features), size(x.numel() // features)


@features_norm.register_kernel("cpu")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(x, weight, bias)
    if layout is None:
        return features_norm_reference(x, weight, bias, eps)
    y = new_in_layout(x.shape, layout, x)
    mean, rstd = (torch.empty(x.numel() // x.shape[-1]) for _ in range(2))
    scale, shift = _wide(weight), _wide(bias)
    library.function("swatfx_layer_norm", elements=x.dtype)(
        pointer(x),
        pointer(scale),
        pointer(shift),
        result(y),
        result(mean),
        result(rstd),
        *_sizes(x),
        ctypes.c_double(eps),
        library.threads(),
    )
    return y, mean, rstd


@features_norm_backward.register_kernel("cpu")
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (x.numel() // x.shape[-1],) if x.numel() else ()
    told = all(s.shape == rows and s.dtype is torch.float32 for s in (mean, rstd))
    same = grad.shape == x.shape and grad.dtype is x.dtype
    layout = _layout(x, weight)
    if layout is None or not (told and same):
        return features_norm_backward_reference(grad, x, mean, rstd, weight, wants)
    grad, scale = converted(grad, layout), _wide(weight)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    dx = new_in_layout(x.shape, layout, x) if wants[0] else None
    gains = torch.empty(2, torch.get_num_threads(), x.shape[-1], dtype=torch.float64)
    library.function("swatfx_layer_norm_backward", elements=x.dtype)(
        pointer(grad),
        pointer(x),
        pointer(scale),
        pointer(mean),
        pointer(rstd),
        result(dx),
        pointer(gains[0]),
        pointer(gains[1]),
        *_sizes(x),
        library.threads(),
    )
    dweight, dbias = gains.sum(1).to(x.dtype if weight is None else weight.dtype)
    return (
        x.new_empty(0) if dx is None else dx,
        dweight.clone() if wants[1] else x.new_empty(0),
        dbias.clone() if wants[2] else x.new_empty(0),
    )
