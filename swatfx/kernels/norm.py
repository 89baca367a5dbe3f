"""`swatfx::batch_norm` and its backward in C: csrc/norm*.c.

Fast are float32 activations in "batch_innermost", in row-major order where an image's channel fills
a vector, and in "channels_last" (or as a matrix) where the channels fill whole ones. All else runs
the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swatfx.kernels import fitting, library
from swatfx.kernels.library import pointer, size
from swatfx.ops import norm
from swatfx.ops.calls import NormBackwardCall, NormCall
from swatfx.ops.layout import converted
from swatfx.ops.saved import bits_size, new_in_layout
from swatfx.tensors import layouts

LANES = 16


class _Extent(NamedTuple):
    """Where the channels of an activation lie; `extent` in csrc/norm.h."""

    channels: int
    runs: int
    length: int
    run_step: int
    channel_step: int

    @staticmethod
    def of(shape: Sequence[int], layout: str) -> _Extent | None:
        """None where vectors would not be filled, or where there are no channels."""
        if len(shape) < 2:
            return None
        batch, channels = shape[:2]
        length = torch.Size(shape[2:]).numel()
        if layout == layouts.BATCH_INNERMOST and batch * length > 1:
            return _Extent(channels, 1, batch * length, 0, batch * length)
        if layout == layouts.CHANNELS_LAST or length == 1:
            whole = channels % LANES == 0
            return _Extent(channels, batch * length, 1, channels, 1) if whole else None
        if layout == layouts.ROW_MAJOR and length >= LANES:
            return _Extent(channels, batch, length, channels * length, length)
        return None

    def arguments(self) -> list[ctypes.c_int64]:
        """As the C functions take it."""
        return [size(n) for n in self]


def _are_vectors(channels: int, *parameters: Tensor | None) -> bool:
    """Whether C can read all: one float32 a channel."""
    return all(fitting.is_vector(p, channels) for p in parameters)


def _is_alike(x: Tensor | None, shape: Sequence[int]) -> bool:
    """Whether `x` is an activation of `shape` in float32, or None."""
    return x is None or (x.dtype is torch.float32 and x.shape == torch.Size(shape))


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@norm.batch_norm.register_kernel("cpu")
def _batch_norm(*given: Any) -> tuple[Tensor, ...]:
    x, residual, weight, bias, running_mean, running_var, *options = given
    call = NormCall(*options)
    layout = layouts.layout_of(x)
    extent = _Extent.of(x.shape, layout)
    parameters = [_dense(p) for p in (weight, bias, running_mean, running_var)]
    if (
        not library.available()
        or extent is None
        or x.numel() == 0
        or (layout == layouts.ROW_MAJOR and not x.is_contiguous())
        or not _is_alike(x, x.shape)
        or not _is_alike(residual, x.shape)
        or not _are_vectors(extent.channels, *parameters)
        or (running_mean is None) != (running_var is None)
        # One value a channel has no variance, and no running statistics no eval mode: let aten say.
        or (call.training and extent.runs * extent.length == 1)
        or not (call.training or (running_mean is not None and running_var is not None))
    ):
        return norm.batch_norm_reference(*given)
    if residual is not None:
        residual = converted(residual, layout)
    y = new_in_layout(x.shape, layout, x)
    mean, invstd = x.new_empty(extent.channels), x.new_empty(extent.channels)
    new_mean, new_var = (
        torch.empty_like(p) if call.training and p is not None else x.new_empty(0)
        for p in parameters[2:]
    )
    bits, codes, header, code = _room(call, x, residual)
    library.function("swatfx_norm")(
        pointer(x),
        pointer(residual),
        *[pointer(p) for p in parameters],
        pointer(y),
        pointer(mean),
        pointer(invstd),
        pointer(new_mean),
        pointer(new_var),
        pointer(bits),
        pointer(codes),
        pointer(header),
        *extent.arguments(),
        ctypes.c_double(call.momentum),
        ctypes.c_double(call.eps),
        ctypes.c_int(call.training),
        ctypes.c_int(call.relu),
        library.threads(),
    )
    return y, mean, invstd, new_mean, new_var, code


def _room(
    call: NormCall, x: Tensor, residual: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(bits, codes, header, all of them as one): what `call.saves` asks for; views of the last."""
    header = codes = 0
    mask = call.relu and call.saves != norm.NOTHING
    if call.saves == norm.INT8:
        header, codes = norm.int8_header(x.shape[1]), x.numel()
        mask = call.relu and residual is not None
    elif residual is None and norm.recomputes(x, call.training):
        mask = False
    total = header + codes + (bits_size(x.numel()) if mask else 0)
    code = x.new_empty(total, dtype=torch.uint8)
    code[12 * x.shape[1] : header] = 0
    return (
        code[header + codes :] if mask else None,
        code[header : header + codes] if codes else None,
        code[:header] if codes else None,
        code,
    )


@norm.batch_norm_backward.register_kernel("cpu")
def _batch_norm_backward(*given: Any) -> tuple[Tensor, ...]:
    grad, x, code, weight, bias, mean, invstd, wants, *options = given
    call = NormBackwardCall(*options)
    shape, layout = call.shape, call.layout
    extent = _Extent.of(shape, layout)
    elements = torch.Size(shape).numel()
    if (
        not library.available()
        or extent is None
        or elements == 0
        or not _is_alike(grad, shape)
        or not _is_alike(x, shape)
        or not _are_vectors(extent.channels, weight, bias, mean, invstd)
        or mean is None  # what the dispatcher makes of None
        or invstd is None
        or code.data_ptr() % 4  # it begins with floats
        or not norm.is_complete(call, x, code, wants)
    ):
        return norm.batch_norm_backward_reference(*given)
    grad = converted(grad, layout)
    # What saved tensors went through on their way (hooks, the host) may have changed their order.
    x = None if x is None or call.saves == norm.INT8 else converted(x, layout)
    header = codes = None
    bits = code = code.contiguous()
    if call.saves == norm.INT8:
        start = norm.int8_header(extent.channels)
        header, codes = code[:start], code[start : start + elements]
        bits = code[start + elements :]
    given = (None, None, weight, bias)
    # Held by name until C has read them: a pointer keeps no tensor alive.
    statistics = [_dense(p) for p in (weight, bias, mean, invstd)]
    room = [
        new_in_layout(shape, layout, grad) if wanted and i < 2 else grad.new_empty(0)
        for i, wanted in enumerate(wants)
    ]
    for i in (2, 3):
        parameter = given[i]
        if wants[i] and parameter is not None:
            room[i] = torch.empty_like(parameter)
    dx, dresidual, dweight, dbias = room
    library.function("swatfx_norm_backward")(
        pointer(grad),
        pointer(x),
        *[pointer(p) for p in statistics],
        pointer(bits if bits.numel() else None),
        pointer(codes),
        pointer(header),
        pointer(dx),
        pointer(dresidual),
        pointer(dweight),
        pointer(dbias),
        *extent.arguments(),
        ctypes.c_int(call.training),
        ctypes.c_int(call.relu),
        library.threads(),
    )
    return dx, dresidual, dweight, dbias
