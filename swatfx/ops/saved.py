"""What ops with a backward share: outputs in a layout, masks as bits, no second backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swatfx.errors import SwatError
from swatfx.tensors import bits, layouts


def not_a_view(x: Tensor) -> Tensor:
    """`x`, no longer known as a view: autograd lets no one write into a view that an op returns."""
    return torch.ops.aten._unsafe_view.default(x, x.shape) if x._is_view() else x


def in_layout(x: Tensor, layout: str) -> Tensor:
    """`x` in `layout`, as an op may return it: no view."""
    if layouts.lies_in(x, layout):
        return not_a_view(x)
    # Not `as_layout`, then no view of it: for that, torch.export would fix a symbolic batch.
    return new_in_layout(x.shape, layout, x).copy_(x)


def new_in_layout(shape: Sequence[int], layout: str, like: Tensor) -> Tensor:
    """An uninitialised tensor in `layout`, of the dtype and device of `like`; no view."""
    return layouts.empty(shape, layout, dtype=like.dtype, device=like.device)


def bits_size(elements: int) -> int:
    """Bytes of a mask."""
    return (elements + 7) // 8


def active_bits(y: Tensor, layout: str) -> Tensor:
    """Where ReLU, whose result is `y`, lets a gradient through: uint8 [bytes], order of `layout`.

    NaN counts as active, as in torch.
    """
    return bits.mask_to_bits(layouts.flat_view(torch.logical_not(y <= 0), layout))


def mask_from(packed: Tensor, shape: Sequence[int], layout: str) -> Tensor:
    """Inverse of `active_bits`: bool of `shape`, in `layout`."""
    elements = torch.Size(shape).numel()
    return layouts.from_flat(bits.bits_to_mask(packed, elements), shape, layout)


def relu_gradient(grad: Tensor, active: Tensor) -> Tensor:
    """`grad` where `active` (ReLU's result, or its mask as bool), else zero.

    By torch's own kernel, so that the result lies in memory as it would in the dense model.
    """
    seen = active.to(grad.dtype)
    result: Tensor = torch.ops.aten.threshold_backward(grad, seen, 0)
    return result


def no_double_backward(ctx: Any, *grads: Tensor) -> None:
    """Backward of our backward ops: a sparse weight gradient has no second derivative to offer."""
    raise SwatError(
        "double backward through a sparse layer is not defined",
        remedy="call backward without create_graph, or compile the layer with the policy 'dense'",
    )


class _Once(torch.autograd.Function):
    """A gradient formed from codes: it depends on what they stand for, unknown to torch."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        """`x`, with a history."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raise SwatError."""
        raise SwatError(
            "double backward through what was kept in codes is not defined",
            remedy='call backward without create_graph, or compile with norm_saves="exact"',
        )


def once_only(*gradients: Tensor) -> tuple[Tensor, ...]:
    """Gradients formed from codes: where they may be differentiated in turn, that raises."""
    if not torch.is_grad_enabled():
        return gradients
    anchor = torch.zeros((), requires_grad=True, device="cpu")
    return tuple(_Once.apply(anchor, g) for g in gradients)  # type: ignore[no-untyped-call]
