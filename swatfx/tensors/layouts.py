"""Memory orders of an activation, by name.

A layout says in what order a tensor's elements lie; shapes stay (N, C, *spatial) whatever it is.
"batch_innermost" is (C, *spatial, N) in memory: the order in which the sparse kernels of
`swatfx.kernels` run, an image a vector lane, and in which a channel is one contiguous run.
"features_major" is the same of what linear layers see, (*rows, F): (F, *rows) in memory; and
"images_innermost", of (N, *rows, F), is (F, *rows, N): "batch_innermost" with channels put last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROW_MAJOR = "row_major"
CHANNELS_LAST = "channels_last"
BATCH_INNERMOST = "batch_innermost"
FEATURES_MAJOR = "features_major"
IMAGES_INNERMOST = "images_innermost"
FEATURES_OUTERMOST = (FEATURES_MAJOR, IMAGES_INNERMOST)
_LINE = 32  # elements of two bytes in a cache line
_INNERMOST = {BATCH_INNERMOST: 0, CHANNELS_LAST: 1}  # dimension


def layout_of(x: Tensor) -> str:
    """The layout of `x`: row-major if in doubt, also for what is dense in no known order."""
    if type(x) in _KNOWN_SIZES and not torch.compiler.is_compiling():
        return layout_of_strides(x.shape, x.stride())
    if x.dim() < 3 or x.is_contiguous():
        return ROW_MAJOR
    if x.dim() > 3 and x.movedim(1, -1).is_contiguous():
        return CHANNELS_LAST
    return BATCH_INNERMOST if x.movedim(0, -1).is_contiguous() else ROW_MAJOR


def elementwise_layout_of(x: Tensor) -> str:
    """`layout_of`, and those of linear layers: for what asks only in which order elements lie."""
    found = layout_of(x)
    if found != ROW_MAJOR or x.is_contiguous():
        return found
    return next((layout for layout in FEATURES_OUTERMOST if lies_in(x, layout)), ROW_MAJOR)


def features_first(x: Tensor, layout: str) -> Tensor:
    """A view of `x` (*rows, F), of shape (F, *rows) in the order of rows of `layout`."""
    return images_behind(x, layout).movedim(-1, 0)


def features_last(x: Tensor, layout: str) -> Tensor:
    """Inverse of `features_first`."""
    return rows_back(x.movedim(0, -1), layout)


def images_behind(x: Tensor, layout: str) -> Tensor:
    """A view of `x` (N, *rows, F) whose rows come in the order of `layout`."""
    return x.movedim(0, -2) if layout == IMAGES_INNERMOST and x.dim() > 2 else x


def rows_back(x: Tensor, layout: str) -> Tensor:
    """Inverse of `images_behind`."""
    return x.movedim(-2, 0) if layout == IMAGES_INNERMOST and x.dim() > 2 else x


def between_linear(shape: Sequence[int], layout: str) -> str:
    """What tensors of `shape` between sparse linear layers lie in, if they may lie in `layout`.

    Row-major after all, where a feature's rows are no whole number of cache lines: products of such
    take twice the time, and a copy with room between the features would be made at each. So it is
    where a trace leaves the number of rows open, which it still does then.
    """
    rows = math.prod(shape[:-1]) if shape else 0
    if isinstance(rows, torch.SymInt) or torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        whole = statically_known_true(rows % _LINE == 0) and not statically_known_true(rows == 0)
    else:
        whole = rows > 0 and rows % _LINE == 0
    return layout if whole else ROW_MAJOR


def of_each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of single elements of `x`, lying as `x` does.

    Torch's vectorised GELU takes contiguous tensors alone: where features lie outermost it gets a
    view that is one, which saves half the time.
    """
    layout = elementwise_layout_of(x)
    if layout in FEATURES_OUTERMOST:
        return features_last(function(features_first(x, layout)), layout)
    return function(x)


def lies_in(x: Tensor, layout: str) -> bool:
    """Whether `x` is dense in `layout`; it may be so in others as well."""
    if layout in FEATURES_OUTERMOST:
        return features_first(x, layout).is_contiguous() if x.dim() else True
    axis = _INNERMOST.get(layout)
    if axis is None:
        return x.is_contiguous()
    if type(x) in _KNOWN_SIZES and not torch.compiler.is_compiling():
        return _is_dense(x.shape, x.stride(), axis)
    return x.movedim(axis, -1).is_contiguous()


