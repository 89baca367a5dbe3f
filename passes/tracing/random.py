"""Random numbers that a forward draws while it is traced: they would be frozen into the graph.

The generators of torch, Python and numpy belong to the whole process. Where this thread is the
only one, a forward that draws, or seeds, is told by a generator's state. Other threads (a loader, a
model that trains) may draw meanwhile; torch's draws are then told by this thread's operations.
"""

from __future__ import annotations

import random
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DRAWN = "random numbers drawn in forward"
State = tuple[Any, Any, Any]


class _Draws(TorchDispatchMode):
    """Counts the random operations of the thread that it is entered in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Generators:
    """The generators that a forward may draw from on the host, watched in this thread."""

    def __init__(self) -> None:
        self._draws = None if threading.active_count() == 1 else _Draws()

    def watching(self) -> AbstractContextManager[Any]:
        """Enter this around the whole trace."""
        return self._draws or nullcontext()

    def state(self) -> State:
        """What `restore` compares with."""
        numpy = sys.modules.get("numpy")
        return (
            torch.get_rng_state() if self._draws is None else self._draws.count,
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def restore(self, before: State) -> bool:
        """Put generators back as they were; whether anything had been drawn."""
        now = self.state()
        if self._draws is None:
            drawn = not torch.equal(now[0], before[0])
        else:
            drawn = bool(now[0] != before[0])
        drawn |= bool(now[1] != before[1])
        if before[2] is not None:
            drawn |= any(str(a) != str(b) for a, b in zip(now[2][2:], before[2][2:], strict=True))
            drawn |= bool((now[2][1] != before[2][1]).any())
        if drawn:
            if self._draws is None:
                torch.set_rng_state(before[0])
            else:
                self._draws.count = before[0]
            random.setstate(before[1])
            if before[2] is not None:
                sys.modules["numpy"].random.set_state(before[2])
        return drawn
