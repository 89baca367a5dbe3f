"""What a sparse layer computes, in plain torch and float64, and one call of it to compare.

Masks are taken from the float32 tensors as they are; sums are then formed in float64 from
explicitly masked weights and activations, by autograd of `F.conv1d`, `F.conv2d` and `F.linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_of(weight: Tensor, *steps: Any) -> Callable[..., Tensor]:
    """The convolution with a weight of that rank, as a function of (input, weight, bias)."""
    call = _CONV[weight.dim() - 2]
    return lambda x, w, b: call(x, w, b, *steps)


def masked(x: Tensor, threshold: float) -> Tensor:
    """`x` in float64 where its magnitude reaches `threshold`, else zero."""
    kept = x.abs() >= torch.tensor(threshold, dtype=x.dtype)
    return torch.where(kept, x, torch.zeros_like(x)).double()


def layer(
    call: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    weight_threshold: float,
    activation_threshold: float,
) -> list[Tensor]:
    """[output, input gradient, weight gradient, bias gradient if there is one], float64.

    The paper's equations 1 to 3: forward and input gradient see Top-K weights, the weight gradient
    is dense and sees Top-K activations.
    """
    x, weight, grad = x.detach(), weight.detach(), grad.detach().double()
    b = None if bias is None else bias.detach().double().requires_grad_()
    seen = x.double().requires_grad_()
    out = call(seen, masked(weight, weight_threshold), b)
    out.backward(grad)
    dense = weight.double().requires_grad_()
    call(masked(x, activation_threshold), dense, None).backward(grad)
    assert seen.grad is not None and dense.grad is not None
    bias_grad = [] if b is None or b.grad is None else [b.grad]
    return [out.detach(), seen.grad, dense.grad, *bias_grad]


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference relative to what is wanted; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    off = (found.double() - wanted).norm().item()
    return off / (wanted.norm().item() + 1e-6)


def assert_equal(found: Sequence[Tensor], wanted: Sequence[Tensor], limit: float = 1e-5) -> None:
    """Fail where any is further off than rounding of a float32 sum."""
    names = ("output", "input gradient", "weight gradient", "bias gradient")
    assert len(found) == len(wanted)
    for name, one, other in zip(names, found, wanted, strict=False):
        assert error(one, other) < limit, f"{name} is off by {error(one, other):.2g} of its norm"