# Of these, sizes are numbers and can be looked up: the two above are asked many times a layer.
_KNOWN_SIZES = (Tensor, torch.nn.Parameter)


@functools.lru_cache(maxsize=4096)
def layout_of_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
    """`layout_of` a tensor with such sizes."""
    if len(shape) < 3 or _is_dense(shape, strides, None):
        return ROW_MAJOR
    if len(shape) > 3 and _is_dense(shape, strides, 1):
        return CHANNELS_LAST
    return BATCH_INNERMOST if _is_dense(shape, strides, 0) else ROW_MAJOR


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...], layout: str) -> bool:
    """`lies_in` of a tensor with such sizes."""
    return _is_dense(shape, strides, _INNERMOST.get(layout))


@functools.lru_cache(maxsize=4096)
def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...], innermost: int | None) -> bool:
    """Whether the elements have no gaps, in row-major order but for one dimension."""
    order = [d for d in range(len(shape)) if d != innermost]
    order += [] if innermost is None else [innermost]
    expected = 1
    for d in reversed(order):
        if shape[d] != 1:
            if strides[d] != expected:
                return 0 in shape
            expected *= shape[d]
    return True


def as_layout(x: Tensor, layout: str) -> Tensor:
    """`x` in `layout`; `x` itself where it is so already."""
    if layout in FEATURES_OUTERMOST:
        return features_last(features_first(x, layout).contiguous(), layout) if x.dim() else x
    if layout == BATCH_INNERMOST:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == CHANNELS_LAST:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def order_of(x: Tensor) -> list[int] | None:
    """Dimensions of `x` from the outermost in memory inwards; None if row-major, or not dense."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
    return order if x.permute(order).is_contiguous() else None


def in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """`x` with its dimensions in memory as `order_of` tells them."""
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(tuple(order)).contiguous().permute(back)


def with_plain_strides(x: Tensor) -> Tensor:
    """`x` with the strides of a new tensor in its layout, also where a dimension is of size 1."""
    for layout in (ROW_MAJOR, CHANNELS_LAST):
        if lies_in(x, layout):
            return x.as_strided(x.shape, strides_of(x.shape, layout))
    return x.contiguous()


def strides_of(shape: Sequence[int], layout: str) -> list[int]:
    """Strides of a dense tensor of `shape` in `layout`; those of row-major where that is the same.

    (Strides of dimensions of size 1 mean nothing, but torch refuses writes by them.)
    """
    order = list(range(len(shape)))  # dimensions, the outermost first
    if layout == BATCH_INNERMOST and 1 not in (shape[0], math.prod(shape[1:])):
        order = [*order[1:], 0]
    elif layout == CHANNELS_LAST:
        order = [0, *order[2:], 1]
    elif layout in FEATURES_OUTERMOST and order:
        *rows, features = order
        if layout == IMAGES_INNERMOST and rows and 1 not in (shape[0], math.prod(shape[1:-1])):
            rows = [*rows[1:], 0]
        plain = 1 in (shape[-1], math.prod(shape[:-1]))
        order = [*rows, features] if plain else [features, *rows]
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = step
        step *= shape[d]
    return strides


def empty(
    shape: Sequence[int], layout: str, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """An uninitialised tensor of `shape` in `layout`; no view, so that an op may return it."""
    return torch.empty_strided(tuple(shape), strides_of(shape, layout), dtype=dtype, device=device)


def flat_view(x: Tensor, layout: str) -> Tensor:
    """`x` as a vector in the order of `layout`; a view where `x` lies so."""
    if layout == CHANNELS_LAST:
        return x.movedim(1, -1).reshape(-1)
    if layout == BATCH_INNERMOST:
        return x.movedim(0, -1).reshape(-1)
    if layout in FEATURES_OUTERMOST and x.dim():
        return features_first(x, layout).reshape(-1)
    return x.reshape(-1)


def from_flat(flat: Tensor, shape: Sequence[int], layout: str) -> Tensor:
    """Inverse of `flat_view`, without a copy."""
    if layout == CHANNELS_LAST:
        return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    if layout == BATCH_INNERMOST:
        return flat.view(*shape[1:], shape[0]).movedim(-1, 0)
    if layout in FEATURES_OUTERMOST and shape:
        rows = list(shape[:-1])
        if layout == IMAGES_INNERMOST and len(rows) > 1:
            rows = [*rows[1:], rows[0]]
        return features_last(flat.view(shape[-1], *rows), layout)
    return flat.view(tuple(shape))
