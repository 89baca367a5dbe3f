"""What a compiled model remembers: its clock and its layers' thresholds, as leaf modules.

Everything that changes while training lives here in buffers under `swat.`, so that torch.compile
sees one graph and a checkpoint holds all that resuming needs. Evaluation changes none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swatfx import ops, selectors
from swatfx.density import Density
from swatfx.ops import direct
from swatfx.ops.autocast import autocast_dtype
from swatfx.ops.copied import Buffers, Copied, Mended, share_outside
from swatfx.ops.current import Ranked, recall
from swatfx.ops.recomputed import History
from swatfx.ops.state import (
    CALLS,
    check_rankable,
    compute_state,
    draw_seed,
    read_density,
    unchanged,
)
from swatfx.selectors import Axes, Selector
from swatfx.tensors import layouts


def is_traced() -> bool:
    """Whether values are not there to be looked at."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


class Threshold(nn.Module):
    """One tensor's selection state, refreshed every `period` training iterations.

    Buffers: `threshold` (the selector's state), `stamp` (iteration of its last refresh), `density`
    and `fraction`. What a recomputation in backward may need of the past is in `history`.
    Stamp, density and fraction stay on the host in their own dtype, wherever the model is moved to:
    the host reads them at every step, and 0.1 in half precision would be another density.
    A spare one belongs to calls that earlier versions had no graph for, and had no state of.
    """

    threshold: Tensor
    density: Tensor
    fraction: Tensor
    stamp: Tensor

    def __init__(
        self,
        layer: str,
        selector: str,
        density: Density,
        *,
        state: Tensor,
        period: int,
        spatial: int,
        is_weight: bool,
        seed: int,
        all_ranks: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.selector = selector
        self.period = period
        self.spatial = spatial
        self.is_weight = is_weight
        self.is_spare = False
        self.seed = seed
        self.all_ranks = all_ranks
        self.history = History()
        self.is_parameter = False  # set where it is known to be one, not computed at every forward
        self.register_buffer("threshold", state)
        self.register_buffer("density", torch.zeros((), dtype=torch.float64, device="cpu"))
        self.register_buffer("fraction", torch.zeros(2, dtype=torch.int64, device="cpu"))
        self.register_buffer("stamp", torch.full((), -1, dtype=torch.int64, device="cpu"))
        self.set_density(density)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Threshold:
        self._buffers["threshold"] = fn(self.threshold)
        self.history.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.history.forget()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def chosen(self) -> Selector:
        """The selector itself."""
        return selectors.get(self.selector)

    def set_density(self, density: Density) -> None:
        """Change the target; it takes effect at the next refresh."""
        exact = density.exact
        self.density.fill_(density.value)
        pair = (0, 0) if exact is None else (exact.numerator, exact.denominator)
        self.fraction.copy_(torch.tensor(pair, device="cpu"))

    def check(self, x: Tensor) -> None:
        """Raise InputError if `x` has to be ranked and cannot be."""
        if not read_density(self.density, self.fraction).is_dense:
            check_rankable(x.detach(), self.layer, self.is_weight)

    @property
    def _last_refresh(self) -> int:
        """Iteration of the last refresh, which seeds random draws; 0 before the first."""
        return max(int(self.stamp.item()), 0)

    def recompute(self, x: Tensor) -> None:
        """Set the state from `x` now, whatever the iteration."""
        if x.is_meta:
            return
        state = compute_state(
            x.detach(),
            read_density(self.density, self.fraction),
            self.selector,
            layer=self.layer,
            spatial=self.spatial,
            is_weight=self.is_weight,
            seed=self.seed,
            iteration=self._last_refresh,
        )
        self.threshold.copy_(state)
        self.history.forget()

    def _refresh(self, x: Tensor, step: Tensor, held: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling() and (self.is_weight or not self.chosen.groups):
            # Torch's way to them is by a function of Python each.
            buffers: dict[str, Any] = self._buffers
            known = unchanged(
                x,
                buffers["threshold"],
                buffers["stamp"],
                step,
                held,
                period=self.period,
                own=self.is_parameter,
                history=self.history,
            )
            if known is not None:
                return known
        result: tuple[Tensor, Tensor, Tensor] = ops.refresh(
            x.detach(),
            self.threshold,
            self.stamp,
            step,
            self.density,
            self.fraction,
            self.period,
            self.selector,
            self.layer,
            self.spatial,
            self.is_weight,
            self.seed,
            self.all_ranks,
            self.history.token,
            autocast_dtype(x) == torch.float16,
            self.is_parameter,
            held,
        )
        use, threshold, stamp = result
        if is_traced() or not self.is_held:
            self.threshold.copy_(threshold)
        self.stamp.copy_(stamp)
        return use

    @property
    def is_held(self) -> bool:
        """Whether the state stays as it is."""
        return False


class WeightThreshold(Threshold):
    """State of a weight; valid from the start.

    In evaluation it is not read, and not written: what is active is selected from the weight as it
    is. Once held, no forward refreshes it, and evaluation reads it: what `swatfx.attach` hangs on
    the optimizer may change it. Those that can be held are `swatfx.compiled.held.HeldThreshold`s.
    """

    held: Tensor | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("held", None)
        self.remembered = Ranked()
        self.came_along = False  # with what was loaded last

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.came_along = f"{prefix}threshold" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def density_now(self) -> Density:
        """The target as it is now."""
        return read_density(self.density, self.fraction)

    @property
    def _now(self) -> Buffers:
        return Buffers(self.threshold, self.density, self.fraction, self.is_held)

    @property
    def _draw(self) -> int:
        return draw_seed(self.seed, self.layer, self._last_refresh, True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.become_copy()

    def note(self, weight: Tensor, *, zeroed: bool) -> None:
        """Take the mask of a copy for that of `weight` as it is; elsewhere nothing.

        Args:
            weight: (F, C, *kernel).
            zeroed: whether training keeps weights outside of a held mask at zero.
        """
        copied = self.remembered.copied
        if copied is not None:
            flags = {"zeroed": zeroed, "is_ours": copied.is_ours}
            copied.note(self.selector, weight.detach(), self._now, **flags)
            self.remembered.forget()

    def become_copy(self) -> None:
        """What is known of a copy is known of this from now on."""
        self.remembered.copied = Copied(self.density_now, self)

    @property
    def is_copy(self) -> bool:
        """Whether others may write here, and have: see `swatfx.ops.copied`."""
        return self.remembered.copied is not None

    def become_own(self) -> None:
        """Be changed by what trains this model from now on, and by nothing else."""
        self.remembered.copied = None

    def trust(self) -> None:
        """Of a copy: take the mask for right, which somebody wrote who knows."""
        if self.remembered.copied is not None:
            self.remembered.copied.trust()
            self.remembered.forget()

    def take_loaded(self, weight: Tensor, *, zeroed: bool, is_copy: bool) -> float:
        """After `load_state_dict`: what came along belongs to what came along.

        What was loaded may be the mean of others' entries: then as `mend`.

        Args:
            weight: (F, C, *kernel).
            zeroed: as of `note`.
            is_copy: whether no optimizer is attached.

        Returns:
            How much of the weight lies outside of a mask outside of which training leaves nothing.
        """
        if self.came_along:
            self.trust()
        known = self.remembered.copied or Copied(self.density_now, self)
        self._take(known.mended(self.selector, weight.detach(), self._now, self._draw), weight)
        share = 0.0
        if self.came_along and zeroed and self.is_held:
            share = share_outside(self.selector, weight.detach(), self.threshold)
        if self.came_along and is_copy:
            self.become_copy()
            self.note(weight, zeroed=zeroed)
        self.came_along = False
        return share

    def take_dense(self) -> None:
        """After `load_state_dict` of weights alone, which supplies our own state."""
        self.came_along = False
        if self.remembered.copied is not None:
            self.remembered.copied.rewritten(self.threshold)
            self.remembered.forget()

    def _mended(self, weight: Tensor) -> Mended | None:
        if is_traced():
            return None
        return self.remembered.mended(self.selector, weight.detach(), self._now, self._draw)

    def mend(self, weight: Tensor) -> None:
        """Put right what averaging has broken in a copy, or left behind; nothing, if nothing."""
        told = self._mended(weight)
        if told is not None:
            self._take(told, weight)

    @torch.no_grad()
    def _take(self, told: Mended, weight: Tensor) -> None:
        if not told.keeps_fraction:
            self.set_density(told.density)
        elif self.density.item() != told.density.value:
            self.density.fill_(told.density.value)
        self.settle()
        if told.mask is None:
            return
        self.threshold.copy_(told.mask)
        self.seal()
        self.history.forget()
        copied = self.remembered.copied
        if copied is not None:
            flags = {"zeroed": copied.zeroed, "is_ours": True}
            copied.note(self.selector, weight.detach(), self._now, **flags)

    def seal(self) -> None:
        """Note that a held mask is whole."""

    def settle(self) -> None:
        """Make yes or no again of flags that were averaged."""

    def make_room(self, weight: Tensor) -> None:
        """Take the shape that the state of `weight` has."""
        state = initial_state(weight, weight, self.selector, self.spatial, True)
        self._buffers["threshold"] = state
        self.history.forget()
        self.remembered.forget()

    @torch.no_grad()
    def renew(self, weight: Tensor, *, zeroed: bool, same: bool) -> None:
        """Serve `weight`, which took another's place.

        A held mask stays for the same values, and in a copy for others, too; there it becomes that
        of the largest weights where training would have left none of those outside of it. Otherwise
        weights are selected anew, at the density as it is now.

        Args:
            weight: (F, C, *kernel).
            zeroed: as of `note`.
            same: whether its values are those of the other.
        """
        if self._stays(weight, zeroed, same):
            self.history.forget()
            self.remembered.forget()
            self.note(weight, zeroed=zeroed)
            return
        self.make_room(weight)
        self.stamp.fill_(-1)
        self.recompute(weight)

    def _stays(self, weight: Tensor, zeroed: bool, same: bool) -> bool:
        """Whether the held mask serves `weight`, too; in a copy it is made to."""
        shape = initial_state(weight, weight, self.selector, self.spatial, True).shape
        if not self.is_held or shape != self.threshold.shape or weight.is_meta:
            return False
        if same:
            return True
        known = self.remembered.copied
        if known is None or self.threshold.device != weight.device:
            return False
        told = None
        if zeroed:
            told = known.of_other(self.selector, weight.detach(), self._now, self._draw)
        if told is not None:
            self._take(told, weight)
        return True

    def forward(self, weight: Tensor, step: Tensor) -> Tensor:
        """Return the state to use now."""
        if self.training:
            if self.is_copy and not is_traced() and self.is_held:
                with torch.no_grad():
                    self.mend(weight)  # batch norms may be measured with an average
            return self._refresh(weight, step, self.held)
        weight = weight.detach()
        decides = self.threshold, self.stamp, step, self.density, self.fraction
        found = None
        if not torch.compiler.is_compiling():
            found = recall(self.remembered, self.held, weight, *decides)
            if found is not None:
                return found
        told = self.selector, self.layer, self.seed, self.remembered.token, self.held
        state: Tensor = ops.current(weight, *decides, *told)
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            found = recall(self.remembered, self.held, weight, *decides)
        return state if found is None else found

    def state_now(self, weight: Tensor) -> Tensor:
        """The state that evaluation uses for `weight`, not to be written into; nothing changes."""
        state: Tensor = ops.current(
            weight.detach(),
            self.threshold,
            self.stamp,
            self.stamp,
            self.density,
            self.fraction,
            self.selector,
            self.layer,
            self.seed,
            self.remembered.token,
            self.held,
        )
        return state

    def recompute(self, x: Tensor) -> None:
        """Set the state from `x` now; a random one is drawn as at the last refresh."""
        super().recompute(x)
        self.remembered.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightThreshold:
        self.remembered.forget()
        super()._apply(fn, recurse)
        return self


class ActivationThreshold(Threshold):
    """State of an input activation; None where no pass will use it."""

    def __init__(self, *args: Any, in_forward: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.in_forward = in_forward

    @torch.no_grad()
    def settle(self) -> None:
        """Let density and fraction say the same: an average may have parted them."""
        told = read_density(self.density, self.fraction)
        if told.value != self.density.item() or (told.exact is None and self.fraction.any()):
            self.set_density(told)

    def forward(self, x: Tensor, step: Tensor, *weights: Tensor) -> Tensor | None:
        """Return the state to use now, if the layers that own `weights` train."""
        if not self.training or not (self.in_forward or any(w.requires_grad for w in weights)):
            return None
        return self._refresh(x, step)


class CallThresholds(ActivationThreshold):
    """States of an input activation in a part that eager code may call several times a forward.

    Each call of a forward has a state of its own: `threshold` is that of the first one, buffer
    `later` [CALLS - 1, *state] those of the next, `later_stamps` when these were refreshed.
    """

    later: Tensor
    later_stamps: Tensor

    def __init__(self, *args: Any, state: Tensor, **options: Any) -> None:
        super().__init__(*args, state=state, **options)
        self.register_buffer("later", torch.zeros_like(state).repeat(CALLS - 1, *[1] * state.dim()))
        stamps = torch.full((CALLS - 1,), -1, dtype=torch.int64, device="cpu")
        self.register_buffer("later_stamps", stamps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CallThresholds:
        self._buffers["later"] = fn(self.later)
        super()._apply(fn, recurse)
        return self

    def _refresh(self, x: Tensor, step: Tensor, held: Tensor | None = None) -> Tensor:
        result: tuple[Tensor, Tensor, Tensor] = ops.refresh_call(
            x.detach(),
            torch.cat([self.threshold.unsqueeze(0), self.later]),
            torch.cat([self.stamp.unsqueeze(0), self.later_stamps]),
            step,
            self.density,
            self.fraction,
            self.period,
            self.selector,
            self.layer,
            self.spatial,
            self.seed,
            self.all_ranks,
            self.history.token,
            autocast_dtype(x) == torch.float16,
        )
        use, thresholds, stamps = result
        self.threshold.copy_(thresholds[0])
        self.later.copy_(thresholds[1:])
        self.stamp.copy_(stamps[0])
        self.later_stamps.copy_(stamps[1:])
        return use


class Pack(nn.Module):
    """Packs an activation for the weight gradient; None where nothing will be saved."""

    def __init__(
        self,
        layer: str,
        selector: str,
        spatial: int,
        layout: str = "",
        value_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.selector = selector
        self.spatial = spatial
        self.layout = layout
        self.value_dtype = value_dtype

    def stored_dtype(self, x: Tensor) -> torch.dtype:
        """Dtype of the packed values: what the layer sees `x` in, or `value_dtype` if narrower."""
        seen, narrow = autocast_dtype(x), self.value_dtype
        return seen if narrow is None or narrow.itemsize >= seen.itemsize else narrow

    def forward(self, x: Tensor, threshold: Tensor | None, *weights: Tensor) -> Tensor | None:
        """Return `swatfx::pack` of `x` if a weight gradient will ask for it."""
        if threshold is None or not torch.is_grad_enabled():
            return None
        if not any(w.requires_grad for w in weights):
            return None
        dtype = self.stored_dtype(x)
        layout = self.layout
        if layout in layouts.FEATURES_OUTERMOST:
            layout = layouts.between_linear(x.shape, layout)
        given = (x.detach(), threshold, self.spatial, self.selector, dtype, layout)
        kept: Tensor = direct.call(ops.pack, *given)
        return kept


def initial_state(
    x: Tensor | None, like: Tensor, selector: str, spatial: int, is_weight: bool
) -> Tensor:
    """Zeros of the shape that `selector` keeps: for weight `x`, or for an activation (None)."""
    chosen = selectors.get(selector)
    dtype = chosen.state_dtype(like.dtype)
    if x is None:
        shape = () if chosen.groups else chosen.state_shape((1,), Axes(None, 0))
    else:
        shape = chosen.state_shape(tuple(x.shape), Axes.of(x.dim(), spatial, is_weight))
    return torch.zeros(shape, dtype=dtype, device=like.device)
