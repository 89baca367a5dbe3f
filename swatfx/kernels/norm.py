"""`swatfx::batch_norm` and its backward in C: csrc/norm*.c.

Fast are float32 and bfloat16 activations in "batch_innermost", in row-major order where an image's
channel fills a vector, and in "channels_last" (or as a matrix) where the channels fill whole ones.
All else runs the reference.

Parameters and statistics are float32, as autocast has them, or with bfloat16 activations bfloat16:
C gets them as float32, computes with what it found, and rounds what the op returns of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swatfx.kernels import library
from swatfx.kernels.library import pointer, size
from swatfx.ops import codes as codes_of
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


def _are_vectors(channels: int, elements: torch.dtype, *parameters: Tensor | None) -> bool:
    """Whether all are one number a channel, of one dtype that torch takes to such `elements`."""
    given = [p for p in parameters if p is not None]
    dtypes = {p.dtype for p in given}
    known = len(dtypes) < 2 and dtypes <= {torch.float32, elements}
    return known and all(p.shape == (channels,) for p in given)


def _is_alike(x: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `x` is an activation of `shape` that C can read, or None."""
    known = dtype in library.ELEMENTS
    return x is None or (known and x.dtype is dtype and x.shape == torch.Size(shape))


def _for_c(vector: Tensor | None) -> Tensor | None:
    """One float32 a channel, in one piece."""
    return None if vector is None else vector.to(torch.float32).contiguous()


def _for_torch(found: Tensor | None, owner: Tensor | None, like: Tensor) -> Tensor:
    """What C wrote for `owner`, in its dtype; if it wrote nothing, no elements, as in `like`."""
    if found is None or owner is None:
        return like.new_empty(0)
    return found.to(owner.dtype)


@norm.batch_norm.register_kernel("cpu")
def _batch_norm(*given: Any) -> tuple[Tensor, ...]:
    x, residual, weight, bias, running_mean, running_var, *options = given
    call = NormCall(*options)
    layout = layouts.layout_of(x)
    extent = _Extent.of(x.shape, layout)
    given_parameters = (weight, bias, running_mean, running_var)
    if (
        not library.available()
        or extent is None
        or x.numel() == 0
        or (layout == layouts.ROW_MAJOR and not x.is_contiguous())
        or not _is_alike(x, x.shape, x.dtype)
        or not _is_alike(residual, x.shape, x.dtype)
        or not _are_vectors(extent.channels, x.dtype, *given_parameters)
        or (running_mean is None) != (running_var is None)
        # One value a channel has no variance, and no running statistics no eval mode: let aten say.
        or (call.training and extent.runs * extent.length == 1)
        or not (call.training or (running_mean is not None and running_var is not None))
    ):
        return norm.batch_norm_reference(*given)
    if residual is not None:
        residual = converted(residual, layout)
    y = new_in_layout(x.shape, layout, x)
    # Held by name until C has read them: a pointer keeps no tensor alive.
    parameters = [_for_c(p) for p in given_parameters]
    mean, invstd = (x.new_empty(extent.channels, dtype=torch.float32) for _ in range(2))
    new_mean, new_var = (
        torch.empty_like(p) if call.training and p is not None else None for p in parameters[2:]
    )
    bits, codes, header, code = _room(call, x, residual)
    library.function("swatfx_norm", elements=x.dtype)(
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
        ctypes.c_int(codes_of.BITS.get(call.saves, 0)),
        ctypes.c_uint32(codes_of.seed()),
        library.threads(),
    )
    dtype = norm.stats_dtype(x, weight, bias, running_mean, call.training)
    return (
        y,
        mean.to(dtype),
        invstd.to(dtype),
        _for_torch(new_mean, running_mean, x),
        _for_torch(new_var, running_var, x),
        code,
    )


def _room(
    call: NormCall, x: Tensor, residual: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(bits, codes, header, all of them as one): what `call.saves` asks for; views of the last."""
    mask = call.relu and call.saves != norm.NOTHING
    room = codes_of.Room.of(x.shape, call.saves) if call.saves in codes_of.BITS else None
    if room is not None:
        mask = call.relu and residual is not None
    elif residual is None and norm.recomputes(x, call.training):
        mask = False
    kept = 0 if room is None else room.total
    code = x.new_empty(kept + (bits_size(x.numel()) if mask else 0), dtype=torch.uint8)
    bits = code[kept:] if mask else None
    if room is None:
        return bits, None, None, code
    code[room.used : room.header] = 0
    return bits, code[room.header : kept], code[: room.header], code


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
        or not _is_alike(grad, shape, grad.dtype)
        or not _is_alike(x, shape, grad.dtype)
        or not _are_vectors(extent.channels, grad.dtype, weight, bias)
        or not _are_vectors(extent.channels, grad.dtype, mean, invstd)
        or mean is None  # what the dispatcher makes of None
        or invstd is None
        or code.data_ptr() % 4  # it begins with floats
        or not norm.is_complete(call, x, code, wants)
    ):
        return norm.batch_norm_backward_reference(*given)
    grad = converted(grad, layout)
    # What saved tensors went through on their way (hooks, the host) may have changed their order.
    x = None if x is None or call.saves in codes_of.BITS else converted(x, layout)
    header = codes = None
    bits = code = code.contiguous()
    if call.saves in codes_of.BITS:
        room = codes_of.Room.of(shape, call.saves)
        header, codes, bits = code.tensor_split((room.header, room.total))
    # Held by name until C has read them: a pointer keeps no tensor alive.
    statistics = [_for_c(p) for p in (weight, bias, mean, invstd)]
    dx, dresidual = (new_in_layout(shape, layout, grad) if w else None for w in wants[:2])
    dweight, dbias = (
        torch.empty_like(p, dtype=torch.float32) if wanted and p is not None else None
        for wanted, p in zip(wants[2:], (weight, bias), strict=True)
    )
    library.function("swatfx_norm_backward", elements=grad.dtype)(
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
        ctypes.c_int(codes_of.BITS.get(call.saves, 0)),
        library.threads(),
    )
    return (
        _for_torch(dx, grad, grad),
        _for_torch(dresidual, grad, grad),
        _for_torch(dweight, weight, grad),
        _for_torch(dbias, bias, grad),
    )
