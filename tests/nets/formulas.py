"""What a sparse layer computes, in plain torch and float64, and how near to it float32 has to be.

Masks are taken from the float32 tensors as they are; sums are then formed in float64 from
explicitly masked weights and activations, by autograd of `F.conv1d`, `F.conv2d` and `F.linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Exact:
    """A result, and for each element the sum of its terms' magnitudes: what rounding errs by."""

    value: Tensor
    size: Tensor


def layer(
    call: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    weight_threshold: float,
    activation_threshold: float,
) -> list[Exact]:
    """[output, input gradient, weight gradient, bias gradient if there is one], float64.

    The paper's equations 1 to 3: forward and input gradient see Top-K weights, the weight gradient
    is dense and sees Top-K activations.
    """
    b = None if bias is None else bias.detach().double()
    tensors = (
        x.detach().double(),
        masked(weight.detach(), weight_threshold),
        masked(x.detach(), activation_threshold),
        b,
        grad.detach().double(),
    )
    values = _products(call, *tensors)
    sizes = _products(call, *(None if t is None else t.abs() for t in tensors))
    return [Exact(*pair) for pair in zip(values, sizes, strict=True)]


def _products(
    call: Callable[..., Tensor],
    seen: Tensor | None,
    active: Tensor | None,
    kept: Tensor | None,
    bias: Tensor | None,
    grad: Tensor | None,
) -> list[Tensor]:
    """Output and gradients of one layer, which is linear in all that it gets."""
    assert seen is not None and active is not None
    leaves = [seen.requires_grad_(), *([] if bias is None else [bias.requires_grad_()])]
    out = call(seen, active, bias)
    input_grad, *bias_grad = torch.autograd.grad(out, leaves, grad)
    dense = torch.zeros_like(active).requires_grad_()
    (weight_grad,) = torch.autograd.grad(call(kept, dense, None), dense, grad)
    return [out.detach(), input_grad, weight_grad, *bias_grad]


def assert_equal(found: Sequence[Tensor], wanted: Sequence[Exact], limit: float = 1e-6) -> None:
    """Fail where an element is further off than rounding: `limit` of its terms' magnitudes."""
    names = ("output", "input gradient", "weight gradient", "bias gradient")
    assert len(found) == len(wanted)
    for name, one, exact in zip(names, found, wanted, strict=False):
        assert one.shape == exact.value.shape, name
        off = (one.double() - exact.value).abs()
        worst = float((off / (exact.size + 1e-30)).max()) if off.numel() else 0.0
        assert worst < limit, f"{name} is off by {worst:.2g} of its terms"
