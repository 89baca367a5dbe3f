"""`swatfx::pack`: all that backward will see of an activation, in one flat byte tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from swatfx import bits, selectors
from swatfx.selectors import Axes


@torch.library.custom_op("swatfx::pack", mutates_args=())
def pack(
    x: Tensor, threshold: Tensor, spatial: int, selector: str, dtype: torch.dtype, row_major: bool
) -> Tensor:
    """Keep the Top-K of an activation as a bitmask and its nonzero values.

    Args:
        x: activation, (N, C, *spatial), (C, *spatial), or (*any, C) with `spatial` 0.
        threshold: the state that `selector` made for `x`.
        spatial: number of spatial dimensions.
        selector: name in `swatfx.selectors`.
        dtype: of the stored values.
        row_major: count elements in logical order even if `x` is channels_last.

    Returns:
        uint8 [bytes]: see `swatfx.bits`. Zeros are never stored, kept or not.
    """
    axes = Axes.of(x.dim(), spatial, False)
    keep = selectors.get(selector).keep(x, threshold, axes) & (x != 0)
    channels_last = not row_major and bits.is_channels_last(x)
    return bits.pack(bits.flat_view(x, channels_last), bits.flat_view(keep, channels_last), dtype)


@pack.register_fake
def _(
    x: Tensor, threshold: Tensor, spatial: int, selector: str, dtype: torch.dtype, row_major: bool
) -> Tensor:
    # The size depends on the data: one symbol a call, so that torch.compile sees one graph.
    return x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def unpack(
    packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """The sparse activation as a dense tensor of `shape`, in the memory format of the packed."""
    flat = bits.unpack(packed, torch.Size(shape).numel(), dtype)
    return bits.from_flat(flat, shape, channels_last)
