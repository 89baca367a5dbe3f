"""Packing: a bitmask and the nonzero values behind it, in one flat byte tensor.

Layout of a packed tensor of n elements: ceil(n / 8) bytes of mask (element i is bit i mod 8 of byte
i div 8), zero padding up to a multiple of 8 bytes, then the values in element order. Elements are
counted in the order of a layout of `swatfx.tensors.layouts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swatfx.tensors.replaceable import Replaceable


@Replaceable
def mask_to_bits(mask: Tensor) -> Tensor:
    """Bool tensor of n elements, flattened -> uint8 [ceil(n / 8)]."""
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


@Replaceable
def bits_to_mask(bits: Tensor, elements: int) -> Tensor:
    """Inverse of `mask_to_bits`: uint8 [ceil(n / 8)] -> bool [n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> shifts).bitwise_and_(1).view(-1)[:elements].bool()


def header_bytes(elements: int) -> int:
    """Bytes before the values: the mask, padded so that values of any dtype are aligned."""
    return (elements + 63) // 64 * 8


@Replaceable
def pack(x: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Pack the elements of `x` where `keep`, both flat, as `dtype` -> uint8 [header + values]."""
    values = x[keep].to(dtype)
    header = header_bytes(x.numel())
    out = x.new_zeros(header + values.numel() * dtype.itemsize, dtype=torch.uint8)
    bits = mask_to_bits(keep)
    out[: bits.numel()] = bits
    if values.numel():
        out[header:].view(dtype).copy_(values)
    return out


@Replaceable
def unpack(packed: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `pack`: uint8 -> flat dense tensor of `elements`, zero where nothing was kept."""
    keep = bits_to_mask(packed[: (elements + 7) // 8], elements)
    out = packed.new_zeros(elements, dtype=dtype)
    out[keep] = packed[header_bytes(elements) :].view(
        dtype
    )  # as many as bits are set, or it raises
    return out
