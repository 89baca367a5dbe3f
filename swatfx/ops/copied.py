"""State of weights in copies of a model: loops of others average their buffers, or leave them out.

Averaging moves numbers that mean nothing halfway: the bits of a mask, an exact fraction. And a loop
that averages weights alone leaves the masks of the moment of copying, which the weights outgrow.
What can be told to be broken, or left behind, is taken anew from the weights as they are. Copies
are deep copies, and models that loaded a state, until an optimizer is attached.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from swatfx import selectors
from swatfx.density import SAME, Density
from swatfx.errors import SwatWarning
from swatfx.selectors import Axes, Held, RandomSelector
from swatfx.selectors.topk import largest
from swatfx.tensors import bits

_PRIME = 1048573
_MUCH = 0.1  # of the weights' magnitude: averages of one training had up to 0.06, of several 0.2
_LEFT_BEHIND = (
    "weights of a copied model have moved outside of its masks, which nobody wrote since: as of an"
    " average that leaves them out. Its largest weights are active now, in place of its masks."
    " Average with torch.optim.swa_utils.AveragedModel, or copy the buffers below swat. at every"
    " update, for the masks of the source; to keep the copy's, set the weights outside to zero"
)

_REPLACED = (
    "a parameter of a copied model was replaced by one with weights outside of its mask. Its"
    " largest weights are active now. To keep the mask, set the weights outside to zero first"
)
_LOADED = (
    "of layer {layer!r}, {share:.0%} of the magnitude of the weights that were loaded lies outside"
    " of the mask that came with them, where nothing is active. If this is a mean of several"
    " models, load the mean of every entry, integers too: the largest weights are then taken"
)


@dataclass(frozen=True)
class Buffers:
    """What a weight's threshold holds, as the buffers of the same names do."""

    threshold: Tensor
    density: Tensor
    fraction: Tensor
    is_held: bool


@dataclass(frozen=True)
class Mended:
    """What should stand in the buffers.

    Attributes:
        mask: in place of the one that is there; None: that is right.
        density: the target.
        keeps_fraction: whether the buffer `fraction` says so as it is.
    """

    mask: Tensor | None
    density: Density
    keeps_fraction: bool


@dataclass(frozen=True)
class _Note:
    """A held mask and its weight when they were known to belong together."""

    version: int | None
    mask: Tensor
    was_held: bool
    density: float
    sums: tuple[float, float]
    zeroed: bool
    is_ours: bool


class Copied:
    """What is known of one weight's state in a copy.

    Args:
        planned: the target density when the model was copied.
        owner: the module whose buffer `digest` is `digest_of` the mask, where it has one.
    """

    def __init__(self, planned: Density, owner: nn.Module) -> None:
        self._planned = planned
        self._owner = weakref.ref(owner)
        self._note: _Note | None = None

    @torch.no_grad()
    def note(
        self, selector: str, weight: Tensor, found: Buffers, *, zeroed: bool, is_ours: bool = False
    ) -> None:
        """Take mask and weight as they are for those that belong together.

        Args:
            selector: name of the weight's.
            weight: (F, C, *kernel).
            found: the buffers now.
            zeroed: whether training keeps weights outside of the mask at zero, so that it is known
                to be another's as soon as they move.
            is_ours: whether it was mended.
        """
        self._note = None
        chosen = selectors.get(selector)
        if not isinstance(chosen, Held) or not _has_values(weight):
            return
        self._note = _Note(
            version_of(found.threshold),
            found.threshold.clone(),
            found.is_held,
            float(found.density.item()),
            _sums(weight, chosen.keep(weight, found.threshold, Axes(0, 1))),
            zeroed,
            is_ours,
        )

    @property
    def zeroed(self) -> bool:
        """As `note` was told last."""
        return self._note is not None and self._note.zeroed

    @property
    def is_ours(self) -> bool:
        """Whether the mask is what was mended last."""
        return self._note is not None and self._note.is_ours

    def trust(self) -> None:
        """Take the mask for that of whatever weight comes, until the next note."""
        self._note = None

    def rewritten(self, mask: Tensor) -> None:
        """The mask was written with what it was: the note stays as it is."""
        if self._note is not None:
            self._note = replace(self._note, version=version_of(mask))

    def density(self, density: Tensor, fraction: Tensor) -> tuple[Density, bool]:
        """The target, and whether `fraction` says so: where averaging left it what it was."""
        value = float(density.item())
        numerator, denominator = (int(v) for v in fraction.tolist())
        if denominator > 0 and abs(numerator / denominator - value) < 1e-15:
            return Density(value, Fraction(numerator, denominator)), True
        if abs(value - self._planned.value) < SAME:
            return self._planned, False
        return Density(min(max(value, SAME), 1.0)), False

    @torch.no_grad()
    def mended(self, selector: str, weight: Tensor, found: Buffers, draw: int) -> Mended:
        """What `found` should be for `weight`; nothing changes.

        A held mask is whole if its digest says so. One that is not, though weights outside of it
        are not zero, becomes that of the largest weights, and so does one that its weight left
        behind.
        """
        chosen = selectors.get(selector)
        density, stays = self.density(found.density, found.fraction)
        if not (found.is_held and isinstance(chosen, Held)) or not _has_values(weight):
            return Mended(None, density, stays)
        keep = chosen.keep(weight, found.threshold, Axes(0, 1))
        if self._is_left_behind(weight, keep, found):
            warnings.warn(_LEFT_BEHIND, SwatWarning, stacklevel=2)
        elif self._is_whole(found.threshold):
            told = _told(found.density, found.fraction, keep)
            return Mended(None, density, stays) if told is None else Mended(None, told, True)
        elif not weight[~keep].any():
            return Mended(None, density, stays)
        return Mended(_largest(chosen, weight, density, draw), density, stays)

    @torch.no_grad()
    def of_other(self, selector: str, weight: Tensor, found: Buffers, draw: int) -> Mended | None:
        """What a held `found` should be for a weight that took another's place; None if it fits."""
        chosen = selectors.get(selector)
        if not isinstance(chosen, Held) or not _has_values(weight):
            return None
        if not weight[~chosen.keep(weight, found.threshold, Axes(0, 1))].any():
            return None
        warnings.warn(_REPLACED, SwatWarning, stacklevel=2)
        density, stays = self.density(found.density, found.fraction)
        return Mended(_largest(chosen, weight, density, draw), density, stays)

    def _is_whole(self, mask: Tensor) -> bool:
        owner = self._owner()
        digest = None if owner is None else owner._buffers.get("digest")
        return digest is None or digest.item() == digest_of(mask)

    def _is_left_behind(self, weight: Tensor, keep: Tensor, found: Buffers) -> bool:
        """Whether the mask is that of the note, and the weight is not."""
        note, mask = self._note, found.threshold
        if note is None or note.version != version_of(mask) or not torch.equal(note.mask, mask):
            return False  # whoever wrote it knew what for
        if not note.was_held or abs(float(found.density.item()) - note.density) > SAME:
            return True
        if not (note.zeroed or note.is_ours):
            return False
        sums = _sums(weight, keep)
        return sums[0] != 0 and not all(map(_is_close, sums, note.sums))


