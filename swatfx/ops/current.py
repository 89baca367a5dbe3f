"""`swatfx::current`: what Top-K selects of a weight as it is now, for evaluation.

The result is a pure function of the arguments, and changes nothing. It is remembered, outside of
all buffers, until the weight is seen to be another: the op looks at the moment it runs, also within
a compiled graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from swatfx import selectors
from swatfx.ops import old_masks
from swatfx.ops.calls import CurrentCall, schema_of
from swatfx.ops.copied import Buffers, Copied, Mended, version_of
from swatfx.ops.memory import Memory
from swatfx.ops.state import draw_seed, read_density
from swatfx.selectors import Axes
from swatfx.tensors.keeping import let_keep

_PROBES = 64  # elements that are compared, too: whole tensors are written behind autograd's back


@dataclass(frozen=True)
class _Seen:
    """A weight when it was looked at last, and what was found then: a state, or what to mend.

    As long as the weak reference lives, no other storage has its address.
    """

    storage: StorageWeakRef
    version: int
    looks: tuple[Any, ...]
    target: tuple[Any, ...]
    step: int
    probe: Tensor | None
    found: Any


class Ranked(Memory):
    """What one weight's last `swatfx::current` gave; and in a copy, what is known of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: _Seen | None = None
        self.copied: Copied | None = None

    def forget(self) -> None:
        """Look anew at the next use, whatever the weight looks like."""
        self.seen = None

    def recall(self, weight: Tensor, target: tuple[Any, ...]) -> Tensor | None:
        """The state that `weight` had for `target`, if it is the one that was seen last.

        Nobody may write into it.
        """
        found = self._found(weight, target)
        return found if isinstance(found, Tensor) else None

    def held(self, weight: Tensor, mask: Tensor) -> Tensor:
        """A held mask, the same tensor as long as neither changes."""
        if mask.is_inference():
            return mask
        target = mask.data_ptr(), version_of(mask)
        found = self.recall(weight, target)
        if found is None:
            found = let_keep(mask.detach())
            self.seen = _look(weight, target, found)
        return found

    def mended(self, selector: str, weight: Tensor, buffers: Buffers, draw: int) -> Mended | None:
        """What the state of a copy should be; None where this is no copy's.

        Arguments are as of `swatfx.ops.copied.Copied.mended`.
        """
        if self.copied is None:
            return None
        density, *fraction = float(buffers.density.item()), *buffers.fraction.tolist()
        mask = buffers.threshold
        target: tuple[Any, ...] = buffers.is_held, density, *fraction
        if buffers.is_held:
            target = *target, mask.data_ptr(), version_of(mask)
        found = self._found(weight, target) if buffers.is_held else None
        if not isinstance(found, Mended):
            found = self.copied.mended(selector, weight, buffers, draw)
            if buffers.is_held and not mask.is_inference():
                self.seen = _look(weight, target, found)
        return found

    def _found(self, weight: Tensor, target: tuple[Any, ...]) -> Any:
        seen = self.seen
        if seen is None or seen.target != target or not _is_same(weight, seen):
            return None
        return seen.found


def storage_id(x: Tensor) -> int:
    """Address of the storage object of `x`: its identity while anything refers to it, even weakly.

    Raises:
        NotImplementedError: tensors without a storage.
    """
    return int(x.untyped_storage()._cdata)


