"""`swatfx::max_pool2d`, which keeps a byte an output, and `swatfx::avg_pool2d`: nothing.

Eager keeps the whole input for either, and eight bytes an output for the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swatfx.errors import InputError
from swatfx.ops.calls import AvgPoolCall, MaxPoolCall, schema_of
from swatfx.ops.saved import in_layout, new_in_layout, no_double_backward
from swatfx.tensors import layouts

_INPUT = "SymInt[] shape, str layout"
MOST_CELLS = 256  # of a window: a cell's position has to fit into a byte


def max_pool2d_reference(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Max pooling.

    Args:
        x: (N, C, H, W).
        options: fields of `swatfx.ops.calls.MaxPoolCall`.

    Returns:
        y: (N, C, H', W'), in the layout of x.
        index: uint8 [elements of y], in the order of that layout: the winner's place in its window,
        counted row by row; empty if the call saves nothing. Torch decides ties.
    """
    call, layout = MaxPoolCall(*options), layouts.layout_of(x)
    y, flat = torch.ops.aten.max_pool2d_with_indices(_for_aten(x, layout), *call.for_aten)
    if not call.saves:
        return in_layout(y, layout), x.new_empty(0, dtype=torch.uint8)
    rows, columns = _origins(call, y.shape, x.device)
    width = x.shape[3]
    down = (flat // width - rows) // call.dilation[0]
    right = (flat % width - columns) // call.dilation[1]
    index = (down * call.kernel[1] + right).to(torch.uint8)
    return in_layout(y, layout), layouts.flat_view(index, layout).contiguous()


def _for_aten(x: Tensor, layout: str) -> Tensor:
    return x.contiguous() if layout == layouts.BATCH_INNERMOST else x


def _origins(call: MaxPoolCall, out: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row [H', 1] and column [W'] at which the windows begin, padding counted as negative."""
    rows, columns = (
        torch.arange(size, device=device) * stride - padding
        for size, stride, padding in zip(out[2:], call.stride, call.padding, strict=True)
    )
    return rows.unsqueeze(1), columns


max_pool2d = torch.library.custom_op(
    "swatfx::max_pool2d",
    max_pool2d_reference,
    mutates_args=(),
    schema=schema_of("Tensor x", MaxPoolCall, "(Tensor, Tensor)"),
)


@max_pool2d.register_fake
def _(x: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
    call = MaxPoolCall(*options, **named)
    out, _ = torch.ops.aten.max_pool2d_with_indices(x, *call.for_aten)
    y = new_in_layout(out.shape, layouts.layout_of(x), x)
    return y, x.new_empty(out.numel() if call.saves else 0, dtype=torch.uint8)


def max_pool2d_backward_reference(
    grad: Tensor, index: Tensor, shape: Sequence[int], layout: str, *options: Any
) -> Tensor:
    """Gradient of `swatfx::max_pool2d` for an input of `shape`, in `layout`."""
    call = MaxPoolCall(*options)
    rows, columns = _origins(call, grad.shape, grad.device)
    place = layouts.from_flat(index, grad.shape, layout).long()
    down = place // call.kernel[1] * call.dilation[0]
    right = place % call.kernel[1] * call.dilation[1]
    flat = (rows + down) * shape[3] + columns + right
    if grad.numel() and grad.device.type == "cpu":  # aten writes there, wherever that is
        least, most = (int(n.item()) for n in flat.aminmax())
        inside = 0 <= least and most < shape[2] * shape[3]
        if not inside or int(place.max().item()) >= call.kernel[0] * call.kernel[1]:
            raise InputError("max pooling: a winner outside its image", value=(least, most))
    # Only the input's shape and memory format matter to aten.
    seen = layouts.empty(shape, layout, dtype=grad.dtype, device=grad.device)
    dx = torch.ops.aten.max_pool2d_with_indices_backward(
        grad, _for_aten(seen, layout), *call.for_aten, _for_aten(flat, layout)
    )
    return in_layout(dx, layout)


max_pool2d_backward = torch.library.custom_op(
    "swatfx::max_pool2d_backward",
    max_pool2d_backward_reference,
    mutates_args=(),
    schema=schema_of(f"Tensor grad, Tensor index, {_INPUT}", MaxPoolCall, "Tensor", ("saves",)),
)


@max_pool2d_backward.register_fake
def _(grad: Tensor, index: Tensor, shape: Sequence[int], layout: str, *rest: Any) -> Tensor:
    return new_in_layout(shape, layout, grad)


def _setup_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x = inputs[0]
    ctx.options = (tuple(x.shape), layouts.layout_of(x), *inputs[1:6])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _max_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    return (max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6)


max_pool2d.register_autograd(_max_backward, setup_context=_setup_max)
max_pool2d_backward.register_autograd(no_double_backward)


def avg_pool2d_reference(x: Tensor, *options: Any) -> Tensor:
    """Average pooling of x (N, C, H, W); options are the fields of `AvgPoolCall`.

    Returns:
        (N, C, H', W'), in the layout of x.
    """
    call, layout = AvgPoolCall(*options), layouts.layout_of(x)
    return in_layout(torch.ops.aten.avg_pool2d(_for_aten(x, layout), *call.for_aten), layout)


avg_pool2d = torch.library.custom_op(
    "swatfx::avg_pool2d",
    avg_pool2d_reference,
    mutates_args=(),
    schema=schema_of("Tensor x", AvgPoolCall, "Tensor"),
)


@avg_pool2d.register_fake
def _(x: Tensor, *options: Any, **named: Any) -> Tensor:
    out = torch.ops.aten.avg_pool2d(x, *AvgPoolCall(*options, **named).for_aten)
    return new_in_layout(out.shape, layouts.layout_of(x), x)


def avg_pool2d_backward_reference(
    grad: Tensor, shape: Sequence[int], layout: str, *options: Any
) -> Tensor:
    """Gradient of `swatfx::avg_pool2d` for an input of `shape`, in `layout`.

    Raises:
        InputError: `grad` is not of the output's shape, which aten does not ask.
    """
    image = torch.empty(tuple(shape), device="meta")
    steps = AvgPoolCall(*options).for_aten
    out = torch.ops.aten.avg_pool2d(image, *steps).shape
    if grad.shape != out:
        raise InputError(
            "a gradient of another shape than the pool's output",
            value=tuple(grad.shape),
            remedy=f"an input of {tuple(shape)} gives {tuple(out)}",
        )
    seen = layouts.empty(shape, layout, dtype=grad.dtype, device=grad.device)
    dx = torch.ops.aten.avg_pool2d_backward(grad, _for_aten(seen, layout), *steps)
    return in_layout(dx, layout)


avg_pool2d_backward = torch.library.custom_op(
    "swatfx::avg_pool2d_backward",
    avg_pool2d_backward_reference,
    mutates_args=(),
    schema=schema_of(f"Tensor grad, {_INPUT}", AvgPoolCall, "Tensor"),
)


@avg_pool2d_backward.register_fake
def _(grad: Tensor, shape: Sequence[int], layout: str, *rest: Any, **named: Any) -> Tensor:
    return new_in_layout(shape, layout, grad)


def _setup_avg(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = (tuple(inputs[0].shape), layouts.layout_of(inputs[0]), *inputs[1:])


def _avg_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (avg_pool2d_backward(grad, *ctx.options), *[None] * 6)


avg_pool2d.register_autograd(_avg_backward, setup_context=_setup_avg)
avg_pool2d_backward.register_autograd(no_double_backward)
