"""The one place that knows numba: compiled loops where it is installed, plain Python where not.

numba takes longer to import than all of swatfx: it is imported when the first loop is called.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

HAVE_NUMBA = importlib.util.find_spec("numba") is not None

_LOCK = threading.Lock()
_waiting: dict[int, list[Callable[..., Any]]] = {}  # id of a file's globals -> its loops

if not HAVE_NUMBA:
    logging.getLogger(__name__).warning(
        "numba is not installed: the accelerator models run as plain Python, some thousand times "
        "slower, with the same results"
    )


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as a compiled loop, or as it stands (without overflow warnings) without numba.

    A compiled function may call only those of its own file, by name: numba's cache on disk is keyed
    by the file of the caller, and would not notice that a function elsewhere has changed. They are
    compiled together, at the first call of one of them.
    """
    if HAVE_NUMBA:
        return _later(function)

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(over="ignore"):
            return function(*args, **kwargs)

    return plain


def _later(function: Callable[P, R]) -> Callable[P, R]:
    names: dict[str, Any] = function.__globals__  # type: ignore[attr-defined]
    name = function.__name__
    _waiting.setdefault(id(names), []).append(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if id(names) in _waiting:
            with _LOCK:  # the list goes last: others wait until all are there
                for loop in _waiting.get(id(names), ()):
                    names[loop.__name__] = _loop(loop)
                _waiting.pop(id(names), None)
        return cast(Callable[P, R], names[name])(*args, **kwargs)

    return run


def _loop(function: Callable[..., Any]) -> Any:
    import numba

    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to cache in: compile in every process
        return numba.njit(nogil=True)(function)
