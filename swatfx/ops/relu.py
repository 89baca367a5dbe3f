"""`swatfx::relu` and its backward: ReLU that keeps a bit an element, not its result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swatfx.ops.saved import (
    active_bits,
    bits_size,
    in_layout,
    mask_from,
    new_in_layout,
    no_double_backward,
    relu_gradient,
)
from swatfx.tensors import layouts


def relu_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU.

    Args:
        x: any shape.

    Returns:
        y: as `torch.relu` gives it.
        bits: uint8 [ceil(n / 8)], where the gradient passes, in the order of x's layout.
    """
    y = torch.relu(x)
    return y, active_bits(y, layouts.elementwise_layout_of(x))


relu = torch.library.custom_op("swatfx::relu", relu_reference, mutates_args=())


@relu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x), x.new_empty(bits_size(x.numel()), dtype=torch.uint8)


def relu_backward_reference(grad: Tensor, bits: Tensor, layout: str) -> Tensor:
    """Gradient of `swatfx::relu`: `grad` where `bits`, else zero; in `layout`."""
    mask = mask_from(bits, grad.shape, layout)
    return in_layout(relu_gradient(grad, mask), layout)


relu_backward = torch.library.custom_op(
    "swatfx::relu_backward", relu_backward_reference, mutates_args=()
)


@relu_backward.register_fake
def _(grad: Tensor, bits: Tensor, layout: str) -> Tensor:
    return new_in_layout(grad.shape, layout, grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.layout = layouts.elementwise_layout_of(inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> Tensor | None:
    return None if grad is None else relu_backward(grad, *ctx.saved_tensors, ctx.layout)


relu.register_autograd(_backward, setup_context=_setup_context)
relu_backward.register_autograd(no_double_backward)
