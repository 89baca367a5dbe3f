"""Ops that keep time and thresholds: `swatfx::step`, `swatfx::refresh` and `swatfx::refresh_call`.

All are functional: they return the new state and the caller copies it into a buffer, so that two
forwards may precede one backward. All look at the moment they run, not at the moment they were
traced: whether this forward is a recomputation inside backward (activation checkpointing) is known
only then.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from swatfx import selectors
from swatfx.density import DENSE, SAME, Density
from swatfx.errors import InputError
from swatfx.ops import old_masks
from swatfx.ops.calls import OF_ACTIVATION, RefreshCall, schema_of
from swatfx.ops.recomputed import Forwards, History, inside_backward, key_of, may_be_recomputed
from swatfx.selectors import Axes
from swatfx.selectors.topk import holds_nan

CALLS = 16  # of one layer in one forward that have a state each; calls beyond have none

_FORWARDS = Forwards()
_numbers = itertools.count()
_OVERFLOW = threading.local()  # `at`: (clock, iteration) of the last forward with one in float16


# Two calls with equal arguments are two calls: no compiler may make one of them.
@torch.library.custom_op("swatfx::step", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def step(
    iteration: Tensor, clock: int, inputs: Sequence[Tensor], advance: bool, part: str
) -> Tensor:
    """The training iteration that a forward belongs to.

    Args:
        iteration: int64 0-dim, training forwards of the root so far.
        clock: identifies the compiled model in this process.
        inputs: the tensors that the forward got; they identify it when it is recomputed.
        advance: True in the root's forward, False in a part that lies below eager code.
        part: path of that part: it may be called with the very tensors that another one gets.

    Returns:
        int64 [5]: this forward's iteration; 0, or inside backward 1 for the recomputation of a
        forward that is known and 2 for that of an unknown one, taken for the latest; the next value
        of `iteration`; `clock`; the number of this call in this process, which a recomputation
        shares with what it recomputes (-1: unknown).
    """
    now = int(iteration.item())
    current = now if advance else max(now - 1, 0)
    if inside_backward():
        key = (clock, part, key_of(inputs))
        known = _FORWARDS.recall(key)
        if known is None:
            return torch.tensor([max(now - 1, 0), 2, now, clock, -1])
        _FORWARDS.note(key, known)
        return torch.tensor([known[0], 1, now, clock, known[1]])
    call = next(_numbers)
    if may_be_recomputed():
        _FORWARDS.note((clock, part, key_of(inputs)), (current, call))
    return torch.tensor([current, 0, now + 1 if advance else now, clock, call])


@step.register_fake
def _(iteration: Tensor, clock: int, inputs: Sequence[Tensor], advance: bool, part: str) -> Tensor:
    return torch.empty(5, dtype=torch.int64)


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


def _overflowed(x: Tensor, half: bool, forward: tuple[int, int]) -> bool:
    """Whether `x` holds NaN because float16 ended here, or further up in the same forward."""
    if not (half or x.dtype == torch.float16 or getattr(_OVERFLOW, "at", None) == forward):
        return False
    if x.is_complex() or not holds_nan(x):
        return False
    _OVERFLOW.at = forward
    return True


def _keep_all(x: Tensor, selector: str, spatial: int, all_ranks: bool) -> Tensor:
    """The state that keeps all of an activation, whatever it holds."""
    axes = Axes.of(x.dim(), spatial, False)
    if all_ranks and _has_ranks():  # the others wait for this rank's counts
        known = x.nan_to_num(nan=torch.inf)
        selectors.get(selector).state(known, DENSE, axes, 0, _sum_over_ranks)
    return selectors.get(selector).state(x, DENSE, axes, 0)


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_ranks(counts: Tensor) -> Tensor:
    counts = counts.clone()
    torch.distributed.all_reduce(counts)
    return counts


# What a refresh reads besides the tensor and its state.
_MOMENT = "Tensor step, Tensor density, Tensor fraction"
_REFRESHED = "(Tensor, Tensor, Tensor)"


def _refresh(
    x: Tensor,
    threshold: Tensor,
    stamp: Tensor,
    step: Tensor,
    density: Tensor,
    fraction: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The threshold that this forward uses, recomputed from `x` if its iteration says so.

    Where one state serves several calls of a forward, each call of an iteration that is due
    computes a threshold of its own, and the last one is what later iterations use; they are calls
    on the same weight. A recomputation in backward uses what its own call used: computed again from
    the same `x`, or remembered.

    A weight whose values came from outside since, by a load or in another storage, is due. An
    activation that holds NaN because half precision overflowed is kept whole and changes nothing: a
    gradient scaler will skip the step, and the next forward is due instead.

    Args:
        x: weight (F, C, *kernel), or activation.
        threshold: state of the last refresh.
        stamp: int64 0-dim, iteration of the last refresh, -1 before the first.
        step: int64 [5] of `swatfx::step`.
        density: float64 0-dim; `fraction`: int64 [2], the exact one or (0, 0).
        fraction: see `density`.
        options: fields of `swatfx.ops.calls.RefreshCall`.

    Returns:
        (to use now, new threshold, new stamp); none aliases an input.

    Raises:
        InputError: NaN or complex numbers where a threshold is recomputed.
    """
    call = RefreshCall(*options)
    target = read_density(density, fraction)
    return _refreshed(call, x, threshold, stamp, step, target, History.find(call.token))


