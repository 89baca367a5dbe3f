"""What of a batch norm's input is coded (`swatfx.ops.codes`), and where ReLU's border lies in it.

Bias gradients, and in evaluation input gradients, have no error: they are of ReLU's mask, which is
exact. Those of weights have most, since x-hat stands under their sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swatfx.ops.codes import encode
from swatfx.ops.saved import active_bits


class NormCode(NamedTuple):
    """How a norm is coded: whether ReLU follows, and an addition before it; bits; memory order."""

    relu: bool
    has_residual: bool
    saves: str
    layout: str


def per_channel(values: Tensor, dims: int) -> Tensor:
    """`values` (C,) as they meet a tensor of so many dimensions."""
    return values.view(1, -1, *[1] * (dims - 2))


def encode_norm(
    how: NormCode,
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    found: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """uint8 [bytes] for `x`, of which a norm (with what follows it) has `found` y, mean, invstd.

    The codes of x-hat, and behind them, where a residual stands between norm and ReLU, the bits of
    ReLU's mask. Without one the border of the codes is where ReLU starts: it lets through what is
    above, or, where the weight is negative, what is below.
    """
    y, mean, invstd = found
    dtype, dims = torch.promote_types(x.dtype, torch.float32), x.dim()
    normed = x.to(dtype) - per_channel(mean.to(dtype), dims)
    normed = normed * per_channel(invstd.to(dtype), dims)
    if not how.relu or how.has_residual:
        code = encode(normed, how.layout, how.saves)
        return torch.cat([code, active_bits(y, how.layout)]) if how.relu else code
    one = torch.ones_like(invstd, dtype=dtype)
    weight = one if affine[0] is None else affine[0].to(dtype)
    bias = torch.zeros_like(one) if affine[1] is None else affine[1].to(dtype)
    # With a weight of 0 all of a channel passes or nothing: a border anywhere will do.
    tie = torch.where(weight == 0, -torch.inf, -bias / weight)
    above = torch.logical_not(y <= 0) == per_channel(weight >= 0, dims)
    return encode(normed, how.layout, how.saves, tie, above)
