"""Ops that keep time and thresholds: `swatfx::step` and `swatfx::refresh`.

Both are functional: they return the new state and the caller copies it into a buffer, so that two
forwards may precede one backward. Both look at the moment they run, not at the moment they were
traced: whether this forward is a recomputation inside backward (activation checkpointing) is known
only then.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from swatfx import selectors
from swatfx.density import Density
from swatfx.errors import InputError
from swatfx.selectors import Axes
from swatfx.topk import holds_nan

HELD = 2**62  # as the iteration of the last refresh: no forward refreshes this state

_Key = tuple[int, bool, int, tuple[int, ...]]  # (clock, of the root, data pointer, shape)


class _Seen:
    """Which training iterations a forward's input belonged to.

    A recomputation gets the very tensor that the first pass got, and so finds the iteration whose
    thresholds it has to see. Where several forwards got one tensor before a backward, autograd
    recomputes the last of them first. A pointer that was freed and given out again belongs to its
    new owner once something was recomputed from it, and to its last few owners until then.
    """

    _tensors = 4096
    _forwards = 16

    def __init__(self) -> None:
        self._iterations: OrderedDict[_Key, list[int]] = OrderedDict()
        self._recomputed: set[_Key] = set()

    def note(self, key: _Key, iteration: int) -> None:
        """A forward that is not a recomputation."""
        known = self._iterations.setdefault(key, [])
        self._iterations.move_to_end(key)
        if key in self._recomputed:
            self._recomputed.remove(key)
            known.clear()
        known.append(iteration)
        del known[: -self._forwards]
        if len(self._iterations) > self._tensors:
            oldest, _ = self._iterations.popitem(last=False)
            self._recomputed.discard(oldest)

    def recall(self, key: _Key, default: int) -> int:
        """The iteration of the forward that is recomputed now."""
        known = self._iterations.get(key)
        if not known:
            return default
        self._recomputed.add(key)
        return known.pop() if len(known) > 1 else known[0]


_SEEN = _Seen()
_LOCK = threading.Lock()  # models that train in several threads share it


def _inside_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


@torch.library.custom_op("swatfx::step", mutates_args=())
def step(iteration: Tensor, clock: int, inputs: Sequence[Tensor], advance: bool) -> Tensor:
    """The training iteration that a forward belongs to.

    Args:
        iteration: int64 0-dim, training forwards of the root so far.
        clock: identifies the compiled model in this process.
        inputs: the tensors that the forward got; the first one identifies it when it is recomputed.
        advance: True in the root's forward, False in a part that lies below eager code.

    Returns:
        int64 [3]: this forward's iteration, 1 if it is a recomputation inside backward, and the
        next value of `iteration`.
    """
    now = int(iteration.item())
    current = now if advance else max(now - 1, 0)
    key = None
    if inputs:
        key = (clock, advance, inputs[0].data_ptr(), tuple(inputs[0].shape))
    if _inside_backward():
        latest = max(now - 1, 0)
        with _LOCK:
            found = _SEEN.recall(key, latest) if key else latest
        return torch.tensor([found, 1, now])
    if key is not None:
        with _LOCK:
            _SEEN.note(key, current)
    return torch.tensor([current, 0, now + 1 if advance else now])


@step.register_fake
def _(iteration: Tensor, clock: int, inputs: Sequence[Tensor], advance: bool) -> Tensor:
    return torch.empty(3, dtype=torch.int64)


def draw_seed(seed: int, layer: str, iteration: int, is_weight: bool) -> int:
    """Seed of a random selector's draw: a pure function of its arguments, below 2**53."""
    text = f"{seed}/{layer}/{iteration}/{is_weight}"
    return zlib.crc32(text.encode()) << 20 ^ zlib.crc32(text[::-1].encode())


def check_rankable(x: Tensor, layer: str, is_weight: bool) -> None:
    """Raise InputError, naming the layer, if `x` is complex or holds NaN."""
    what = "weight" if is_weight else "input activation"
    if x.is_complex():
        raise InputError(
            f"Top-K cannot rank the complex {what}",
            layer=layer,
            value=str(x.dtype),
            remedy="keep the layer dense: swatfx.per_layer({name: 'dense'}, default=policy)",
        )
    if holds_nan(x):
        raise InputError(
            f"Top-K met NaN in the {what} when thresholds were recomputed",
            layer=layer,
            value=f"{int(torch.isnan(x).sum())} NaN of {x.numel()}",
            remedy="lower the learning rate, clip gradients, or resume from an earlier checkpoint",
        )


