"""FLOPs of our ops for `torch.utils.flop_counter.FlopCounterMode`.

They say what the shapes say: two per multiplication of the dense layer, at any density. That is
torch's own convention for sparse matrix products, and it makes a compiled model's count that of the
model it was made from; what sparsity saves is in `swatfx.report`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import conv_backward_flop, conv_flop, register_flop_formula

Shape = Sequence[int]


def _batched(shape: Shape, weight: Shape) -> list[int]:
    """`shape` of an activation with its batch dimension, which a single sample lacks."""
    return list(shape) if len(shape) == len(weight) else [1, *shape]


def conv_flops(input: Shape, weight: Shape, *args: Any, out_shape: Shape, **options: Any) -> int:
    """FLOPs of `swatfx::conv`: what torch counts for the dense convolution."""
    out = torch.empty(_batched(out_shape, weight), device="meta")
    return int(
        conv_flop(_batched(input, weight), weight, None, None, None, None, False, out_val=out)
    )


def conv_backward_flops(
    grad: Shape,
    input: Shape | None,
    kept: Shape | None,
    weight: Shape,
    weight_state: Shape,
    input_shape: Shape,
    *args: Any,
    out_shape: Any,
    **options: Any,
) -> int:
    """FLOPs of `swatfx::conv_backward`: those of the gradients that are wanted."""
    wants = options["wants"] if "wants" in options else args[-1]
    seen = _batched(input_shape, weight)
    grad = _batched(grad, weight)
    outs = [torch.empty(seen, device="meta"), torch.empty(tuple(weight), device="meta"), None]
    rest = (None, None, None, None, False, None, None, list(wants))
    return int(conv_backward_flop(grad, seen, weight, *rest, out_val=outs))


def linear_flops(input: Shape, weight: Shape, *args: Any, **options: Any) -> int:
    """FLOPs of `swatfx::linear`: 2 * rows * in * out."""
    return 2 * math.prod(input[:-1]) * math.prod(weight)


def linear_backward_flops(
    grad: Shape, input: Shape | None, kept: Shape | None, weight: Shape, *args: Any, **options: Any
) -> int:
    """FLOPs of `swatfx::linear_backward`: as many again for each gradient that is wanted."""
    wants = options["wants"] if "wants" in options else args[-1]
    products = int(wants[0]) + int(wants[1])
    return 2 * products * math.prod(grad[:-1]) * math.prod(weight)


def register_flops() -> None:
    """Tell torch; once, after the ops exist."""
    ops = torch.ops.swatfx
    register_flop_formula(ops.conv)(conv_flops)
    register_flop_formula(ops.conv_backward)(conv_backward_flops)
    register_flop_formula(ops.linear)(linear_flops)
    register_flop_formula(ops.linear_backward)(linear_backward_flops)