def _forget_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After any optimizer's step: fused kernels write weights without autograd's knowledge."""
    if torch.compiler.is_compiling():
        return  # a compiled step does tell autograd
    watched: dict[int, list[Ranked]] = {}
    for memory in Ranked.alive():
        if memory.seen is not None:
            watched.setdefault(memory.seen.storage.cdata, []).append(memory)
    if not watched:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            try:
                found = watched.get(storage_id(parameter), ())
            except (NotImplementedError, RuntimeError):
                continue
            for memory in found:
                memory.forget()


register_optimizer_step_post_hook(_forget_stepped)


def _current(
    weight: Tensor,
    threshold: Tensor,
    stamp: Tensor,
    iteration: Tensor,
    density: Tensor,
    fraction: Tensor,
    *options: Any,
) -> Tensor:
    """The state that a refresh would give `weight` now; held ones as they are.

    NaN ranks highest and is kept, so that it reaches the output.

    Args:
        weight: (F, C, *kernel).
        threshold: state of the last refresh.
        stamp: int64 0-dim, iteration of the last refresh. It seeds random selectors: theirs is the
            draw of the last refresh.
        iteration: int64 0-dim, training forwards so far: whatever optimizer follows one may have
            written the weight.
        density: float64 0-dim; `fraction`: int64 [2], the exact one or (0, 0).
        fraction: see `density`.
        options: fields of `swatfx.ops.calls.CurrentCall`.

    Returns:
        The selector's state, in the weight's precision; it aliases nothing.
    """
    call = CurrentCall(*options)
    is_held = old_masks.is_held(stamp, call.held)
    draw = draw_seed(call.seed, call.layer, max(int(stamp.item()), 0), True)
    memory = Ranked.find(call.token)
    mended = None
    if memory is not None:
        buffers = Buffers(threshold, density, fraction, is_held)
        mended = memory.mended(call.selector, weight, buffers, draw)
    if is_held:
        return (threshold if mended is None or mended.mask is None else mended.mask).clone()
    target = _target(stamp, iteration, density, fraction)
    found = None if memory is None else memory.recall(weight, target)
    if found is not None:
        return found.clone()
    state = selectors.get(call.selector).state(
        weight,
        read_density(density, fraction) if mended is None else mended.density,
        Axes(0, 1),
        draw,
    )
    if memory is not None:
        memory.seen = _look(weight, target, let_keep(state.clone()))
    return state


current = torch.library.custom_op(
    "swatfx::current",
    _current,
    mutates_args=(),
    schema=schema_of(
        "Tensor weight, Tensor threshold, Tensor stamp, Tensor iteration, Tensor density,"
        " Tensor fraction",
        CurrentCall,
        "Tensor",
    ),
)


def _target(
    stamp: Tensor, iteration: Tensor, density: Tensor, fraction: Tensor
) -> tuple[int | float, ...]:
    """What the state depends on beside the weight, as numbers; arguments as of `current`."""
    now = int(iteration.reshape(-1)[0].item())
    return now, int(stamp.item()), float(density.item()), *fraction.tolist()


def recall(
    memory: Ranked,
    held: Tensor | None,
    weight: Tensor,
    threshold: Tensor,
    stamp: Tensor,
    *target: Tensor,
) -> Tensor | None:
    """What `current` would return without ranking, and without the price of calling an op.

    `target` are the iteration, the density and its fraction. None while traced, and where there is
    something to rank. Nobody may write into the result. Without gradients it is the same tensor as
    long as the weight is: kernels may keep beside it what they made of both.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return None
    if type(weight) not in (Tensor, torch.nn.Parameter):
        return None
    if weight.is_meta:
        return None
    if old_masks.is_held(stamp, held):
        if memory.copied is not None:
            return None
        # The mask may change in place; a pending backward must not see that.
        return threshold.clone() if torch.is_grad_enabled() else memory.held(weight, threshold)
    if memory.seen is None:
        return None
    found = memory.recall(weight, _target(stamp, *target))
    return found.clone() if found is not None and torch.is_grad_enabled() else found


@current.register_fake
def _(weight: Tensor, *rest: Any, **named: Any) -> Tensor:
    chosen = selectors.get(CurrentCall(*rest[5:], **named).selector)
    shape = chosen.state_shape(tuple(weight.shape), Axes(0, 1))
    return weight.new_empty(shape, dtype=chosen.state_dtype(weight.dtype))


def _looks(weight: Tensor) -> tuple[Any, ...]:
    place = weight.storage_offset(), weight.shape, weight.stride(), weight.data_ptr()
    return *place, weight.dtype, weight.device


def _span(weight: Tensor) -> int:
    """Elements of the storage that are looked at; none on other devices: one would have to wait."""
    if weight.device.type != "cpu" or not weight.numel():
        return 0
    return 1 + sum((n - 1) * by for n, by in zip(weight.shape, weight.stride(), strict=True))


def _probe(weight: Tensor, count: int, step: int) -> Tensor:
    """A view of some elements."""
    return weight.as_strided((count,), (step,), weight.storage_offset())


def _look(weight: Tensor, target: tuple[Any, ...], found: Any) -> _Seen | None:
    if weight.is_inference():
        return None  # it counts no versions
    try:
        storage = StorageWeakRef(weight.untyped_storage())
        looks = _looks(weight)
    except (NotImplementedError, RuntimeError):
        return None  # no storage: nothing tells one such tensor from another
    span = _span(weight)
    step = max(1, span // _PROBES)
    probe = _probe(weight, -(-span // step), step).clone() if span else None
    return _Seen(storage, weight._version, looks, target, step, probe, found)


def _is_same(weight: Tensor, seen: _Seen) -> bool:
    if weight.is_inference() or weight._version != seen.version:
        return False
    try:
        if storage_id(weight) != seen.storage.cdata or _looks(weight) != seen.looks:
            return False
    except (NotImplementedError, RuntimeError):
        return False
    if seen.probe is None:
        return True
    return torch.equal(_probe(weight, len(seen.probe), seen.step), seen.probe)
