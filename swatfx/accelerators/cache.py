"""Results by mask digest: the same masks on the same design are simulated once a process."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import numpy as np

from swatfx.accelerators.geometry import Mask

T = TypeVar("T")
SIZE = 4096

_entries: OrderedDict[Hashable, object] = OrderedDict()
_lock = threading.Lock()


def digest(mask: Mask | None) -> bytes:
    """A digest of the bits of `mask`; its shape is part of the geometry."""
    if mask is None:
        return b"dense"
    return hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=16).digest()


def cached(key: Hashable, compute: Callable[[], T]) -> T:
    """The value under `key`, or that of `compute()`; the least recently used fall out."""
    with _lock:
        if key in _entries:
            _entries.move_to_end(key)
            return cast(T, _entries[key])
    value = compute()
    with _lock:
        _entries[key] = value
        while len(_entries) > SIZE:
            _entries.popitem(last=False)
    return value


def cache_clear() -> None:
    """Forget all results."""
    with _lock:
        _entries.clear()


def cache_size() -> int:
    """How many results are held."""
    with _lock:
        return len(_entries)
