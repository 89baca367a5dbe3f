"""`swatfx::batch_norm` and its backward in C: csrc/norm*.c.

Fast are float32 and bfloat16 activations in "batch_innermost", in row-major order where an image's
channel fills a vector, and in "channels_last" (or as a matrix) where the channels fill whole ones.
All else runs the reference.

Parameters and statistics are float32, as autocast has them, or with bfloat16 activations bfloat16:
C gets them as float32, computes with what it found, and rounds what the op returns of it.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swatfx.kernels import library
from swatfx.kernels.library import address, made
from swatfx.ops import codes as codes_of
from swatfx.ops import norm
from swatfx.ops.calls import NormBackwardCall, NormCall
from swatfx.ops.layout import converted
from swatfx.ops.saved import bits_size
from swatfx.tensors import layouts

LANES = 16
# `norm_problem` and `norm_backward_problem` of csrc/problems.h: what is another at every call, and
# behind it what shapes and options decide.
_TENSORS = struct.Struct("@14P2q").pack
_GRADIENTS = struct.Struct("@13Pq").pack
_SIZES = struct.Struct("@8q").pack


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


class _Kept(NamedTuple):
    """Where in the bytes for backward stands what: bytes from the beginning."""

    used: int  # of the codes' header, those that are no padding
    header: int
    codes: int  # their end; none where there is no header
    total: int  # with the bits behind them, if there are more

    @staticmethod
    def of(call: NormCall, shape: torch.Size, has_residual: bool, recomputes: bool) -> _Kept:
        """What `call.saves` asks for; `recomputes` as in `swatfx.ops.norm`."""
        room = codes_of.Room.of(shape, call.saves) if call.saves in codes_of.BITS else None
        mask = call.relu and call.saves != norm.NOTHING
        if not has_residual and (room is not None or recomputes):
            mask = False
        used, header, total = (0, 0, 0) if room is None else (room.used, room.header, room.total)
        return _Kept(used, header, total, total + (bits_size(shape.numel()) if mask else 0))

    def new(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """(bits, codes, header, all of them as one): views of the last, or None."""
        code = torch.empty(self.total, dtype=torch.uint8, device="cpu")
        bits = code[self.codes :] if self.total > self.codes else None
        if not self.header:
            return bits, None, None, code
        code[self.used : self.header] = 0
        return bits, code[self.header : self.codes], code[: self.header], code


class _Forward(NamedTuple):
    """A batch norm that C runs: what shapes, dtypes and options alone decide."""

    layout: str
    strides: tuple[int, ...]
    channels: int
    stats_dtype: torch.dtype
    moves: bool  # running statistics
    room: _Kept
    sizes: bytes  # the rest of `norm_problem`


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
    flags = call.training, call.relu, codes_of.BITS.get(call.saves, 0)
    sizes = _SIZES(*extent, *flags) + struct.pack("@2d", call.momentum, call.eps)
    one = torch.empty(0, dtype=dtype, device="cpu")
    weight, bias, mean, _ = (None if p is None else one.to(p[1]) for p in parameters)
    found = norm.stats_dtype(one, weight, bias, mean, call.training)
    room = _Kept.of(call, shape, residual is not None, norm.recomputes(one, call.training))
    plain = tuple(layouts.strides_of(shape, layout))
    moves = call.training and running_mean is not None
    return _Forward(layout, plain, extent.channels, found, moves, room, sizes)


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
    if residual is not None:
        residual = converted(residual, known.layout)
    y = torch.empty_strided(x.shape, known.strides, dtype=x.dtype, device=x.device)
    # Held by name until C has read them: an address keeps no tensor alive.
    parameters = [_for_c(p) for p in given_parameters]
    mean = torch.empty(known.channels, dtype=torch.float32, device="cpu")
    invstd = torch.empty_like(mean)
    new_mean = new_var = None
    if known.moves:
        new_mean, new_var = torch.empty_like(mean), torch.empty_like(mean)
    bits, codes, header, code = known.room.new()
    library.function("swatfx_norm", elements=x.dtype)(
        _TENSORS(
            address(x),
            address(residual),
            *[address(p) for p in parameters],
            made(y),
            made(mean),
            made(invstd),
            made(new_mean),
            made(new_var),
            made(bits),
            made(codes),
            made(header),
            codes_of.seed(),
            torch.get_num_threads(),
        )
        + known.sizes
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


class _Backward(NamedTuple):
    """A backward that C runs: what shapes, dtypes and options alone decide."""

    call: NormBackwardCall
    strides: tuple[int, ...]
    sizes: bytes


@functools.lru_cache(maxsize=4096)
def _backward(
    grad: _Looks, x: _Looks, parameters: tuple[_Looks, ...], options: tuple[Any, ...]
) -> _Backward | None:
    """None if C cannot run it."""
    call = NormBackwardCall(*options)
    shape, layout = call.shape, call.layout
    extent = _Extent.of(shape, layout)
    wide = grad is not None and grad[0] == shape and x in (None, grad)
    if extent is None or grad is None or not wide or grad[1] not in library.ELEMENTS:
        return None
    fits = all(_are_vectors(extent.channels, grad[1], *p) for p in (parameters[:2], parameters[2:]))
    # None for statistics is what the dispatcher makes of None.
    fits = fits and None not in parameters[2:] and torch.Size(shape).numel() > 0
    if not fits:
        return None
    flags = call.training, call.relu, codes_of.BITS.get(call.saves, 0)
    strides = tuple(layouts.strides_of(shape, layout))
    return _Backward(call, strides, _SIZES(*extent, *flags))


@norm.batch_norm_backward.register_kernel("cpu")
def _batch_norm_backward(*given: Any) -> tuple[Tensor, ...]:
    grad, x, code, weight, bias, mean, invstd, wants, shape, *options = given
    given_parameters = (weight, bias, mean, invstd)
    looks = tuple([_looks(p) for p in given_parameters])
    known = _backward(_looks(grad), _looks(x), looks, (tuple(shape), *options))
    if (
        not library.available()
        or known is None
        or code.data_ptr() % 4  # it begins with floats
        or not norm.is_complete(known.call, x, code, wants)
    ):
        return norm.batch_norm_backward_reference(*given)
    call = known.call
    grad = converted(grad, call.layout)
    # What saved tensors went through on their way (hooks, the host) may have changed their order.
    x = None if x is None or call.saves in codes_of.BITS else converted(x, call.layout)
    header = codes = None
    bits = code = code.contiguous()
    if call.saves in codes_of.BITS:
        room = codes_of.Room.of(shape, call.saves)
        header, codes, bits = code.tensor_split((room.header, room.total))
    # Held by name until C has read them: an address keeps no tensor alive.
    statistics = [_for_c(p) for p in given_parameters]
    dx, dresidual = (
        torch.empty_strided(call.shape, known.strides, dtype=grad.dtype, device="cpu")
        if wanted
        else None
        for wanted in wants[:2]
    )
    dweight, dbias = (
        torch.empty_like(p, dtype=torch.float32) if wanted and p is not None else None
        for wanted, p in zip(wants[2:], (weight, bias), strict=True)
    )
    library.function("swatfx_norm_backward", elements=grad.dtype)(
        _GRADIENTS(
            address(grad),
            address(x),
            *[address(p) for p in statistics],
            address(bits if bits.numel() else None),
            address(codes),
            address(header),
            made(dx),
            made(dresidual),
            made(dweight),
            made(dbias),
            torch.get_num_threads(),
        )
        + known.sizes
    )
    return (
        _for_torch(dx, grad, grad),
        _for_torch(dresidual, grad, grad),
        _for_torch(dweight, weight, grad),
        _for_torch(dbias, bias, grad),
    )
