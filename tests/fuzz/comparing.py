"""Whether what came out is what the oracle says, to rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# How far a sum of floats may be from the exact one, in units of its largest value: first without,
# then in units of the largest sum of magnitudes, where terms cancel.
NEAR = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 2.0**-8}
SUMMED = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 2.0**-7}


def compare(
    got: Mapping[str, Tensor | None],
    want: Mapping[str, Tensor | None],
    magnitudes: Callable[[], Mapping[str, float]],
    precision: torch.dtype,
    exact: bool,
) -> list[str]:
    """What differs, a line a tensor.

    Args:
        got: name -> what swatfx made.
        want: name -> in float64.
        magnitudes: name -> the largest sum of magnitudes, asked for if it matters.
        precision: that `got` was computed in.
        exact: no difference is rounding.
    """
    problems = []
    for name, right in want.items():
        mine = got[name]
        if mine is None or right is None:
            if (mine is None) != (right is None):
                problems.append(f"{name} is {'missing' if mine is None else 'there'}")
            continue
        if mine.shape != right.shape:
            problems.append(f"{name} has shape {tuple(mine.shape)}, not {tuple(right.shape)}")
            continue
        if not right.numel() or torch.equal(mine.double(), right):
            continue
        error = float((mine.double() - right).abs().max())
        size = float(right.abs().max())
        if not exact and error <= NEAR[precision] * size:
            continue
        if not exact and error <= SUMMED[precision] * magnitudes().get(name, 0.0):
            continue
        count = int(((mine.double() - right).abs() > 1e-6 * size).sum())
        problems.append(f"{name} off by {error / (size or 1):.2g} ({count} of {right.numel()})")
    return problems
