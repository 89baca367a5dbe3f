"""`swatfx::max_pool2d`, which keeps a byte an output, and `swatfx::avg_pool2d`: nothing.

Eager keeps the whole input for either, and eight bytes an output for the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swatfx.errors import InputError
from swatfx.ops.conv import no_double_backward
from swatfx.ops.saved import in_layout, new_in_layout
from swatfx.tensors import layouts

MOST_CELLS = 256  # of a window: a cell's position has to fit into a byte


def max_pool2d_reference(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    saves: bool = True,
) -> tuple[Tensor, Tensor]:
    """Max pooling.

    Args:
        x: (N, C, H, W).
        kernel: two extents, whose product is at most 256.
        stride: two.
        padding: two.
        dilation: two.
        ceil_mode: as in `F.max_pool2d`.
        saves: False where no gradient will be asked for.

    Returns:
        y: (N, C, H', W'), in the layout of x.
        index: uint8 [elements of y], in the order of that layout: the winner's place in its window,
        counted row by row; empty if not `saves`. Torch decides ties.
    """
    layout = layouts.layout_of(x)
    y, flat = torch.ops.aten.max_pool2d_with_indices(
        _for_aten(x, layout), list(kernel), list(stride), list(padding), list(dilation), ceil_mode
    )
    if not saves:
        return in_layout(y, layout), x.new_empty(0, dtype=torch.uint8)
    rows, columns = _origins(y.shape, stride, padding, x.device)
    width = x.shape[3]
    down = (flat // width - rows) // dilation[0]
    right = (flat % width - columns) // dilation[1]
    index = (down * kernel[1] + right).to(torch.uint8)
    return in_layout(y, layout), layouts.flat_view(index, layout).contiguous()


def _for_aten(x: Tensor, layout: str) -> Tensor:
    return x.contiguous() if layout == layouts.BATCH_INNERMOST else x


def _origins(
    out: Sequence[int], stride: Sequence[int], padding: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row [H', 1] and column [W'] at which the windows begin, padding counted as negative."""
    rows = torch.arange(out[2], device=device) * stride[0] - padding[0]
    return rows.unsqueeze(1), torch.arange(out[3], device=device) * stride[1] - padding[1]


max_pool2d = torch.library.custom_op("swatfx::max_pool2d", max_pool2d_reference, mutates_args=())


@max_pool2d.register_fake
def _(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    saves: bool = True,
) -> tuple[Tensor, Tensor]:
    out, _ = torch.ops.aten.max_pool2d_with_indices(
        x, list(kernel), list(stride), list(padding), list(dilation), ceil_mode
    )
    size = out.numel() if saves else 0
    y = new_in_layout(out.shape, layouts.layout_of(x), x)
    return y, x.new_empty(size, dtype=torch.uint8)


def max_pool2d_backward_reference(
    grad: Tensor,
    index: Tensor,
    shape: Sequence[int],
    layout: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Gradient of `swatfx::max_pool2d` for an input of `shape`, in `layout`."""
    rows, columns = _origins(grad.shape, stride, padding, grad.device)
    place = layouts.from_flat(index, grad.shape, layout).long()
    down, right = place // kernel[1] * dilation[0], place % kernel[1] * dilation[1]
    flat = (rows + down) * shape[3] + columns + right
    if grad.numel() and grad.device.type == "cpu":  # aten writes there, wherever that is
        least, most = (int(n.item()) for n in flat.aminmax())
        inside = 0 <= least and most < shape[2] * shape[3]
        if not inside or int(place.max().item()) >= kernel[0] * kernel[1]:
            raise InputError("max pooling: a winner outside its image", value=(least, most))
    # Only the input's shape and memory format matter to aten.
    seen = layouts.empty(shape, layout, dtype=grad.dtype, device=grad.device)
    dx = torch.ops.aten.max_pool2d_with_indices_backward(
        grad,
        _for_aten(seen, layout),
        list(kernel),
        list(stride),
        list(padding),
        list(dilation),
        ceil_mode,
        _for_aten(flat, layout),
    )
    return in_layout(dx, layout)


max_pool2d_backward = torch.library.custom_op(
    "swatfx::max_pool2d_backward", max_pool2d_backward_reference, mutates_args=()
)


@max_pool2d_backward.register_fake
def _(
    grad: Tensor,
    index: Tensor,
    shape: Sequence[int],
    layout: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
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


def avg_pool2d_reference(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """Average pooling of x (N, C, H, W); arguments as in `F.avg_pool2d`, pairs where it takes them.

    Returns:
        (N, C, H', W'), in the layout of x.
    """
    layout = layouts.layout_of(x)
    options = (list(kernel), list(stride), list(padding), ceil_mode, count_include_pad, divisor)
    return in_layout(torch.ops.aten.avg_pool2d(_for_aten(x, layout), *options), layout)


avg_pool2d = torch.library.custom_op("swatfx::avg_pool2d", avg_pool2d_reference, mutates_args=())


@avg_pool2d.register_fake
def _(x: Tensor, kernel: Sequence[int], *rest: Any) -> Tensor:
    out = torch.ops.aten.avg_pool2d(x, kernel, *rest)
    return new_in_layout(out.shape, layouts.layout_of(x), x)


def avg_pool2d_backward_reference(
    grad: Tensor,
    shape: Sequence[int],
    layout: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """Gradient of `swatfx::avg_pool2d` for an input of `shape`, in `layout`.

    Raises:
        InputError: `grad` is not of the output's shape, which aten does not ask.
    """
    image = torch.empty(tuple(shape), device="meta")
    steps = (list(kernel), list(stride), list(padding), ceil_mode, count_include_pad, divisor)
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
    "swatfx::avg_pool2d_backward", avg_pool2d_backward_reference, mutates_args=()
)


@avg_pool2d_backward.register_fake
def _(grad: Tensor, shape: Sequence[int], layout: str, *rest: Any) -> Tensor:
    return new_in_layout(shape, layout, grad)


def _setup_avg(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = (tuple(inputs[0].shape), layouts.layout_of(inputs[0]), *inputs[1:])


def _avg_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (avg_pool2d_backward(grad, *ctx.options), *[None] * 6)


avg_pool2d.register_autograd(_avg_backward, setup_context=_setup_avg)
avg_pool2d_backward.register_autograd(no_double_backward)
