"""`swatfx::batch_norm` and its backward in C: csrc/norm*.c.

Fast are float32 and bfloat16 activations in "batch_innermost", in row-major order where an image's
channel fills a vector, and in "channels_last" (or as a matrix) where the channels fill whole ones.
All else runs the reference.

Parameters and statistics are float32, as autocast has them, or with bfloat16 activations bfloat16:
C gets them as float32, computes with what it found, and rounds what the op returns of it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swatfx.kernels import library
from swatfx.kernels.library import pointer, result, size
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
    @functools.lru_cache(maxsize=4096)
    def of(shape: tuple[int, ...], layout: str) -> _Extent | None:
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

    def arguments(self) -> tuple[ctypes.c_int64, ...]:
        """As the C functions take it."""
        return tuple(size(n) for n in self)


class _Forward(NamedTuple):
    """A batch norm that C runs: what shapes, dtypes and options alone decide."""

    call: NormCall
    layout: str
    strides: tuple[int, ...]
    channels: int
    stats_dtype: torch.dtype
    sizes: tuple[Any, ...]
    flags: tuple[Any, ...]


_Looks = tuple[torch.Size, torch.dtype] | None  # of a tensor


def _looks(x: Tensor | None) -> _Looks:
    return None if x is None else (x.shape, x.dtype)


@functools.lru_cache(maxsize=4096)
def _forward(
    x: tuple[torch.Size, tuple[int, ...], torch.dtype],
    residual: _Looks,
    parameters: tuple[_Looks, ...],
    options: tuple[Any, ...],
) -> _Forward | None:
    """None if C cannot run it."""
    call, (shape, strides, dtype) = NormCall(*options), x
    layout = layouts.layout_of_strides(shape, strides)
    extent = _Extent.of(shape, layout)
    running_mean, running_var = parameters[2:]
    if (
        extent is None
        or dtype not in library.ELEMENTS
        or shape.numel() == 0
        or not layouts.is_dense(shape, strides, layout)
        or residual not in (None, (shape, dtype))
        or not _are_vectors(extent.channels, dtype, *parameters)
        or (running_mean is None) != (running_var is None)
        # One value a channel has no variance, and no running statistics no eval mode: let aten say.
        or (call.training and extent.runs * extent.length == 1)
        or not (call.training or (running_mean is not None and running_var is not None))
    ):
        return None
    flags = (
        ctypes.c_double(call.momentum),
        ctypes.c_double(call.eps),
        ctypes.c_int(call.training),
        ctypes.c_int(call.relu),
        ctypes.c_int(codes_of.BITS.get(call.saves, 0)),
    )
    one = torch.empty(0, dtype=dtype, device="cpu")
    weight, bias, mean, _ = (None if p is None else one.to(p[1]) for p in parameters)
    found = norm.stats_dtype(one, weight, bias, mean, call.training)
    plain = tuple(layouts.strides_of(shape, layout))
    return _Forward(call, layout, plain, extent.channels, found, extent.arguments(), flags)


def _are_vectors(channels: int, elements: torch.dtype, *parameters: _Looks) -> bool:
    """Whether all are one number a channel, of one dtype that torch takes to such `elements`."""
    given = [p for p in parameters if p is not None]
    dtypes = {dtype for _, dtype in given}
    known = len(dtypes) < 2 and dtypes <= {torch.float32, elements}
    return known and all(shape == (channels,) for shape, _ in given)


def _for_c(vector: Tensor | None) -> Tensor | None:
    """One float32 a channel, in one piece."""
    if vector is None or (vector.dtype is torch.float32 and vector.is_contiguous()):
        return vector
    return vector.to(torch.float32).contiguous()


def _for_torch(found: Tensor | None, owner: Tensor | None, like: Tensor) -> Tensor:
    """What C wrote for `owner`, in its dtype; if it wrote nothing, no elements, as in `like`."""
    if found is None or owner is None:
        return like.new_empty(0)
    return found if found.dtype is owner.dtype else found.to(owner.dtype)


@norm.batch_norm.register_kernel("cpu")
def _batch_norm(*given: Any) -> tuple[Tensor, ...]:
    x, residual, *rest = given
    given_parameters, options = rest[:4], tuple(rest[4:])
    looks = tuple([_looks(p) for p in given_parameters])
    told = (x.shape, x.stride(), x.dtype), _looks(residual), looks, options
    known = _forward(*told) if library.available() else None
    if known is None:
        return norm.batch_norm_reference(*given)
    call = known.call
    if residual is not None:
        residual = converted(residual, known.layout)
    y = torch.empty_strided(x.shape, known.strides, dtype=x.dtype, device=x.device)
    # Held by name until C has read them: a pointer keeps no tensor alive.
    parameters = [_for_c(p) for p in given_parameters]
    mean, invstd = (x.new_empty(known.channels, dtype=torch.float32) for _ in range(2))
    new_mean, new_var = (
        torch.empty_like(p) if call.training and p is not None else None for p in parameters[2:]
    )
    bits, codes, header, code = _room(call, x, residual)
    library.function("swatfx_norm", elements=x.dtype)(
        pointer(x),
        pointer(residual),
        *[pointer(p) for p in parameters],
        result(y),
        pointer(mean),
        pointer(invstd),
        pointer(new_mean),
        pointer(new_var),
        pointer(bits),
        pointer(codes),
        pointer(header),
        *known.sizes,
        *known.flags,
        ctypes.c_uint32(codes_of.seed()),
        library.threads(),
    )
    dtype = known.stats_dtype
    running_mean, running_var = given_parameters[2:]
    return (
        y,
        mean if dtype is torch.float32 else mean.to(dtype),
        invstd if dtype is torch.float32 else invstd.to(dtype),
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


@functools.lru_cache(maxsize=4096)
def _backward(
    shape: tuple[int, ...], layout: str, grad: _Looks, x: _Looks, parameters: tuple[_Looks, ...]
) -> tuple[Any, ...] | None:
    """The sizes that C is told; None if it cannot run the backward."""
    extent = _Extent.of(shape, layout)
    wide = grad is not None and grad[0] == shape and x in (None, grad)
    if extent is None or grad is None or not wide or grad[1] not in library.ELEMENTS:
        return None
    fits = all(_are_vectors(extent.channels, grad[1], *p) for p in (parameters[:2], parameters[2:]))
    # None for statistics is what the dispatcher makes of None.
    fits = fits and None not in parameters[2:] and torch.Size(shape).numel() > 0
    return extent.arguments() if fits else None


@norm.batch_norm_backward.register_kernel("cpu")
def _batch_norm_backward(*given: Any) -> tuple[Tensor, ...]:
    grad, x, code, weight, bias, mean, invstd, wants, *options = given
    call = NormBackwardCall(*options)
    shape, layout = call.shape, call.layout
    given_parameters = (weight, bias, mean, invstd)
    looks = tuple([_looks(p) for p in given_parameters])
    known = _backward(tuple(shape), layout, _looks(grad), _looks(x), looks)
    if (
        not library.available()
        or known is None
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
    statistics = [_for_c(p) for p in given_parameters]
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
        result(dx),
        result(dresidual),
        result(dweight),
        result(dbias),
        *known,
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
