"""Functions below the ops that a faster kernel may stand in for, as ops have a kernel a device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Replaceable(Generic[P, R]):
    """A function in plain torch, its definition, and the kernel that runs in its place if it fits.

    Attributes:
        reference: the definition.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = reference
        self._kernel: Callable[P, R | None] | None = None
        functools.update_wrapper(self, reference)

    def register_kernel(self, kernel: Callable[P, R | None]) -> Callable[P, R | None]:
        """Ask `kernel` first; where its arguments do not suit it, it returns None."""
        self._kernel = kernel
        return kernel

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the kernel, or else the reference."""
        if self._kernel is not None:
            result = self._kernel(*args, **kwargs)
            if result is not None:
                return result
        return self.reference(*args, **kwargs)
