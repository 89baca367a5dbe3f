"""`swatfx::dropout` and its backward: dropout that keeps a bit an element, not the noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swatfx.ops.saved import bits_size, in_layout, mask_from, new_in_layout, no_double_backward
from swatfx.tensors import bits as bitmask
from swatfx.tensors import layouts


def dropout_reference(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Dropout in training.

    Args:
        x: any shape.
        p: probability of a zero, 0 < p < 1.

    Returns:
        y: in the layout of x, drawn as `F.dropout` draws it from the same generator.
        bits: uint8 [ceil(n / 8)], what is kept, in the order of x's layout.
    """
    layout = layouts.elementwise_layout_of(x)
    if x.device.type == "cpu":
        noise = torch.empty_like(x).bernoulli_(1 - p)
        keep = noise != 0
        y = x * noise.div_(1 - p)
    else:  # torch fuses it, with a draw of its own
        y, keep = torch.ops.aten.native_dropout(x, p, True)
    return in_layout(y, layout), bitmask.mask_to_bits(layouts.flat_view(keep, layout))


# Nothing may run it twice for one value, or share one value between two.
dropout = torch.library.custom_op(
    "swatfx::dropout",
    dropout_reference,
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)


@dropout.register_fake
def _(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    y = new_in_layout(x.shape, layouts.elementwise_layout_of(x), x)
    return y, x.new_empty(bits_size(x.numel()), dtype=torch.uint8)


def dropout_backward_reference(grad: Tensor, bits: Tensor, p: float, layout: str) -> Tensor:
    """Gradient of `swatfx::dropout`: `grad` / (1 - p) where `bits`, else zero; in `layout`."""
    keep = mask_from(bits, grad.shape, layout)
    if grad.device.type == "cpu":
        return in_layout(grad * keep.to(grad.dtype).div_(1 - p), layout)
    return in_layout(torch.ops.aten.native_dropout_backward(grad, keep, 1 / (1 - p)), layout)


dropout_backward = torch.library.custom_op(
    "swatfx::dropout_backward", dropout_backward_reference, mutates_args=()
)


@dropout_backward.register_fake
def _(grad: Tensor, bits: Tensor, p: float, layout: str) -> Tensor:
    return new_in_layout(grad.shape, layout, grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[1], layouts.elementwise_layout_of(inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return dropout_backward(grad, *ctx.saved_tensors, *ctx.options), None


dropout.register_autograd(_backward, setup_context=_setup_context)
dropout_backward.register_autograd(no_double_backward)