def share_outside(selector: str, weight: Tensor, mask: Tensor) -> float:
    """Of the weights' magnitude, what lies outside of a held mask; 0 where none can be."""
    chosen = selectors.get(selector)
    if not isinstance(chosen, Held) or not _has_values(weight):
        return 0.0
    outside, inside = _sums(weight, chosen.keep(weight, mask, Axes(0, 1)))
    return outside / (outside + inside) if outside > 0 else 0.0


def tell_loaded(shares: dict[str, float]) -> None:
    """Warn if much of a layer's loaded weights lies outside of the mask that came with them.

    A little does in averages of one training's models under its last masks.
    """
    layer, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if share > _MUCH:
        warnings.warn(_LOADED.format(layer=layer, share=share), SwatWarning, stacklevel=2)


def digest_of(mask: Tensor) -> int:
    """A number of a bitmask, uint8 [n], that no mean of others' is likely to be.

    Below 2**20, so that float32 holds it.
    """
    places = torch.arange(mask.numel(), dtype=torch.int64, device=mask.device) % 8191 + 1
    return int((places * mask.to(torch.int64) ** 2).sum().item()) % _PRIME


def _told(density: Tensor, fraction: Tensor, keep: Tensor) -> Density | None:
    """What `fraction` says, exactly or by the number of active weights, if that fits the mask."""
    numerator, denominator = (int(v) for v in fraction.tolist())
    active, size = int(keep.sum().item()), keep.numel()
    told = None
    if 0 < numerator <= denominator:
        told = Density(numerator / denominator, Fraction(numerator, denominator))
    elif (active, 0) == (numerator, denominator):
        told = Density(float(density.item()))
        if not _fits(told, active, size):
            told = Density(active / max(size, 1))
    return told if told is not None and _fits(told, active, size) else None


def _fits(density: Density, active: int, size: int) -> bool:
    return active in (density.count(size), density.count_within(size))


def _largest(chosen: Held, weight: Tensor, density: Density, seed: int) -> Tensor:
    """Bitmask of what the selector would keep; where it would draw, of the largest weights."""
    if not isinstance(chosen.base, RandomSelector):
        return chosen.state(weight, density, Axes(0, 1), seed)
    magnitude = weight.abs().nan_to_num(nan=torch.inf)
    within = density.count_within(weight.numel())
    keep = largest(magnitude, torch.ones_like(weight, dtype=torch.bool), within)
    return bits.mask_to_bits(keep)


def version_of(x: Tensor) -> int | None:
    """How often autograd saw it written; None of inference tensors, which nobody counts."""
    return None if x.is_inference() else x._version


def _has_values(weight: Tensor) -> bool:
    """Whether they can be looked at: not on the meta device, nor a shard."""
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta


def _sums(weight: Tensor, keep: Tensor) -> tuple[float, float]:
    """Sum of the magnitudes outside of the mask, and within it."""
    magnitude = weight.detach().abs()
    parts = magnitude.masked_fill(keep, 0), magnitude.masked_fill(~keep, 0)
    outside, inside = (float(part.sum(dtype=torch.float64).item()) for part in parts)
    return outside, inside


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9 * abs(other)
