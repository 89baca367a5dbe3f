"""Exact k-th largest magnitude in O(n), in plain torch: a radix search over the floats' bits.

The bit pattern of a non-negative float orders like the float, so the k-th largest is found digit
by digit from histograms. Only counts are needed, so ranks can sum theirs and find the threshold of
the tensor that none of them holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swatfx.density import Density
from swatfx.tensors.replaceable import Replaceable

Reduce = Callable[[Tensor], Tensor]  # int64 counts -> their sum over ranks
# (digits found so far, shift, width) -> int64 counts [1 << width] of the digit at `shift`, among
# the keys that have those digits above it. Digits are asked for from the highest down.
Counter = Callable[[int, int, int], Tensor]

_SMALL = 1 << 16  # below this, quickselect beats three histograms
_DIGITS = {
    torch.float32: (torch.int32, ((20, 11), (9, 11), (0, 9))),
    torch.float64: (torch.int64, ((52, 11), (39, 13), (26, 13), (13, 13), (0, 13))),
}


def kth_magnitude(scores: Tensor, density: Density, reduce: Reduce | None = None) -> Tensor:
    """Threshold of a whole tensor: its k-th largest score, k = density.count(n); 0-dim.

    Args:
        scores: non-negative floats of any shape.
        density: how many to keep.
        reduce: sums int64 counts over ranks; the threshold is then that of all ranks' scores.
    """
    flat = scores.reshape(-1)
    total = flat.numel()
    if reduce is not None:
        total = int(reduce(torch.tensor([total], device=flat.device)).item())
    k = density.count(total)
    if k >= total:
        return scores.new_zeros(())
    if reduce is None and total < _SMALL:
        return _kth_of_rows(flat.unsqueeze(0), k).squeeze()
    wide = flat if flat.dtype in _DIGITS else flat.float()  # exact for half and bfloat16
    integer, digits = _DIGITS[wide.dtype]
    count = digit_counter.reference(wide) if reduce is None else digit_counter(wide)
    found = 0
    for shift, width in digits:
        counts = count(found, shift, width)
        if reduce is not None:
            counts = reduce(counts)
        at_least = counts.flip(0).cumsum(0)
        index = int((at_least < k).sum().item())  # digits above the one that holds the k-th
        k -= int(at_least[index - 1].item()) if index else 0
        found |= (1 << width) - 1 - index << shift
    return torch.tensor(found, dtype=integer, device=flat.device).view(wide.dtype).to(flat.dtype)


@Replaceable
def digit_counter(scores: Tensor) -> Counter:
    """Counts digits of the bits of `scores`, a vector of non-negative float32 or float64."""
    integer, digits = _DIGITS[scores.dtype]
    keys = scores.view(integer)

    def count(found: int, shift: int, width: int) -> Tensor:
        nonlocal keys
        if (shift, width) != digits[0]:
            above = shift + width
            keys = keys[(keys >> above) == found >> above]
        return torch.bincount((keys >> shift) & ((1 << width) - 1), minlength=1 << width)

    return count


@Replaceable
def fused_search(x: Tensor, density: Density, shape: tuple[int, ...]) -> tuple[Tensor, bool] | None:
    """(thresholds of `x.abs()`, whether `x` holds NaN) in one pass, where a kernel can; else None.

    Args:
        x: floats of any shape and sign.
        density: how many to keep.
        shape: () for one threshold, or as in `grouped_kth_magnitude`.
    """
    return None


@Replaceable
def holds_nan(x: Tensor) -> bool:
    """Whether any element is NaN."""
    return bool(torch.isnan(x).any())


def grouped_kth_magnitude(scores: Tensor, density: Density, shape: tuple[int, ...]) -> Tensor:
    """One threshold a group: dimensions where `shape` is not 1 (and scores') index the groups.

    Returns a tensor of `shape`.
    """
    kept = [d for d, n in enumerate(shape) if n != 1 and scores.shape[d] == n]
    rest = [d for d in range(scores.dim()) if d not in kept]
    groups = 1
    for d in kept:
        groups *= scores.shape[d]
    rows = scores.permute(*kept, *rest).reshape(groups, -1)
    k = density.count(rows.shape[1])
    if k >= rows.shape[1]:
        return scores.new_zeros(shape)
    return _kth_of_rows(rows, k).view(shape)


def exact_top(scores: Tensor, density: Density, shape: tuple[int, ...]) -> Tensor:
    """Bool mask of exactly `density.count` of the scores of each group, of scores' shape.

    Of equal scores, those at the lowest index in row-major order are kept: a mask that is held has
    the density that it was asked for, also where many weights are zero.

    Args:
        scores: non-negative floats of any shape.
        density: how many to keep.
        shape: () for one group, or as in `grouped_kth_magnitude`.
    """
    kept = [d for d, n in enumerate(shape) if n != 1 and scores.shape[d] == n]
    order = kept + [d for d in range(scores.dim()) if d not in kept]
    groups = 1
    for d in kept:
        groups *= scores.shape[d]
    moved = scores.permute(order)
    rows = moved.reshape(groups, -1)
    k = density.count(rows.shape[1])
    if not rows.numel() or k >= rows.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    t = kth_magnitude(scores, density) if groups == 1 else _kth_of_rows(rows, k).unsqueeze(1)
    over, ties = rows > t, rows == t
    keep = over | ties & (ties.cumsum(1) <= k - over.sum(1, keepdim=True))
    back = [order.index(d) for d in range(scores.dim())]
    return keep.view(moved.shape).permute(back)


def _kth_of_rows(rows: Tensor, k: int) -> Tensor:
    wide = rows if rows.dtype in _DIGITS else rows.float()
    return wide.kthvalue(wide.shape[1] - k + 1, dim=1).values.to(rows.dtype)


def largest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest `scores` among those where the mask `among` is set.

    Of equal ones, those at the lowest index in row-major order, on every device. NaN is largest.
    """
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    where = among.reshape(-1).nonzero().squeeze(1)
    count = min(count, where.numel())
    if count > 0:
        found = scores.reshape(-1)[where]
        nan = found.isnan()
        last = found.topk(count).values.amin()  # NaN if one is among them
        if bool(last.isnan()) and int(nan.sum().item()) < count:
            last = found.masked_fill(nan, torch.inf).topk(count).values.amin()
        over, ties = (nan & False, nan) if last.isnan() else (nan | (found > last), found == last)
        chosen[where] = over | ties & (ties.cumsum(0) <= count - over.sum())
    return chosen.view(scores.shape)
