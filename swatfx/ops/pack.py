"""`swatfx::pack`: all that backward will see of an activation, in one flat byte tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from swatfx import bits, layouts, selectors
from swatfx.selectors import Axes


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
        layout: of `swatfx.layouts`, the order in which elements are counted; "" takes that of `x`.

    Returns:
        uint8 [bytes]: see `swatfx.bits`. Zeros are never stored, kept or not.
    """
    axes = Axes.of(x.dim(), spatial, False)
    keep = selectors.get(selector).keep(x, threshold, axes) & (x != 0)
    layout = layout or layouts.layout_of(x)
    return bits.pack(layouts.flat_view(x, layout), layouts.flat_view(keep, layout), dtype)


pack = torch.library.custom_op("swatfx::pack", pack_reference, mutates_args=())


@pack.register_fake
def _(
    x: Tensor, threshold: Tensor, spatial: int, selector: str, dtype: torch.dtype, layout: str = ""
) -> Tensor:
    # The size depends on the data: one symbol a call, so that torch.compile sees one graph.
    return x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """The sparse activation as a dense tensor of `shape`, in the layout of the packed."""
    flat = bits.unpack(packed, torch.Size(shape).numel(), dtype)
    return layouts.from_flat(flat, shape, layout)
