"""The one place that knows numba: compiled loops where it is installed, plain Python where not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numpy as np

try:
    import numba
except ImportError:  # pragma: no cover - tests run this in a process of its own
    numba = None

P = ParamSpec("P")
R = TypeVar("R")

HAVE_NUMBA = numba is not None

if not HAVE_NUMBA:
    logging.getLogger(__name__).warning(
        "numba is not installed: the accelerator models run as plain Python, some thousand times "
        "slower, with the same results"
    )


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as a compiled loop, or as it stands (without overflow warnings) without numba.

    A compiled function may call only those of its own file: numba's cache on disk is keyed by the
    file of the caller, and would not notice that a function elsewhere has changed.
    """
    if HAVE_NUMBA:
        try:
            return cast(Callable[P, R], numba.njit(cache=True, nogil=True)(function))
        except RuntimeError:  # no folder to cache in: compile in every process
            return cast(Callable[P, R], numba.njit(nogil=True)(function))

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(over="ignore"):
            return function(*args, **kwargs)

    return plain
