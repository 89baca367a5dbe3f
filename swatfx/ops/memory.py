"""What ops remember from one call to the next, outside of all buffers, found by a number.

An op gets the number of its module's memory as an argument: it stands in a compiled graph as a
constant, and what it stands for lives and dies with the module. Nothing remembered here is state:
where it is gone, an op computes the same at a higher price.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Self

_tokens = itertools.count()
_ALIVE: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()


class Memory:
    """Base of what one module remembers; a copy of the module starts with an empty one."""

    def __init__(self) -> None:
        self.token = next(_tokens)
        _ALIVE[self.token] = self

    def forget(self) -> None:
        """Start anew."""
        raise NotImplementedError

    @classmethod
    def find(cls, token: int) -> Self | None:
        """The memory with this number, if it is of this kind and still there."""
        found = _ALIVE.get(token)
        return found if isinstance(found, cls) else None

    @classmethod
    def alive(cls) -> list[Self]:
        """All of this kind that are still there."""
        # The list of references is made at once; values() would stumble over other threads' models.
        found = (reference() for reference in _ALIVE.valuerefs())
        return [memory for memory in found if isinstance(memory, cls)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()
