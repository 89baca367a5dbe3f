"""Which call a recomputation in backward stands for, and the thresholds that this call used.

Activation checkpointing runs part of a forward again inside backward: reentrant or not, nested or
not, some calls of several, after other forwards. What runs again gets inputs with the very bits of
the first run. Where two first runs had equal inputs, the autograd node that asks for the
recomputation tells them apart: nodes are numbered in the order of the forward.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swatfx.ops.memory import Memory
from swatfx.ops.origin import Origin

_SAMPLE = 64  # elements of an input that its key holds as they are


def inside_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def may_be_recomputed() -> bool:
    """Whether this forward may be run again: nothing is saved by autograd, or hooks see it saved.

    Checkpointing of the one kind runs without gradients, of the other below saved-tensor hooks.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return not torch.is_grad_enabled() or hooks is not None


def key_of(inputs: Sequence[Tensor]) -> Hashable:
    """What tells tensors of other bits apart: shapes, a checksum and a sample of each."""
    return tuple(_key(x.detach()) for x in inputs)


def _key(x: Tensor) -> Hashable:
    looks = (x.shape, x.stride(), x.dtype, x.device)
    if not x.numel() or x.is_meta or x.layout != torch.strided:
        return looks
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    pairs = [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]
    span = 1 + sum((n - 1) * s for n, s in pairs)
    if span == x.numel():  # dense, in whatever order
        flat = x.as_strided((span,), (1,), x.storage_offset())
    else:
        flat = x.reshape(-1).contiguous()  # a view may have gaps
    words = flat.view(torch.uint8)
    whole = words.numel() // 8 * 8
    if whole and words.storage_offset() % 8 == 0:
        rest, words = words[whole:], words[:whole].view(torch.int64)
    else:
        rest, words = words[:0], words
    sample = words[:: max(1, words.numel() // _SAMPLE)]
    total = words.sum(dtype=torch.int64).reshape(1)
    numbers = torch.cat([total, sample.to(torch.int64), rest.to(torch.int64)])
    return looks, tuple(numbers.tolist())


Call = tuple[int, int]  # training iteration, and number of the call in this process


class Forwards:
    """The calls that may be recomputed, by their inputs."""

    _inputs = 4096
    _calls = 32

    def __init__(self) -> None:
        # (number of the next autograd node, call) of each call, by what it was called with.
        self._seen: OrderedDict[Hashable, list[tuple[int, Call]]] = OrderedDict()
        self._lock = threading.Lock()  # models that train in several threads share it

    def note(self, key: Hashable, call: Call) -> None:
        """A call, or its recomputation: what is checkpointed within it may follow."""
        with self._lock:
            calls = self._seen.setdefault(key, [])
            self._seen.move_to_end(key)
            calls.append((torch._C._autograd._get_sequence_nr(), call))
            del calls[: -self._calls]
            if len(self._seen) > self._inputs:
                self._seen.popitem(last=False)

    def recall(self, key: Hashable) -> Call | None:
        """The call that is recomputed now; None if it was not noted."""
        with self._lock:
            calls = list(self._seen.get(key, ()))
        if len({call for _, call in calls}) < 2:
            return calls[-1][1] if calls else None
        node = torch._C._current_autograd_node()
        number = math.inf if node is None else node._sequence_nr()
        if node is not None and "Checkpoint" in node.name():
            # Reentrant: the node was made before what it runs again.
            later = [call for call in calls if call[0] > number]
            return min(later or calls[-1:])[1]
        # Else the node is one of those that the call made, the last with something saved.
        earlier = [call for call in calls if call[0] <= number]
        return max(earlier or calls[:1])[1]


@dataclass
class _Period:
    """A state and from when on it was used."""

    start: int  # training iteration
    refreshes: int  # by how many calls of that iteration it was recomputed; 0: found there
    state: Tensor


class History(Memory):
    """The last states of one threshold, for calls that are recomputed after it was refreshed."""

    _small = 4096  # elements; larger ones (masks) are kept but for the current and the last period
    _calls = 4096  # whose place in their forward is known

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Whatever is used next was put there by something else than a refresh in forward."""
        self._periods: list[_Period] = []
        self.origin = Origin()
        self.is_owed = False  # a refresh that was due found nothing that it could rank
        self._places: OrderedDict[int, int] = OrderedDict()  # by the number of the call
        self._last = (-1, -1)  # iteration of the last call, and its place
        self._later: dict[int, History] = {}

    def place(self, iteration: int, call: int, recomputing: bool) -> int:
        """How many calls of the same forward came before `call`; a new one is the next."""
        with self._lock:
            if call in self._places:
                return self._places[call]
            before, place = self._last
            if not recomputing:
                place = place + 1 if before == iteration else 0
                self._last = iteration, place
                self._places[call] = place
                if len(self._places) > self._calls:
                    self._places.popitem(last=False)
            return max(place, 0)

    def of_place(self, place: int) -> History:
        """That of the calls which are the first of their forward (0), the second (1), ..."""
        return self if place == 0 else self._later.setdefault(place, History())

    def refreshed(self, iteration: int, state: Tensor) -> None:
        """A call of `iteration` has computed `state`, which is used from here on."""
        last = self._periods[-1] if self._periods else None
        if last is not None and last.start == iteration and last.refreshes:
            last.refreshes += 1
            last.state = state.clone()
        else:
            self._add(_Period(iteration, 1, state.clone()))

    @property
    def is_used(self) -> bool:
        """Whether it is known what calls use now."""
        return bool(self._periods)

    def used(self, iteration: int, state: Tensor) -> None:
        """A call of `iteration` uses `state` as it found it."""
        if not self._periods:
            self._add(_Period(iteration, 0, state.clone()))

    def _add(self, period: _Period) -> None:
        self._periods.append(period)
        del self._periods[: -(32 if period.state.numel() <= self._small else 2)]

    def of_only_refresh(self, iteration: int) -> Tensor | None:
        """The state that the only call of `iteration` that refreshed computed."""
        for period in self._periods:
            if period.start == iteration and period.refreshes == 1:
                return period.state
        return None

    def at(self, iteration: int) -> Tensor | None:
        """The state that calls of `iteration` used without a refresh of their own."""
        found = [period for period in self._periods if period.start <= iteration]
        return found[-1].state if found else None
