"""Threshold search on CPUs: one pass over the tensor, which looks for NaN as well."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from swatfx.density import Density
from swatfx.kernels.groups import NAN_FROM, matrices, plain, rankable
from swatfx.kernels.library import function, pointer, size, threads
from swatfx.selectors import topk

# How far from the sample's k-th largest the interval reaches, in standard deviations of its rank:
# it misses once in ten thousand searches, which then take ten times as long.
_DEVIATIONS = 4.0
_NO_MEMORY = -2


@topk.fused_search.register_kernel
def _(x: Tensor, density: Density, shape: tuple[int, ...]) -> tuple[Tensor, bool] | None:
    if not rankable(x):
        return None
    found = matrices(x, shape)
    if found is None:
        x = x.contiguous()
        found = matrices(x, shape)
    k = density.count(found.rows) if found is not None else 0
    if found is None or not 0 < k < found.rows:
        return None
    out = torch.empty(found.blocks * found.columns, dtype=x.dtype)
    greatest = function("swatfx_kth", ctypes.c_int32)(
        pointer(x),
        x.element_size(),
        size(found.blocks),
        size(found.rows),
        size(found.columns),
        size(k),
        ctypes.c_double(_DEVIATIONS),
        pointer(out),
        threads(),
    )
    if greatest == _NO_MEMORY:
        raise MemoryError("the search for a threshold could not allocate its tables")
    return found.spread(out, shape), greatest >= NAN_FROM[x.dtype]


@topk.holds_nan.register_kernel
def _(x: Tensor) -> bool | None:
    if not rankable(x) or matrices(x, ()) is None:
        return None
    greatest = function("swatfx_greatest", ctypes.c_int32)(
        pointer(x), x.element_size(), size(x.numel()), threads()
    )
    found: bool = greatest >= NAN_FROM[x.dtype]
    return found


@topk.digit_counter.register_kernel
def _(scores: Tensor) -> topk.Counter | None:
    if scores.dtype is not torch.float32 or not plain(scores) or not scores.is_contiguous():
        return None

    def count(found: int, shift: int, width: int) -> Tensor:
        counts = torch.zeros(1 << width, dtype=torch.int64)
        function("swatfx_count_digit")(
            pointer(scores),
            size(scores.numel()),
            found >> shift + width,
            shift,
            width,
            pointer(counts),
            threads(),
        )
        return counts

    return count
