"""`swatfx::to_layout` in C: csrc/layout.c.

Fast from each layout to each, in float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swatfx.kernels import library
from swatfx.kernels.library import pointer, result, size
from swatfx.ops.layout import to_layout, to_layout_reference
from swatfx.ops.saved import new_in_layout
from swatfx.tensors import layouts
from swatfx.tensors.layouts import (
    BATCH_INNERMOST,
    CHANNELS_LAST,
    FEATURES_MAJOR,
    FEATURES_OUTERMOST,
    ROW_MAJOR,
)

# A batch of transpositions for n images of c channels of s positions: matrices, rows, columns, then
# the steps between rows and between matrices, in the input and in the output.
_TRANSPOSITIONS: dict[tuple[str, str], Callable[[int, int, int], tuple[int, ...]]] = {
    (ROW_MAJOR, BATCH_INNERMOST): lambda n, c, s: (1, n, c * s, c * s, n, 0, 0),
    (BATCH_INNERMOST, ROW_MAJOR): lambda n, c, s: (1, c * s, n, n, c * s, 0, 0),
    (CHANNELS_LAST, BATCH_INNERMOST): lambda n, c, s: (s, n, c, s * c, s * n, c, n),
    (BATCH_INNERMOST, CHANNELS_LAST): lambda n, c, s: (s, c, n, s * n, s * c, n, c),
    (ROW_MAJOR, CHANNELS_LAST): lambda n, c, s: (n, c, s, s, c, c * s, c * s),
    (CHANNELS_LAST, ROW_MAJOR): lambda n, c, s: (n, s, c, c, s, c * s, c * s),
}


@to_layout.register_kernel("cpu")
def _to_layout(x: Tensor, layout: str) -> Tensor:
    if layout in FEATURES_OUTERMOST:
        return _to_features_outermost(x, layout)
    found = layouts.layout_of(x)
    if (
        not library.available()
        or x.dtype not in library.ELEMENTS
        or x.dim() < 2
        or (found, layout) not in _TRANSPOSITIONS
        or (found == ROW_MAJOR and not x.is_contiguous())
    ):
        return to_layout_reference(x, layout)
    y = new_in_layout(x.shape, layout, x)
    positions = torch.Size(x.shape[2:]).numel()
    sizes = _TRANSPOSITIONS[found, layout](x.shape[0], x.shape[1], positions)
    library.function("swatfx_transpose", elements=x.dtype)(
        pointer(x), result(y), *[size(n) for n in sizes], library.threads()
    )
    return y


def _to_features_outermost(x: Tensor, layout: str) -> Tensor:
    known = library.available() and x.dtype in library.ELEMENTS
    if not known or x.dim() < 2 or not x.is_contiguous() or layout != FEATURES_MAJOR:
        return to_layout_reference(x, layout)
    y = new_in_layout(x.shape, FEATURES_MAJOR, x)
    if x.numel():
        features = x.shape[-1]
        rows = x.numel() // features
        transpose_into(x.view(rows, features), y.movedim(-1, 0).view(features, rows))
    return y


def transpose_into(x: Tensor, y: Tensor) -> None:
    """Write the transpose of matrix `x` to matrix `y`.

    Args:
        x: of a dtype of `library.ELEMENTS`, its rows in one piece each.
        y: likewise, made by the caller; rows of either may lie further apart than they are long.
    """
    (rows, columns), (in_row, one), (out_row, other) = x.shape, x.stride(), y.stride()
    assert y.shape == (columns, rows) and one == other == 1 and x.dtype == y.dtype
    library.function("swatfx_transpose", elements=x.dtype)(
        pointer(x),
        result(y),
        *[size(n) for n in (1, rows, columns, in_row, out_row, 0, 0)],
        library.threads(),
    )
