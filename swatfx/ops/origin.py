"""Whether a weight has values from outside since its threshold was used last.

Thresholds are kept over a period, in which an optimizer moves the weights a little. Values that
were loaded, or that lie in another storage, are other weights, and want a threshold of their own.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_numbers = itertools.count(1)
_last = 0  # number of the last load
# Storage -> number of the last load into it. While a weak reference lives, so does the address.
_LOADS: dict[int, tuple[StorageWeakRef, int]] = {}


def note_load(module: nn.Module, incompatible: Any) -> None:
    """A hook after a module's `load_state_dict`: its parameters have other values now."""
    global _last
    for key in [key for key, (storage, _) in list(_LOADS.items()) if storage.expired()]:
        _LOADS.pop(key, None)
    _last = next(_numbers)
    for parameter in module._parameters.values():
        storage = None if parameter is None else _storage_of(parameter)
        if storage is not None:
            reference = StorageWeakRef(storage)
            _LOADS[reference.cdata] = (reference, _last)


def _storage_of(x: Tensor) -> torch.UntypedStorage | None:
    try:
        return x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


class Origin:
    """Where one weight lay when its threshold was used last, and which loads came before that."""

    def __init__(self) -> None:
        self._storage: StorageWeakRef | None = None
        self._load = _last

    def is_other(self, x: Tensor) -> bool:
        """Whether the values of `x` are from outside."""
        return self._is_other(_storage_of(x))

    def accept(self, x: Tensor) -> None:
        """The threshold that is used now belongs to `x`."""
        self._accept(_storage_of(x))

    def accepts(self, x: Tensor) -> bool:
        """`accept`, unless the values of `x` are from outside: whether it was done."""
        storage = _storage_of(x)
        if self._is_other(storage):
            return False
        self._accept(storage)
        return True

    def _is_other(self, storage: torch.UntypedStorage | None) -> bool:
        if storage is None:
            return False
        address = int(storage._cdata)
        if self._storage is not None and self._storage.cdata != address:
            return True
        return bool(_LOADS) and _LOADS.get(address, (None, 0))[1] > self._load

    def _accept(self, storage: torch.UntypedStorage | None) -> None:
        self._load = _last
        if storage is None:
            self._storage = None
        elif self._storage is None or self._storage.cdata != int(storage._cdata):
            self._storage = StorageWeakRef(storage)
