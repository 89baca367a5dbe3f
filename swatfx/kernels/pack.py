"""`swatfx::pack`, unpacking, masks and Top-K as a dense tensor, on CPUs.

Kernels move values of 4 and of 2 bytes and convert none: where packed values are of another dtype,
torch converts the few that are kept.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from swatfx import selectors
from swatfx.kernels import fitting
from swatfx.kernels.groups import NAN_FROM, matrices, plain, rankable
from swatfx.kernels.library import function, pointer, real, result, size, threads
from swatfx.ops.layout import converted, to_layout
from swatfx.ops.pack import counted_in, pack, pack_reference, shape_of
from swatfx.ops.where import kept_top
from swatfx.selectors import Axes, BlockNorm, BlockSelector
from swatfx.tensors import bits, layouts


class BlockProblem(ctypes.Structure):
    """A weight by blocks; `block_problem` in csrc/problems.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "filters channels taps filter_stride channel_stride tap_stride"
            " block_filters block_channels threads"
        ).split()
    ]


@pack.register_kernel("cpu")
def _(
    x: Tensor, threshold: Tensor, spatial: int, selector: str, dtype: torch.dtype, layout: str = ""
) -> Tensor:
    chosen = selectors.get(selector)
    shape = chosen.state_shape(tuple(x.shape), Axes.of(x.dim(), spatial, False))
    fits = chosen.ranks_magnitudes and rankable(x, threshold)
    if fits and threshold.dtype is torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
        threshold = _least_at(threshold, x.dtype)
    if fits and threshold.dtype == x.dtype and threshold.shape == shape:
        packed = _pack_top(x, threshold, dtype, layout or counted_in(x, spatial))
        if packed is not None:
            return packed
    return pack_reference(x, threshold, spatial, selector, dtype, layout)