def compute_state(
    x: Tensor,
    density: Density,
    selector: str,
    *,
    layer: str,
    spatial: int,
    is_weight: bool,
    seed: int = 0,
    iteration: int = 0,
    all_ranks: bool = False,
) -> Tensor:
    """A selector's state for `x`, checked: NaN and complex numbers cannot be ranked.

    Raises:
        InputError: naming the layer.
    """
    chosen = selectors.get(selector)
    axes = Axes.of(x.dim(), spatial, is_weight)
    reduce = _sum_over_ranks if all_ranks and _has_ranks() else None
    if reduce is None:
        found = chosen.search(x, density, axes)
        if found is not None and not found[1]:
            return found[0]
    if not density.is_dense:  # else nothing is ranked, and NaN goes where eager lets it go
        check_rankable(x, layer, is_weight)
    draw = draw_seed(seed, layer, iteration, is_weight)
    return chosen.state(x, density, axes, draw, reduce)


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_ranks(counts: Tensor) -> Tensor:
    counts = counts.clone()
    torch.distributed.all_reduce(counts)
    return counts


@torch.library.custom_op("swatfx::refresh", mutates_args=())
def refresh(
    x: Tensor,
    threshold: Tensor,
    previous: Tensor,
    stamp: Tensor,
    step: Tensor,
    density: Tensor,
    fraction: Tensor,
    period: int,
    selector: str,
    layer: str,
    spatial: int,
    is_weight: bool,
    seed: int = 0,
    all_ranks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The threshold that this forward uses, recomputed from `x` if its iteration says so.

    Args:
        x: weight (F, C, *kernel), or activation.
        threshold: state of the last refresh; `previous`: of the one before.
        previous: see `threshold`.
        stamp: int64 0-dim, iteration of the last refresh, -1 before the first, HELD where the
            state stays as it is.
        step: int64 [3] of `swatfx::step`.
        density: float64 0-dim; `fraction`: int64 [2], the exact one or (0, 0).
        fraction: see `density`.
        period: refresh where iteration mod period is 0.
        selector: name in `swatfx.selectors`.
        layer: for messages and seeds.
        spatial: spatial dimensions of `x`.
        is_weight: what `x` is.
        seed: of random selectors.
        all_ranks: count over all ranks of the default process group.

    Returns:
        (to use now, new threshold, new previous, new stamp); none aliases an input.

    Raises:
        InputError: NaN or complex numbers where a threshold is recomputed.
    """
    iteration, recomputing, _ = (int(v) for v in step.tolist())
    last = int(stamp.item())
    batch_shaped = not is_weight and selectors.get(selector).groups != ()
    due = batch_shaped or iteration % period == 0 or last < 0
    use = threshold
    if last == HELD:
        due = False
    elif recomputing:
        if not batch_shaped and last == iteration:
            due = False  # the very threshold that the first pass computed
        elif not due and last > iteration:
            use = previous  # it was refreshed after the first pass; the new threshold stays
    # A rank whose batch is empty still has to add its zeros to the others' counts.
    fresh = due and (x.numel() > 0 or (all_ranks and _has_ranks()))
    if fresh:
        use = compute_state(
            x,
            read_density(density, fraction),
            selector,
            layer=layer,
            spatial=spatial,
            is_weight=is_weight,
            seed=seed,
            iteration=iteration,
            all_ranks=all_ranks,
        )
        use = use.to(threshold.dtype)
    elif batch_shaped:
        use = threshold.new_zeros(_state_shape(x, selector, spatial, is_weight))
    if recomputing or batch_shaped or not fresh:
        return use.clone(), threshold.clone(), previous.clone(), stamp.clone()
    return use, use.clone(), threshold.clone(), torch.full_like(stamp, iteration)


@refresh.register_fake
def _(
    x: Tensor,
    threshold: Tensor,
    previous: Tensor,
    stamp: Tensor,
    step: Tensor,
    density: Tensor,
    fraction: Tensor,
    period: int,
    selector: str,
    layer: str,
    spatial: int,
    is_weight: bool,
    seed: int = 0,
    all_ranks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    use = torch.empty_like(threshold)
    if not is_weight and selectors.get(selector).groups:
        use = threshold.new_empty(_state_shape(x, selector, spatial, is_weight))
    return use, torch.empty_like(threshold), torch.empty_like(previous), torch.empty_like(stamp)


def _state_shape(x: Tensor, selector: str, spatial: int, is_weight: bool) -> tuple[int, ...]:
    axes = Axes.of(x.dim(), spatial, is_weight)
    return selectors.get(selector).state_shape(tuple(x.shape), axes)


def read_density(density: Tensor, fraction: Tensor) -> Density:
    """The density that the buffers `density` (float64 0-dim) and `fraction` (int64 [2]) hold."""
    numerator, denominator = (int(v) for v in fraction.tolist())
    exact = Fraction(numerator, denominator) if denominator else None
    return Density(float(density.item()), exact)
