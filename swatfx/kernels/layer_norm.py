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


def _fits(x: Tensor, *parameters: Tensor | None) -> bool:
    if not library.available() or x.dtype not in library.ELEMENTS or not x.numel():
        return False
    if layouts.elementwise_layout_of(x) not in layouts.FEATURES_OUTERMOST:
        return False
    given = [p for p in parameters if p is not None]
    return all(p.shape == x.shape[-1:] and p.dtype in library.ELEMENTS for p in given)


def _wide(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    features = x.shape[-1]
    return size(features), size(x.numel() // features)


@features_norm.register_kernel("cpu")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(x, weight, bias):
        return features_norm_reference(x, weight, bias, eps)
    y = new_in_layout(x.shape, layouts.elementwise_layout_of(x), x)
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
    if not (_fits(x, weight) and told and same):
        return features_norm_backward_reference(grad, x, mean, rstd, weight, wants)
    layout, none = layouts.elementwise_layout_of(x), x.new_empty(0)
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
        none if dx is None else dx,
        dweight.clone() if wants[1] else none,
        dbias.clone() if wants[2] else none.clone(),
    )
