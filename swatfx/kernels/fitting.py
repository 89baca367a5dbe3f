"""What C is given: sizes, strides and lengths, each checked against every other before a call.

C trusts its caller; csrc/exports.h says with what. Whatever does not fit here goes to the
plain-torch form of the op, which runs it, or raises what eager PyTorch raises.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from swatfx.kernels.library import ELEMENTS
from swatfx.kernels.problems import MAX_TAPS, Shapes
from swatfx.ops.pack import order_of
from swatfx.tensors import bits

LARGEST_STRIDE = 16
LARGEST_KERNEL = 64
LARGEST_STEP = 2**20  # of a padding or dilation: sums of such are far from overflowing
INT32 = 2**31 - 1


def are_elements(x: Tensor, weight: Tensor) -> bool:
    """Whether typed functions read `x`, an activation or gradient, beside `weight`.

    Weights are float32, which is rounded to a narrower activation, or of the activation's dtype.
    """
    return x.dtype in ELEMENTS and weight.dtype in (torch.float32, x.dtype)


def is_bias(bias: Tensor | None, input: Tensor, weight: Tensor) -> bool:
    """Whether `bias` is one number a filter, of the input's dtype, or None."""
    return bias is None or (bias.dtype is input.dtype and bias.shape == weight.shape[:1])


def is_number(x: Tensor) -> bool:
    """Whether `x` is one float32 without dimensions: the threshold of a whole tensor."""
    return x.dtype is torch.float32 and x.dim() == 0


def are_pairs(*options: Sequence[int]) -> bool:
    """Whether each is two numbers."""
    return all(len(pair) == 2 for pair in options)


def holds_bytes(x: Tensor, count: int) -> bool:
    """Whether `x` is `count` bytes in one piece."""
    return x.dtype is torch.uint8 and x.shape == (count,) and x.is_contiguous()


def packed_values(kept: Tensor, elements: int, dtype: torch.dtype, layout: str) -> int | None:
    """How many values of `dtype` lie behind the mask of `elements`; None if `kept` is none such."""
    header = bits.header_bytes(elements)
    count, rest = divmod(kept.numel() - header, dtype.itemsize)
    fits = kept.dtype is torch.uint8 and kept.is_contiguous() and order_of(kept) == layout
    # Values are read where they lie, which torch aligns; a slice may not be.
    return count if fits and not rest and count >= 0 and kept.data_ptr() % 8 == 0 else None


def convolution(
    input_shape: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Shapes | None:
    """Shapes of a batched 1d or 2d convolution that the kernels can run, else None."""
    if weight.dtype not in ELEMENTS:
        return None
    steps = tuple(stride), tuple(padding), tuple(dilation)
    return _convolution(tuple(input_shape), weight.shape, *steps, groups)


@functools.lru_cache(maxsize=4096)
def _convolution(
    input_shape: tuple[int, ...],
    weight_shape: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Shapes | None:
    spatial = len(weight_shape) - 2
    kernel = weight_shape[2:]
    steps = (stride, padding, dilation)
    if spatial not in (1, 2) or len(input_shape) != len(weight_shape):
        return None
    if any(len(numbers) != spatial for numbers in steps) or groups < 1:
        return None
    if min(*input_shape, *weight_shape, *stride, *dilation, *(p + 1 for p in padding)) < 1:
        return None
    if weight_shape[1] * groups != input_shape[1] or weight_shape[0] % groups:
        return None
    if max(stride) > LARGEST_STRIDE or max(*padding, *dilation) > LARGEST_STEP:
        return None
    if (
        max(kernel) > LARGEST_KERNEL
        or kernel.numel() > MAX_TAPS
        or weight_shape[1:].numel() > INT32
    ):
        return None
    shapes = Shapes.of(input_shape, weight_shape, stride, padding, dilation, groups)
    return shapes if min(shapes.out_size) > 0 else None
