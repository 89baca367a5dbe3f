"""Tensors of a case: memory orders as views of what is stored, and data to fill them with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ORDERS = (
    "contiguous",
    "channels_last",
    "batch_innermost",
    "permuted",
    "sliced",
    "narrowed",
    "expanded",
)


def permutation(order: str, dims: int, seed: int) -> tuple[int, ...]:
    """Order in which dimensions are stored, slowest first."""
    if order == "channels_last" and dims > 2:
        return (0, *range(2, dims), 1)
    if order == "batch_innermost" and dims > 1:
        return (*range(1, dims), 0)
    if order == "permuted":
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randperm(dims, generator=generator).tolist())
    return tuple(range(dims))


def stored_shape(shape: Sequence[int], order: str, seed: int) -> tuple[int, ...]:
    """Shape of the contiguous tensor that `seen` makes one of `shape` from."""
    shape = tuple(shape)
    if order == "sliced":
        return (*shape[:-1], 2 * shape[-1] + 1)
    if order == "narrowed":
        return tuple(n + 2 if d == seed % len(shape) else n for d, n in enumerate(shape))
    if order == "expanded":
        return tuple(1 if d == seed % len(shape) else n for d, n in enumerate(shape))
    return tuple(shape[d] for d in permutation(order, len(shape), seed))


def seen(stored: Tensor, shape: Sequence[int], order: str, seed: int) -> Tensor:
    """The view of `stored` that has `shape`; of ops that tracing follows."""
    shape = tuple(shape)
    if order == "sliced":
        return stored[..., 1::2]
    if order == "narrowed":
        dim = seed % len(shape)
        return stored.narrow(dim, 1, shape[dim])
    if order == "expanded":
        return stored.expand(shape)
    stored_as = permutation(order, len(shape), seed)
    if stored_as == tuple(range(len(shape))):
        return stored
    return stored.permute([stored_as.index(d) for d in range(len(shape))])


def draw(shape: Sequence[int], seed: int, grid: bool, dtype: torch.dtype) -> Tensor:
    """Normal numbers; or whole ones up to 8, whose products add up exactly in any order."""
    generator = torch.Generator().manual_seed(seed)
    if grid:
        return torch.randint(-8, 9, tuple(shape), generator=generator).to(dtype)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def laid_out(x: Tensor, order: str, seed: int) -> Tensor:
    """A copy of `x` in a memory order; "expanded" repeats one of its slices."""
    if not x.numel():
        return x.clone()
    shape = stored_shape(x.shape, order, seed)
    if order == "expanded":
        return x.narrow(seed % x.dim(), 0, 1).clone().expand(x.shape)
    out = seen(x.new_zeros(shape), x.shape, order, seed)
    return out.copy_(x)
