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
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

Shape = Sequence[int]


def _batched(shape: Shape, weight: Shape) -> list[int]:
    """`shape` of an activation with its batch dimension, which a single sample lacks."""
    return list(shape) if len(shape) == len(weight) else [1, *shape]


def _transposed(shape: Shape) -> list[int]:
    return [shape[1], shape[0], *shape[2:]]


def conv_flops(input: Shape, weight: Shape, *args: Any, out_shape: Shape, **options: Any) -> int:
    """FLOPs of `swatfx::conv`: what torch counts for the dense convolution."""
    out = _batched(out_shape, weight)
    return conv_flop_count(_batched(input, weight), list(weight), out)


def conv_backward_flops(
    grad: Shape,
    input: Shape | None,
    kept: Shape | None,
    weight: Shape,
    weight_state: Shape,
    input_shape: Shape,
    wants: Sequence[bool],
    *args: Any,
    **options: Any,
) -> int:
    """FLOPs of `swatfx::conv_backward`: what torch counts for the gradients that are wanted."""
    seen, grad = _batched(input_shape, weight), _batched(grad, weight)
    flops = 0
    if wants[0]:
        flops += conv_flop_count(grad, list(weight), seen, transposed=True)
    if wants[1]:
        # The convolution of the activation with the gradient, batch and channels swapped.
        a, g, w = (_transposed(shape) for shape in (seen, grad, weight))
        flops += conv_flop_count(a, g, w)
    return flops


def linear_flops(input: Shape, weight: Shape, *args: Any, **options: Any) -> int:
    """FLOPs of `swatfx::linear`: 2 * rows * in * out."""
    return 2 * math.prod(input[:-1]) * math.prod(weight)


def linear_backward_flops(
    grad: Shape,
    input: Shape | None,
    kept: Shape | None,
    weight: Shape,
    weight_state: Shape,
    input_shape: Shape,
    wants: Sequence[bool],
    *args: Any,
    **options: Any,
) -> int:
    """FLOPs of `swatfx::linear_backward`: as many again for each gradient that is wanted."""
    products = int(wants[0]) + int(wants[1])
    return 2 * products * math.prod(grad[:-1]) * math.prod(weight)


def no_flops(*args: Any, **options: Any) -> int:
    """Norms, ReLU, pooling and dropout: torch counts products of matrices only."""
    return 0


_UNCOUNTED = ("batch_norm", "relu", "max_pool2d", "avg_pool2d", "dropout")


def register_flops() -> None:
    """Tell torch; once, after the ops exist."""
    ops = torch.ops.swatfx
    register_flop_formula(ops.conv)(conv_flops)
    register_flop_formula(ops.conv_backward)(conv_backward_flops)
    register_flop_formula(ops.linear)(linear_flops)
    register_flop_formula(ops.linear_backward)(linear_backward_flops)
    uncounted = [getattr(ops, name + end) for name in _UNCOUNTED for end in ("", "_backward")]
    register_flop_formula(uncounted)(no_flops)
