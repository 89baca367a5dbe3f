"""Structured sparse convolutions (SSC): fixed patterns of active weights, from shapes alone.

Verma et al., Pushing the Efficiency Limit Using Structured Sparse Convolutions. A layer's pattern
is the sum of two kernels. In the first, filter n has a slice of five taps of a 3x3 kernel on every
g-th input channel, m = n (mod g); in the second, the single tap at the centre on every p-th input
channel, m = n (mod p). A 1x1 convolution or a linear layer has the second kernel only.

Reconstructed, not read: the construction was found from the counts in the paper's supplement, which
gives settings of (g, p) beside the fraction of parameters that remains. They fix how many weights a
kernel has, 5/(9g) + 1/(9p) of a 3x3 layer and 1/p of a 1x1 layer, but not which. So these are
options: the taps of the slice (`taps`), the number of channels by which the pattern moves from one
filter to the next (`shift`), and whether a centre tap that both kernels have counts as two weights
or as one (`overlap`). A mask keeps such a tap once; it cannot say more.

Where g or p passes the number of input channels C (a depthwise convolution has C = 1), C stands in
for it, so that every filter reads something. Groups: channels are numbered within a filter's group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from swatfx.density import Density
from swatfx.errors import PolicyError, UnknownNameError

OVERLAPS = ("sum", "union")

# Whether a tap belongs to the slice, by its distances from the centre along the dimensions in which
# the kernel is longer than 1. The centre, distance 0, belongs to each. "plus" is the centre's row
# and column (5 of 3x3, 9 of 5x5, 7 of 3x3x3, all of a 1d kernel), "x" its diagonals (5, 9, 9, all).
TAPS: dict[str, Callable[[Sequence[int]], bool]] = {
    "plus": lambda away: sum(distance > 0 for distance in away) <= 1,
    "x": lambda away: len(set(away)) <= 1,
}


class SscKept(NamedTuple):
    """Fraction of a layer's weights that an SSC keeps, counted in three ways.

    Attributes:
        formula: t/(K g) + 1/(K p) for a kernel of K taps of which the slice has t, 1/p where K = 1:
            what the paper's settings are counted by. 5/(9g) + 1/(9p) for 3x3.
        summed: the weights of both kernels as they are constructed, each counted. Equal to the
            formula where g and p divide C, or where at shift 1 they divide F and are at most C.
        union: the weights that the mask keeps.
    """

    formula: Fraction
    summed: Fraction
    union: Fraction


def ssc_mask(
    weight_shape: Sequence[int],
    g: int,
    p: int,
    *,
    taps: str = "plus",
    shift: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Active weights of a structured sparse convolution: the union of its two kernels.

    Args:
        weight_shape: (F, C / groups, *kernel) of a convolution in any number of dimensions, or
            (out, in).
        g: filter n has the slice on the input channels m = shift * n (mod g); without effect on
            kernels of one tap.
        p: likewise for the single tap at the centre.
        taps: of the slice, a name in `TAPS`.
        shift: channels by which the pattern moves from one filter to the next; 0 lets all filters
            read the same channels.
        device: of the result.

    Returns:
        Bool tensor of `weight_shape`.

    Raises:
        PolicyError: g, p or shift is not a whole number in range, or the kernel has an even size.
        UnknownNameError: no such taps.
    """
    filters, channels, *kernel = weight_shape
    inside = _taps(kernel, taps)
    _check(g, p, shift)
    ones = (1,) * len(kernel)
    single = _reads(filters, channels, p, shift, device).view(filters, channels, *ones)
    if len(inside) == 1:
        return single
    centre = torch.arange(len(inside), device=device).view(*kernel) == len(inside) // 2
    slices = _reads(filters, channels, g, shift, device).view(filters, channels, *ones)
    around = torch.tensor(inside, device=device).view(*kernel)
    return (slices & around) | (single & centre)


def ssc_kept(
    weight_shape: Sequence[int], g: int, p: int, *, taps: str = "plus", shift: int = 1
) -> SscKept:
    """Fraction of the weights that `ssc_mask` of the same arguments keeps; raises what it raises.

    By arithmetic: no mask is built.
    """
    filters, channels, *kernel = weight_shape
    inside = _taps(kernel, taps)
    _check(g, p, shift)
    one, many, of = len(inside) == 1, sum(inside), len(inside)
    formula = Fraction(1, p) if one else Fraction(many, of * g) + Fraction(1, of * p)
    g, p = min(g, channels), min(p, channels)
    single = _count_reads(filters, channels, p, shift)
    # Both kernels read a channel that is shift * n modulo g and modulo p.
    both = _count_reads(filters, channels, math.lcm(g, p), shift)
    slices = 0 if one else _count_reads(filters, channels, g, shift) * many
    elements = filters * channels * of
    summed = Fraction(slices + single, elements)
    return SscKept(formula, summed, summed if one else summed - Fraction(both, elements))


def ssc_density(
    weight_shape: Sequence[int],
    g: int,
    p: int,
    *,
    taps: str = "plus",
    shift: int = 1,
    overlap: str = "sum",
) -> Density:
    """Density of a layer's weight, exact: the paper's count ("sum"), or the mask's ("union").

    The sum passes 1 for kernels that the slice covers whole (1d, g = 1): they are dense. Raises
    what `ssc_mask` raises, and UnknownNameError for `overlap`.
    """
    if overlap not in OVERLAPS:
        raise UnknownNameError("overlap rule of SSC", overlap, OVERLAPS)
    kept = ssc_kept(weight_shape, g, p, taps=taps, shift=shift)
    exact = min(Fraction(1), kept.summed if overlap == "sum" else kept.union)
    return Density(float(exact), exact)


def _reads(
    filters: int, channels: int, period: int, shift: int, device: torch.device | str
) -> Tensor:
    """Bool [F, C]: whether filter n reads channel m, m = shift * n (mod period)."""
    period = min(period, channels)
    first = torch.arange(filters, device=device) * shift % period
    channel = torch.arange(channels, device=device) % period
    rows = channel.unsqueeze(0) == torch.arange(period, device=device).unsqueeze(1)
    return rows[first]


def _count_reads(filters: int, channels: int, period: int, shift: int) -> int:
    """The number of channels m < `channels` with m = shift * n (mod period), over all filters."""
    return sum((channels - 1 - shift * n % period) // period + 1 for n in range(filters))


def _taps(kernel: Sequence[int], taps: str) -> list[bool]:
    """Whether each tap, in row-major order, belongs to the slice."""
    if taps not in TAPS:
        raise UnknownNameError("tap pattern of SSC", taps, TAPS)
    if any(size % 2 == 0 for size in kernel):
        raise PolicyError(
            "SSC wants a kernel with a centre tap, of odd size in every dimension",
            value="x".join(str(size) for size in kernel),
            remedy="keep such layers dense: swatfx.per_layer({name: 'dense'}, default=policy)",
        )
    places = itertools.product(*(range(size) for size in kernel))
    long = [d for d, size in enumerate(kernel) if size > 1]
    return [TAPS[taps]([abs(at[d] - kernel[d] // 2) for d in long]) for at in places]


def _check(g: int, p: int, shift: int) -> None:
    for name, value, least in (("g", g, 1), ("p", p, 1), ("shift", shift, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise PolicyError(
                f"{name} of SSC must be a whole number, at least {least}",
                value=value,
                remedy="g=4, p=8 keep 5/36 + 1/72 of a 3x3 layer and 1/8 of a 1x1 layer",
            )
