"""`swatfx::max_pool2d` and its backward in C: csrc/pool.c and csrc/pool_backward.c.

Fast are float32 and bfloat16 tensors that are dense in their layout; all else runs the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swatfx.kernels import fitting, library
from swatfx.kernels.library import pointer, result
from swatfx.ops.calls import MaxPoolCall
from swatfx.ops.layout import converted
from swatfx.ops.pool import (
    MOST_CELLS,
    max_pool2d,
    max_pool2d_backward,
    max_pool2d_backward_reference,
    max_pool2d_reference,
)
from swatfx.ops.saved import new_in_layout
from swatfx.tensors import layouts


def _sizes(
    shape: Sequence[int], out: Sequence[int], layout: str, call: MaxPoolCall
) -> ctypes.Array[ctypes.c_int64]:
    """`pooling` of csrc/problems.h."""
    batch, channels = shape[:2]
    planes, inner = batch * channels, 1
    if layout == layouts.BATCH_INNERMOST:
        planes, inner = channels, batch
    elif layout == layouts.CHANNELS_LAST:
        planes, inner = batch, channels
    values = [planes, inner, *shape[2:], *out[2:], *call.kernel, *call.stride]
    values += [*call.padding, *call.dilation]
    return (ctypes.c_int64 * len(values))(*values)


def _fits(shape: Sequence[int], call: MaxPoolCall) -> bool:
    """Whether there is a window of as many cells as a byte counts, over images.

    Rows are parted by their columns modulo the stride: no step may be larger than such a window.
    """
    kernel, others = call.kernel, (call.stride, call.padding, call.dilation)
    if len(shape) != 4 or not fitting.are_pairs(kernel, *others):
        return False
    steps = max(abs(n) for pair in others for n in pair)
    return min(kernel) > 0 and kernel[0] * kernel[1] <= MOST_CELLS and steps <= MOST_CELLS


def _out_shape(shape: Sequence[int], call: MaxPoolCall) -> torch.Size:
    """Torch knows how many outputs there are, and what it takes for a mistake."""
    seen = torch.empty(tuple(shape), device="meta")
    out: Tensor = torch.ops.aten.max_pool2d_with_indices(seen, *call.for_aten)[0]
    return out.shape


@max_pool2d.register_kernel("cpu")
def _max_pool2d(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call, layout = MaxPoolCall(*options), layouts.layout_of(x)
    if (
        not library.available()
        or x.dtype not in library.ELEMENTS
        or x.numel() == 0
        or (layout == layouts.ROW_MAJOR and not x.is_contiguous())
        or not _fits(x.shape, call)
    ):
        return max_pool2d_reference(x, *options)
    out = _out_shape(x.shape, call)
    y = new_in_layout(out, layout, x)
    index = x.new_empty(y.numel() if call.saves else 0, dtype=torch.uint8)
    library.function("swatfx_max_pool", elements=x.dtype)(
        pointer(x),
        result(y),
        pointer(index),
        _sizes(x.shape, out, layout, call),
        library.threads(),
    )
    return y, index


@max_pool2d_backward.register_kernel("cpu")
def _max_pool2d_backward(
    grad: Tensor,
    index: Tensor,
    shape: Sequence[int],
    layout: str,
    *options: Any,
) -> Tensor:
    call = MaxPoolCall(*options)
    if (
        not library.available()
        or grad.dtype not in library.ELEMENTS
        or grad.numel() == 0
        or not _fits(shape, call)
        or not fitting.holds_bytes(index, grad.numel())
        or grad.shape != _out_shape(shape, call)
    ):
        return max_pool2d_backward_reference(grad, index, shape, layout, *options)
    grad = converted(grad, layout)
    dx = new_in_layout(shape, layout, grad)
    library.function("swatfx_max_pool_backward", elements=grad.dtype)(
        pointer(grad),
        pointer(index),
        result(dx),
        _sizes(shape, grad.shape, layout, call),
        library.threads(),
    )
    return dx
