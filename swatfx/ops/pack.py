"""`swatfx::pack`: all that backward will see of an activation, in one byte tensor.

In which order the elements were counted is decided once, by whoever packs, and carried with what
was packed: by its number of dimensions, [bytes] in row-major order, [bytes, 1] in channels_last,
[bytes, 1, 1] in batch_innermost, with one more in features_major and two in images_innermost. A
shape is known without asking a device, it is kept by whatever stores saved tensors, and backward
never has to guess how an input lay that it does not see: it may have been cast, padded or moved
since.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swatfx import selectors
from swatfx.errors import InputError
from swatfx.ops.saved import not_a_view
from swatfx.selectors import Axes
from swatfx.tensors import bits, layouts
from swatfx.tensors.layouts import (
    BATCH_INNERMOST,
    CHANNELS_LAST,
    FEATURES_OUTERMOST,
    ROW_MAJOR,
)

# Of one, two, ..., five dimensions.
_ORDERS = (ROW_MAJOR, CHANNELS_LAST, BATCH_INNERMOST, *FEATURES_OUTERMOST)


def shape_of(layout: str, size: int | torch.SymInt) -> tuple[int | torch.SymInt, ...]:
    """The shape of `size` packed bytes whose elements were counted in the order of `layout`."""
    return (size, *[1] * _ORDERS.index(layout))


def order_of(packed: Tensor) -> str:
    """In which order the elements of a packed activation were counted."""
    if packed.dtype is not torch.uint8 or not 1 <= packed.dim() <= len(_ORDERS):
        raise InputError(
            "a packed activation is bytes in one to five dimensions",
            value=f"{packed.dtype} {tuple(packed.shape)}",
            remedy="pass on what swatfx::pack returned as it is",
        )
    return _ORDERS[packed.dim() - 1]


def counted_in(x: Tensor, spatial: int) -> str:
    """The layout in whose order the elements of `x` are counted unless another is asked for."""
    return layouts.layout_of(x) if spatial else layouts.elementwise_layout_of(x)


def pack_reference(
    x: Tensor, threshold: Tensor, spatial: int, selector: str, dtype: torch.dtype, layout: str = ""
) -> Tensor:
    """Keep the Top-K of an activation as a bitmask and its nonzero values.

    Args:
        x: activation, (N, C, *spatial), (C, *spatial), or (*any, C) with `spatial` 0.
        threshold: the state that `selector` made for `x`.
        spatial: number of spatial dimensions.
        selector: name in `swatfx.selectors`.
        dtype: of the stored values.
        layout: of `swatfx.tensors.layouts`, the order in which elements are counted; "" takes that
            of `x`.

    Returns:
        uint8 [bytes] for row-major order, [bytes, 1] for channels_last, [bytes, 1, 1] for
        batch_innermost, [bytes, 1, 1, 1] for features_major, [bytes, 1, 1, 1, 1] for
        images_innermost: see `swatfx.tensors.bits`. Zeros are never stored, kept or not.
    """
    axes = Axes.of(x.dim(), spatial, False)
    keep = selectors.get(selector).keep(x, threshold, axes) & (x != 0)
    layout = layout or counted_in(x, spatial)
    flat = bits.pack(layouts.flat_view(x, layout), layouts.flat_view(keep, layout), dtype)
    return not_a_view(flat.view(shape_of(layout, flat.numel())))


pack = torch.library.custom_op("swatfx::pack", pack_reference, mutates_args=())


@pack.register_fake
def _(
    x: Tensor, threshold: Tensor, spatial: int, selector: str, dtype: torch.dtype, layout: str = ""
) -> Tensor:
    return x.new_empty(shape_of(layout or counted_in(x, spatial), _new_size()), dtype=torch.uint8)


def _new_size() -> torch.SymInt:
    """A size that depends on the data: one symbol a call, so that torch.compile sees one graph.

    `new_dynamic_size` would break the graph at every pack unless fullgraph=True is asked for: torch
    is wary of ops that were written for eager. This one was not.
    """
    ctx = torch.library.get_ctx()
    symbols = ctx._shape_env
    size: torch.SymInt
    if symbols is None:
        size = ctx.new_dynamic_size()  # raises what tells fake tensors without symbols
        return size
    from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size  # slow to import

    size = symbols.create_unbacked_symint()
    _constrain_range_for_size(size, min=0)
    return size


def unpack(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The sparse activation as a dense tensor of `shape`, in the layout that it was packed in."""
    flat = bits.unpack(packed.reshape(-1), torch.Size(shape).numel(), dtype)
    return layouts.from_flat(flat, shape, order_of(packed))
