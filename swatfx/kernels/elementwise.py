"""`swatfx::relu`, `swatfx::dropout` and their backward in C: csrc/elementwise.c.

Fast are float32 and bfloat16 tensors that are dense in some layout, whichever; all else runs the
reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swatfx.kernels import fitting, library
from swatfx.kernels.library import pointer, real, result, size
from swatfx.ops.dropout import (
    dropout,
    dropout_backward,
    dropout_backward_reference,
    dropout_reference,
)
from swatfx.ops.layout import converted
from swatfx.ops.relu import relu, relu_backward, relu_backward_reference, relu_reference
from swatfx.ops.saved import bits_size, new_in_layout
from swatfx.tensors import layouts


def _fits(x: Tensor) -> bool:
    dense = x.is_contiguous() or layouts.elementwise_layout_of(x) != layouts.ROW_MAJOR
    return library.available() and dense and x.dtype in library.ELEMENTS


def _fits_bits(grad: Tensor, bits: Tensor) -> bool:
    """Whether C can read both."""
    known = library.available() and grad.dtype in library.ELEMENTS
    return known and fitting.holds_bytes(bits, bits_size(grad.numel()))


def _bits_of(x: Tensor) -> Tensor:
    return x.new_empty(bits_size(x.numel()), dtype=torch.uint8)


@relu.register_kernel("cpu")
def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    if not _fits(x):
        return relu_reference(x)
    y, bits = torch.empty_like(x), _bits_of(x)
    library.function("swatfx_relu", elements=x.dtype)(
        pointer(x), result(y), pointer(bits), size(x.numel()), library.threads()
    )
    return y, bits


@relu_backward.register_kernel("cpu")
def _relu_backward(grad: Tensor, bits: Tensor, layout: str) -> Tensor:
    if not _fits_bits(grad, bits):
        return relu_backward_reference(grad, bits, layout)
    grad = converted(grad, layout)
    dx = new_in_layout(grad.shape, layout, grad)
    library.function("swatfx_relu_backward", elements=grad.dtype)(
        pointer(grad), pointer(bits), result(dx), size(grad.numel()), library.threads()
    )
    return dx


def _noise(p: float, dtype: torch.dtype) -> float:
    """What an element that is kept is multiplied by, rounded as torch rounds it in `dtype`.

    Times an element in bfloat16 that is exact in float32: rounded once, as torch does it.
    """
    return float(torch.ones((), dtype=dtype, device="cpu").div_(1 - p))


@dropout.register_kernel("cpu")
def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    if not _fits(x) or not 0 < p < 1:
        return dropout_reference(x, p)
    y = new_in_layout(x.shape, layouts.elementwise_layout_of(x), x).bernoulli_(1 - p)
    bits = _bits_of(x)
    library.function("swatfx_dropout", elements=x.dtype)(
        pointer(x),
        result(y),
        pointer(bits),
        real(_noise(p, x.dtype)),
        size(x.numel()),
        library.threads(),
    )
    return y, bits


@dropout_backward.register_kernel("cpu")
def _dropout_backward(grad: Tensor, bits: Tensor, p: float, layout: str) -> Tensor:
    if not _fits_bits(grad, bits) or not 0 < p < 1:
        return dropout_backward_reference(grad, bits, p, layout)
    grad = converted(grad, layout)
    dx = new_in_layout(grad.shape, layout, grad)
    library.function("swatfx_dropout_backward", elements=grad.dtype)(
        pointer(grad),
        pointer(bits),
        result(dx),
        real(_noise(p, grad.dtype)),
        size(grad.numel()),
        library.threads(),
    )
    return dx
