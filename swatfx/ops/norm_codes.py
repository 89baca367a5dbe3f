"""The normalised input of a batch norm, a byte an element: how it is coded.

x-hat is stored by 256 cells a channel, from its least to its greatest value, and read back as the
middle of a cell: an error of at most 1/508 of that range, about 0.01 standard deviations (rms) of a
normal channel. A border between cells lies where ReLU starts, so that its mask is exact. Bias
gradients, and in evaluation input gradients, have no error; those of weights have most, since x-hat
stands under the sum.

In memory: float32 [3][C] (step, low, first), zeros up to a whole number of cache lines, a byte q an
element in the order of the input's layout, x-hat being low + q * step, and, if a residual stands
between norm and ReLU, the bits of ReLU's mask. Without one, the mask is q >= first, or its contrary
where the weight is negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swatfx.ops.saved import active_bits
from swatfx.tensors import layouts


def int8_header(channels: int) -> int:
    """Bytes before the codes: float32 [3][C] (step, low, first), padded to a cache line."""
    return (12 * channels + 63) // 64 * 64


def per_channel(values: Tensor, dims: int) -> Tensor:
    """`values` (C,) as they meet a tensor of so many dimensions."""
    return values.view(1, -1, *[1] * (dims - 2))


def encode(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    has_residual: bool,
    layout: str,
) -> Tensor:
    """uint8 [bytes] for `x`, whose norm (with what follows it) is `y`: see above."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dims, channels = x.dim(), x.shape[1]
    header = x.new_zeros(int8_header(channels), dtype=torch.uint8)
    if x.numel() == 0:
        return header
    scale, shift = invstd.to(wide), mean.to(wide)
    normed = (x.to(wide) - per_channel(shift, dims)) * per_channel(scale, dims)
    others = [d for d in range(dims) if d != 1]
    low, high = normed.amin(others), normed.amax(others)
    step = (high - low) / 254
    inverse = torch.where(step > 0, 1 / step, 0)
    start, masked = low, relu and not has_residual
    if masked:
        w = torch.ones_like(low) if weight is None else weight.to(wide)
        b = torch.zeros_like(low) if bias is None else bias.to(wide)
        start = torch.where(w == 0, low, torch.clamp(-b / w, low, high))
    first = ((start - low) * inverse).floor() + 1
    codes = ((normed - per_channel(start, dims)) * per_channel(inverse, dims)).floor()
    border = per_channel(first, dims)
    codes = codes + border
    if masked:
        above = torch.logical_not(y <= 0) == per_channel(w >= 0, dims)
        codes = torch.where(above, codes.maximum(border), codes.minimum(border - 1))
    middle = start + (0.5 - first) * step
    numbers = torch.stack([step, middle, first]).float().view(torch.uint8).view(-1)
    header[: numbers.numel()] = numbers
    parts = [header, layouts.flat_view(codes.nan_to_num().clamp(0, 255).to(torch.uint8), layout)]
    if relu and has_residual:
        parts.append(active_bits(y, layout))
    return torch.cat(parts)


def decode(
    code: Tensor, shape: Sequence[int], layout: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x-hat, whether its code is `first` or more), both of `shape`, from what `encode` made."""
    channels, elements = shape[1], torch.Size(shape).numel()
    start = int8_header(channels)
    step, low, first = code[: 12 * channels].view(torch.float32).view(3, channels)
    codes = layouts.from_flat(code[start : start + elements], shape, layout)
    low, step, first = (per_channel(v, len(shape)) for v in (low, step, first))
    return (low + codes * step).to(dtype), codes >= first