def _least_at(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The least of `dtype` that is not below the threshold: as many elements reach the one as do
    the other. Under autocast activations are narrower than the state of the model.
    """
    near = threshold.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < threshold, above, near)


@functools.cache
def _staging(team: int) -> type[ctypes.Array[ctypes.c_int64]]:
    """Two numbers a thread: `staging` of csrc/exports.h."""
    return ctypes.c_int64 * (2 * team)


def _pack_top(x: Tensor, threshold: Tensor, dtype: torch.dtype, layout: str) -> Tensor | None:
    if layout in layouts.FEATURES_OUTERMOST:
        x = converted(x, layout)
    elif layouts.layout_of(x) != layout:
        x = to_layout(x, layout)
    elif layout == layouts.ROW_MAJOR:
        x = x.contiguous()  # what lies in no known order counts as row-major
    groups = matrices(x, threshold.shape)
    if groups is None:
        return None
    mask = torch.empty(bits.header_bytes(x.numel()), dtype=torch.uint8)
    # As large as x, but only as much of it is ever touched as is kept.
    staged = torch.empty(x.numel(), dtype=x.dtype)
    team = torch.get_num_threads()
    parts = _staging(team)()
    bounds = groups.gather(threshold)
    count = function("swatfx_pack_top", ctypes.c_int64)(
        pointer(x),
        x.element_size(),
        size(x.numel()),
        pointer(bounds),
        NAN_FROM[x.dtype],
        size(groups.rows),
        size(groups.columns),
        result(mask),
        result(staged),
        parts,
        team,
    )
    if count < 0:
        raise MemoryError("packing an activation could not allocate its tables")
    header = mask.numel()
    out = torch.empty(shape_of(layout, header + count * dtype.itemsize), dtype=torch.uint8)
    ctypes.memmove(out.data_ptr(), mask.data_ptr(), header)
    converts = dtype != x.dtype
    kept = torch.empty(count, dtype=x.dtype) if converts else None
    values = result(out, header) if kept is None else result(kept)
    function("swatfx_pack_join")(result(staged), x.element_size(), parts, values, team)
    if kept is not None and count:
        out.view(-1)[header:].view(dtype).copy_(kept)
    return out


def _room(mask: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A packed tensor with its mask, and the place for its `count` values."""
    header = mask.numel()
    out = torch.empty(header + count * dtype.itemsize, dtype=torch.uint8)
    out[:header] = mask
    return out, out[header:].view(dtype) if count else torch.empty(0, dtype=dtype)


@bits.pack.register_kernel
def _(x: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor | None:
    if not rankable(x) or not plain(keep) or keep.dtype is not torch.bool:
        return None
    if x.dim() != 1 or keep.shape != x.shape:
        return None
    x, keep, elements = x.contiguous(), keep.contiguous(), x.numel()
    mask = torch.zeros(bits.header_bytes(elements), dtype=torch.uint8)
    count = _mask_to_bits(keep, mask)
    out, values = _room(mask, count, dtype)
    kept = values if dtype == x.dtype else torch.empty(count, dtype=x.dtype)
    found = function("swatfx_gather", ctypes.c_int64)(
        pointer(x),
        x.element_size(),
        size(elements),
        pointer(mask),
        pointer(kept),
        size(count),
        threads(),
    )
    if found != count:  # no memory, or a mask whose bytes are not all 0 or 1
        return None
    if kept is not values:
        values.copy_(kept)
    return out


@bits.unpack.register_kernel
def _(packed: Tensor, elements: int, dtype: torch.dtype) -> Tensor | None:
    if dtype not in NAN_FROM or elements <= 0 or not plain(packed) or packed.dim() != 1:
        return None
    header = bits.header_bytes(elements)
    count = fitting.packed_values(packed, elements, dtype, layouts.ROW_MAJOR)
    if count is None:
        return None
    out = torch.empty(elements, dtype=dtype)
    found = function("swatfx_scatter", ctypes.c_int64)(
        pointer(out),
        dtype.itemsize,
        size(elements),
        pointer(packed),
        pointer(packed, header),
        size(count),
        threads(),
    )
    return out if found == count else None  # else it was packed otherwise: torch says what is wrong


def _mask_to_bits(mask: Tensor, out: Tensor) -> int:
    """Write the bits of `mask`, contiguous, to the beginning of `out`; how many are set."""
    found: int = function("swatfx_bits_of_mask", ctypes.c_int64)(
        pointer(mask), size(mask.numel()), pointer(out), threads()
    )
    return found


@bits.mask_to_bits.register_kernel
def _(mask: Tensor) -> Tensor | None:
    if mask.dtype is not torch.bool or not plain(mask):
        return None
    out = torch.empty((mask.numel() + 7) // 8, dtype=torch.uint8)
    _mask_to_bits(mask.contiguous(), out)
    return out


@bits.bits_to_mask.register_kernel
def _(bits: Tensor, elements: int) -> Tensor | None:
    if bits.dtype is not torch.uint8 or bits.shape != ((elements + 7) // 8,) or not plain(bits):
        return None
    out = torch.empty(elements, dtype=torch.bool)
    bits = bits.contiguous()
    function("swatfx_mask_of_bits")(pointer(bits), size(elements), pointer(out), threads())
    return out


@kept_top.register_kernel
def _(x: Tensor, state: Tensor, selector: str, axes: Axes) -> Tensor | None:
    chosen = selectors.get(selector)
    if not rankable(x) or not plain(state):
        return None
    if chosen.holds_mask:
        return _kept_by_mask(x, state)
    if isinstance(chosen, BlockSelector):
        return _kept_blocks(x, state, chosen.score)
    fits = chosen.ranks_magnitudes and not state.dim() and state.dtype == x.dtype
    if not fits or matrices(x, ()) is None:
        return None
    out = torch.empty_like(x)
    function("swatfx_keep_top")(
        pointer(x),
        x.element_size(),
        size(x.numel()),
        pointer(state),
        NAN_FROM[x.dtype],
        pointer(out),
        threads(),
    )
    return out


def _kept_by_mask(x: Tensor, state: Tensor) -> Tensor | None:
    """Where the bits of `state`, of `x` in row-major order, are set."""
    read = state[: (x.numel() + 7) // 8]
    if not x.is_contiguous() or not fitting.holds_bytes(read, (x.numel() + 7) // 8):
        return None
    out = torch.empty_like(x)
    function("swatfx_keep_bits")(
        pointer(x), x.element_size(), size(x.numel()), pointer(read), pointer(out), threads()
    )
    return out


def _kept_blocks(x: Tensor, state: Tensor, norm: BlockNorm) -> Tensor | None:
    """Where the norm of the block, at one place of the kernel, is not below the threshold."""
    if x.dtype is not torch.float32 or not fitting.is_number(state):
        return None
    out = torch.empty_like(x)
    channels, taps = x.shape[1], x.shape[2:].numel()
    if x.is_contiguous():
        order = (channels * taps, taps, 1)
    elif x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        order = (channels * taps, 1, channels)
    else:
        return None
    if norm.channels == 1:  # then nothing tells channels from places of the kernel
        channels, taps, order = 1, channels * taps, (channels * taps, 1, 1)
    sizes = (x.shape[0], channels, taps, *order, norm.filters, norm.channels)
    problem = BlockProblem(*sizes, torch.get_num_threads())
    function("swatfx_keep_blocks")(
        ctypes.byref(problem), pointer(x), real(float(state)), pointer(out)
    )
    return out
