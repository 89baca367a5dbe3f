"""`swatfx::to_layout`: a copy of an activation in another memory order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swatfx.ops.saved import new_in_layout
from swatfx.tensors import layouts


def to_layout_reference(x: Tensor, layout: str) -> Tensor:
    """Copy `x` into a layout.

    Args:
        x: (N, C, *any), with any strides.
        layout: name in `swatfx.tensors.layouts`.

    Returns:
        of x's shape and dtype, dense in `layout`; a tensor of its own. Its gradient goes back in
        the order of `x`, which is the one that the op that made `x` wants.
    """
    return new_in_layout(x.shape, layout, x).copy_(x)


to_layout = torch.library.custom_op("swatfx::to_layout", to_layout_reference, mutates_args=())


@to_layout.register_fake
def _(x: Tensor, layout: str) -> Tensor:
    return new_in_layout(x.shape, layout, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.layout, ctx.order = layouts.layout_of(inputs[0]), None
    if ctx.layout == layouts.ROW_MAJOR:
        ctx.order = layouts.order_of(inputs[0])  # in doubt, layout_of says row-major


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    if ctx.order is not None:
        return layouts.in_order(grad, ctx.order), None
    return converted(grad, ctx.layout), None


to_layout.register_autograd(_backward, setup_context=_setup_context)


def converted(x: Tensor, layout: str) -> Tensor:
    """`x` in `layout`: itself if it lies so already, else `to_layout` of it.

    As `layouts.as_layout` does it, but by an op, for which there is a fast kernel.
    """
    return x if layouts.lies_in(x, layout) else to_layout(x, layout)


def between_linear(x: Tensor, layout: str) -> str:
    """What a graph tells a linear layer of `x`: `layout`, or row-major where that does not pay."""
    return layouts.between_linear(x.shape, layout)


def laid_out(x: Any, layout: str) -> Any:
    """`x` in `layout`: what a compiled graph calls where a layout begins and ends.

    Numbers come back as they are; so do scalars, vectors and matrices, unless row-major is asked.
    """
    if not isinstance(x, Tensor) or (x.dim() < 3 and layout != layouts.ROW_MAJOR):
        return x
    return converted(x, layout)
