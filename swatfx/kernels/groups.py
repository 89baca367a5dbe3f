"""What the Top-K kernels ask of a tensor, and how its groups lie in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from swatfx.kernels import library

# Bits, without the sign, from which on a float is NaN.
NAN_FROM = {torch.float32: 0x7F800001, torch.float16: 0x7C01, torch.bfloat16: 0x7F81}


def plain(*tensors: Tensor) -> bool:
    """Whether kernels are there and `tensors` are memory on the host, with nothing to record."""
    if not library.available() or _get_current_dispatch_mode() is not None:
        return False
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or not t.is_cpu:
            return False
        if t.requires_grad and torch.is_grad_enabled():
            return False
    return True


def rankable(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels can rank `x`, and read the others."""
    return x.dtype in NAN_FROM and x.numel() > 0 and plain(x, *others)


@dataclass(frozen=True)
class Matrices:
    """A tensor in memory: `blocks` matrices of `rows` by `columns`, each column a group.

    Attributes:
        blocks: of matrices, one behind the other.
        rows: elements of a group.
        columns: groups of a matrix, their elements side by side.
        order: the tensor's dimensions as they lie in memory, outermost first.
    """

    blocks: int
    rows: int
    columns: int
    order: tuple[int, ...]

    def gather(self, thresholds: Tensor) -> Tensor:
        """Thresholds of shape () or one a group -> vector in memory order."""
        if thresholds.dim() == 0:
            return thresholds
        return thresholds.permute(self.order).reshape(-1).contiguous()

    def spread(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of `gather`, contiguous: `shape` is that of the thresholds."""
        if not shape:
            return flat.view(())
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        in_order = flat.view([shape[d] for d in self.order]).permute(back)
        return in_order.reshape(-1).view(tuple(shape))


@functools.lru_cache(maxsize=4096)
def _matrices(
    size: tuple[int, ...], stride: tuple[int, ...], groups: tuple[int, ...]
) -> Matrices | None:
    """None if the tensor has gaps, or groups that are no columns of matrices."""
    # Dimensions of size 1 lie anywhere.
    order = sorted(range(len(size)), key=lambda d: (size[d] > 1, -stride[d]))
    elements = 1
    for d in reversed(order):
        if size[d] > 1 and stride[d] != elements:
            return None
        elements *= size[d]
    counts, at = [1, 1, 1], 0  # blocks, rows, columns
    for d in order:
        grouped = bool(groups) and groups[d] != 1
        if size[d] == 1:
            continue
        if grouped == (at == 1):  # a row's dimension behind blocks, or a group's behind rows
            at += 1
        if at > 2:
            return None
        counts[at] *= size[d]
    blocks, rows, columns = counts
    return Matrices(blocks, rows, columns, tuple(order))


def matrices(x: Tensor, groups: Sequence[int]) -> Matrices | None:
    """How groups of `x` lie in memory.

    Args:
        x: any tensor.
        groups: () for one group, or the size of `x` where a dimension tells groups apart, else 1.
    """
    return _matrices(x.shape, x.stride(), tuple(groups))