refresh = torch.library.custom_op(
    "swatfx::refresh",
    _refresh,
    mutates_args=(),
    schema=schema_of(
        f"Tensor x, Tensor threshold, Tensor stamp, {_MOMENT}", RefreshCall, _REFRESHED
    ),
)


@refresh.register_fake
def _(
    x: Tensor, threshold: Tensor, stamp: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call = RefreshCall(*rest[3:], **named)
    use = torch.empty_like(threshold)
    if call.is_batch_shaped:
        use = threshold.new_empty(call.state_shape(x))
    return use, torch.empty_like(threshold), torch.empty_like(stamp)


def _refresh_call(
    x: Tensor, thresholds: Tensor, stamps: Tensor, step: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`swatfx::refresh` of an activation whose layer eager code may call several times a forward.

    The n-th call of a forward refreshes, and uses, the n-th state, as if each call were a layer of
    its own. Calls beyond the last state are due in every iteration.

    Args:
        x: activation.
        thresholds: [CALLS, *state], states of the last refresh of each call.
        stamps: int64 [CALLS], iterations of these; -1 before the first.
        step: int64 [5] of `swatfx::step`.
        rest: density and fraction, see `swatfx::refresh`, and the fields of
            `swatfx.ops.calls.RefreshCall` but `is_weight` and `own`.

    Returns:
        (to use now, new thresholds, new stamps); none aliases an input.

    Raises:
        InputError: NaN or complex numbers where a threshold is recomputed.
    """
    density, fraction, *options = rest
    told = RefreshCall.of_activation(options)
    iteration, recomputing, _, _, call = step.tolist()
    history = History.find(told.token)
    place = 0 if history is None else history.place(iteration, call, bool(recomputing))
    states, times = thresholds.clone(), stamps.clone()
    has_state = place < len(states)
    row = min(place, len(states) - 1)
    if not has_state:
        told, history = replace(told, period=1), None
    elif history is not None:
        history = history.of_place(place)
    target = read_density(density, fraction)
    use, state, time = _refreshed(told, x, states[row], times[row], step, target, history)
    if has_state:
        states[row], times[row] = state, time
    return use, states, times


refresh_call = torch.library.custom_op(
    "swatfx::refresh_call",
    _refresh_call,
    mutates_args=(),
    schema=schema_of(
        f"Tensor x, Tensor thresholds, Tensor stamps, {_MOMENT}",
        RefreshCall,
        _REFRESHED,
        known=OF_ACTIVATION,
    ),
)


@refresh_call.register_fake
def _(
    x: Tensor, thresholds: Tensor, stamps: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return thresholds.new_empty(thresholds.shape[1:]), torch.empty_like(thresholds), stamps.clone()


def unchanged(
    x: Tensor,
    threshold: Tensor,
    stamp: Tensor,
    step: Tensor,
    held: Tensor | None,
    *,
    period: int,
    own: bool,
    history: History,
) -> Tensor | None:
    """The threshold to use, where a call of `swatfx::refresh` would find that all stays as it is.

    Between two refreshes a module need not ask the op, nor write back what it reads. Arguments are
    those of the op, and its `History`; not for states that follow the batch's shape.

    Returns:
        None where the op has to see to it: a refresh is due, a forward runs again in backward, or
        something watches the calls of ops.
    """
    if torch.compiler.is_compiling() or _is_watched() or x.is_meta or threshold.is_meta:
        return None
    # The step was made from the inputs: where they are of a subclass, so is it.
    for one in (x, threshold, stamp, step):
        if type(one) not in (Tensor, torch.nn.Parameter):
            return None
    iteration, recomputing, *_ = step.tolist()
    if recomputing:
        return None
    if not old_masks.is_held(stamp, held):
        if iteration % period == 0 or int(stamp) < 0 or history.is_owed or not history.is_used:
            return None
        if own and not history.origin.accepts(x):
            return None
    return threshold.clone()


def _is_watched() -> bool:
    """Whether something sees the calls of ops: a mode, a transform, a trace, a profiler."""
    return bool(
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _refreshed(
    call: RefreshCall,
    x: Tensor,
    threshold: Tensor,
    stamp: Tensor,
    step: Tensor,
    density: Density,
    history: History | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `swatfx::refresh` returns."""
    iteration, recomputing, _, clock, _ = (int(v) for v in step.tolist())
    last = int(stamp.item())
    held = old_masks.is_held(stamp, call.held)
    batch_shaped = call.is_batch_shaped
    due = batch_shaped or iteration % call.period == 0 or (last < 0 and not recomputing)
    use = threshold
    if held:
        due = False
    elif not recomputing and not batch_shaped and history is not None:
        due = due or history.is_owed or (call.own and history.origin.is_other(x))
    elif recomputing and not batch_shaped:
        known = None
        if history is not None and recomputing == 1:
            known = history.of_only_refresh(iteration)
        if history is not None and known is None and not due:
            known = history.at(iteration)
        if known is not None:
            use, due = known, False
    # A rank whose batch is empty still has to add its zeros to the others' counts.
    fresh = due and (x.numel() > 0 or (call.all_ranks and _has_ranks()))
    if fresh and not call.is_weight and _overflowed(x, call.half, (clock, iteration)):
        fresh = False
        use = _keep_all(x, call.selector, call.spatial, call.all_ranks).to(threshold.dtype)
        if history is not None and not recomputing:
            history.is_owed = True
    elif fresh:
        use = compute_state(
            x,
            density,
            call.selector,
            layer=call.layer,
            spatial=call.spatial,
            is_weight=call.is_weight,
            seed=call.seed,
            iteration=iteration,
            all_ranks=call.all_ranks,
        )
        use = old_masks.in_form_of(threshold, use.to(threshold.dtype), x.numel())
    elif batch_shaped:
        use = threshold.new_zeros(call.state_shape(x))
    if recomputing or batch_shaped or held:
        return use.clone(), threshold.clone(), stamp.clone()
    if history is not None:
        (history.refreshed if fresh else history.used)(iteration, use)
        if fresh:
            history.is_owed = False
        if call.own:
            history.origin.accept(x)
    if not fresh:
        return use.clone(), threshold.clone(), stamp.clone()
    return use, use.clone(), torch.full_like(stamp, iteration)


def read_density(density: Tensor, fraction: Tensor) -> Density:
    """The density that the buffers `density` (float64 0-dim) and `fraction` (int64 [2]) hold.

    A fraction that is another's counts for nothing: the mean of models has that of one of them.
    """
    value = float(density.item())
    numerator, denominator = (int(v) for v in fraction.tolist())
    if denominator > 0 and abs(numerator / denominator - value) < SAME:
        return Density(numerator / denominator, Fraction(numerator, denominator))
    return Density(value)
