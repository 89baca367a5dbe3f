"""The selector of structured sparse convolutions: a pattern that no weight decides."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swatfx.density import DENSE, Density
from swatfx.errors import PolicyError
from swatfx.selectors.base import Axes, Selector
from swatfx.selectors.ssc_pattern import OVERLAPS, TAPS, ssc_density, ssc_mask
from swatfx.selectors.topk import Reduce
from swatfx.tensors import bits

SSC = "ssc:"

# One for all layers, or (filters, period) pairs: layers of other numbers of filters stay dense.
Periods = int | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SscSelector(Selector):
    """A fixed pattern a layer: `swatfx.selectors.ssc_pattern.ssc_mask` of its shape.

    Which weights are active depends on g and p, which may differ by the layer's number of filters.
    The density follows, whatever a policy assigns.

    Attributes:
        g: period of the slice; not asked for kernels of one tap.
        p: period of the single tap.
        q: what p is in kernels of one tap (1x1 convolutions, linear layers); None: p.
        taps: of the slice, in `swatfx.selectors.ssc_pattern.TAPS`.
        shift: channels by which the pattern moves from filter to filter.
        overlap: how the density is counted, in `swatfx.selectors.ssc_pattern.OVERLAPS`.
    """

    g: Periods = 1
    p: Periods = 1
    q: Periods | None = None
    taps: str = "plus"
    shift: int = 1
    overlap: str = "sum"

    @staticmethod
    def parse(name: str) -> SscSelector:
        """Read "ssc:g4:p8", "ssc:g64=1/128=2:p64=2/128=2:q64=1/256=2:x:shift0:union" and the like.

        "ssc" is followed by fields in any order, each after a colon: g and p, and if wanted q, with
        one number or with filters=number pairs; the taps' name; shift; how overlap is counted.

        Raises:
            PolicyError: the name does not read so; g and p list different numbers of filters.
        """
        return _parse(name)

    def periods(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """(g, p) of a weight (F, C / groups, *kernel) of `shape`; None where it stays dense."""
        if not math.prod(shape):
            return None
        if math.prod(shape[2:]) == 1:
            p = _of(self.p if self.q is None else self.q, shape[0])
            return None if p is None else (1, p)
        g, p = _of(self.g, shape[0]), _of(self.p, shape[0])
        return None if g is None or p is None else (g, p)

    def own_density(self, shape: tuple[int, ...]) -> Density | None:
        """What the pattern of a weight of `shape` keeps; PolicyError if it has none."""
        found = self.periods(shape)
        if found is None:
            return DENSE
        return ssc_density(shape, *found, taps=self.taps, shift=self.shift, overlap=self.overlap)

    def state_shape(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """A bit a weight."""
        return ((math.prod(shape) + 7) // 8,)

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Bytes of the bitmask."""
        return torch.uint8

    def state(
        self, x: Tensor, density: Density, axes: Axes, seed: int, reduce: Reduce | None = None
    ) -> Tensor:
        """Bitmask of the pattern of weight `x`, whatever its values and `density` are."""
        found = self.periods(tuple(x.shape))
        if found is None:
            return bits.mask_to_bits(torch.ones(x.shape, dtype=torch.bool, device=x.device))
        mask = ssc_mask(x.shape, *found, taps=self.taps, shift=self.shift, device=x.device)
        return bits.mask_to_bits(mask)

    def keep(self, x: Tensor, state: Tensor, axes: Axes) -> Tensor:
        """The stored mask."""
        return bits.bits_to_mask(state, x.numel()).view(x.shape)


def _of(periods: Periods, filters: int) -> int | None:
    return periods if isinstance(periods, int) else dict(periods).get(filters)


@functools.lru_cache
def _parse(name: str) -> SscSelector:
    fields: dict[str, Any] = {}
    for text in name.removeprefix(SSC).split(":"):
        key, value = _field(text, name)
        if key in fields:
            raise _unreadable(name, f"{key} is given twice")
        fields[key] = value
    if not name.startswith(SSC) or not {"g", "p"} <= fields.keys():
        raise _unreadable(name, "g and p are needed")
    g, p = fields["g"], fields["p"]
    if isinstance(g, tuple) and isinstance(p, tuple) and {f for f, _ in g} != {f for f, _ in p}:
        raise _unreadable(name, "g and p list different numbers of filters")
    return SscSelector(name, weights_only=True, fixed_density=True, **fields)


def _field(text: str, name: str) -> tuple[str, Any]:
    if text in TAPS:
        return "taps", text
    if text in OVERLAPS:
        return "overlap", text
    if match := re.fullmatch(r"shift(\d+)", text):
        return "shift", int(match[1])
    if match := re.fullmatch(r"([gpq])([1-9]\d*)", text):
        return match[1], int(match[2])
    if match := re.fullmatch(r"([gpq])(\d+=[1-9]\d*(/\d+=[1-9]\d*)*)", text):
        pairs = [pair.split("=") for pair in match[2].split("/")]
        periods = tuple((int(filters), int(period)) for filters, period in pairs)
        if len(dict(periods)) < len(periods):
            raise _unreadable(name, f"{match[1]} lists a number of filters twice")
        return match[1], periods
    raise _unreadable(name, f"{text!r} is no field of it")


def _unreadable(name: str, problem: str) -> PolicyError:
    return PolicyError(
        f"cannot read the pattern of SSC: {problem}",
        value=name,
        remedy='write "ssc:g4:p8", or by number of filters "ssc:g64=2/128=4:p64=2/128=16",'
        ' then if wanted ":q2" for 1x1 kernels, ":x", ":shift0", ":union"',
    )
