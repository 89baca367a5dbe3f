"""State of copies whose buffers were averaged with those of other models, as EMA and SWA do.

Averaging moves numbers that mean nothing halfway: the bits of a mask, an exact fraction. What can
be told to be broken is taken anew, from the averaged weights.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swatfx.density import Density
from swatfx.selectors import Axes, Held, RandomSelector
from swatfx.selectors.topk import largest
from swatfx.tensors import bits

if TYPE_CHECKING:
    from swatfx.compiled.state import WeightThreshold

_NEAR = 1e-6  # what averaging one density with itself may move it by


@torch.no_grad()
def mend(threshold: WeightThreshold, weight: Tensor) -> None:
    """Put right what averaging has broken; nothing, where it broke nothing.

    A held mask is whole if it holds as many weights as the integers beside it say. One that does
    not, though weights outside of it are not zero, becomes that of the largest averaged weights, at
    the averaged density.
    """
    selector = threshold.chosen
    if not (threshold.is_held and isinstance(selector, Held)) or weight.is_meta:
        _mend_density(threshold)
        return
    weight = weight.detach()
    keep = selector.keep(weight, threshold.threshold, Axes(0, 1))
    active, size = int(keep.sum().item()), keep.numel()
    numerator, denominator = threshold.fraction.tolist()
    told = Density(active / max(size, 1)) if (active, 0) == (numerator, denominator) else None
    if 0 < numerator <= denominator:
        told = Density(numerator / denominator, Fraction(numerator, denominator))
    if told is not None and active in (told.count(size), told.count_within(size)):
        threshold.density.fill_(told.value)
        return
    _mend_density(threshold)
    density = threshold.density_now
    within = density.count_within(size)
    if active in (density.count(size), within) or not weight[~keep].any():
        return
    if not isinstance(selector.base, RandomSelector):
        # Slices are kept whole, and groups have so many each: how many, only the selector knows.
        fresh = selector.keep(weight, selector.state(weight, density, Axes(0, 1), 0), Axes(0, 1))
        if active == int(fresh.sum().item()):
            return
    if isinstance(selector.base, RandomSelector):
        mask = largest(torch.nan_to_num(weight.abs()), torch.ones_like(keep), within)
        threshold.threshold.copy_(bits.mask_to_bits(mask))
    else:
        threshold.recompute(weight)


def _mend_density(threshold: WeightThreshold) -> None:
    """Densities keep their average; the exact fraction, where it is not theirs, goes."""
    value = float(threshold.density.item())
    numerator, denominator = threshold.fraction.tolist()
    if denominator > 0 and abs(numerator / denominator - value) < 1e-15:
        return
    if abs(value - threshold.planned.value) < _NEAR:
        threshold.set_density(threshold.planned)
    else:
        threshold.set_density(Density(min(max(value, _NEAR), 1.0)))
