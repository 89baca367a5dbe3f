"""What kind an argument of a public function is, checked by name before anything is done."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from swatfx.errors import InputError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MOST = 2**62  # of a count: ops take int64


class Kind(NamedTuple):
    """What an argument may be: a test, and how the error says it."""

    fits: Callable[[Any], bool]
    text: str


def checked(**kinds: Kind) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function refuse, with InputError, arguments that are not of their kind."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        unknown = kinds.keys() - signature.parameters.keys()
        if unknown:
            raise TypeError(f"{function.__name__} has no argument {sorted(unknown)}")

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if name in kinds and not kinds[name].fits(value):
                    raise InputError(f"{name} has to be {kinds[name].text}", value=value)
            return function(*args, **kwargs)

        return call

    return decorate


def optional(kind: Kind) -> Kind:
    """`kind`, or None."""
    return Kind(lambda v: v is None or kind.fits(v), f"{kind.text}, or None")


def instance(*types: type) -> Kind:
    """An instance of one of `types`."""
    names = " or ".join(t.__name__ for t in types)
    return Kind(lambda v: isinstance(v, types), f"a {names}")


def all_of(*types: type) -> Kind:
    """A list or tuple of instances of `types`."""
    one = instance(*types)
    return Kind(
        lambda v: isinstance(v, (list, tuple)) and all(map(one.fits, v)),
        f"a list or a tuple, each item {one.text}",
    )


def is_whole(value: Any, low: int = 1) -> bool:
    """Whether `value` is an int from `low` on that fits 64 bits, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < _MOST


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and os.fspath(value) not in ("", b"")


def _are_seeds(value: Any) -> bool:
    if isinstance(value, (list, tuple, range)):
        return bool(value) and all(is_whole(seed, 0) for seed in value)
    return is_whole(value)


FLAG = Kind(lambda v: isinstance(v, bool), "true or false")
COUNT = Kind(is_whole, "a whole number, at least 1")
SHARE = Kind(_is_share, "a fraction in [0, 1)")
FUNCTION = Kind(callable, "a function")
PATH = Kind(_is_path, "the path of a file or folder, and not empty")
MODEL = Kind(lambda v: isinstance(v, str) or callable(v), "a name, or a function that builds it")
MAPPING = Kind(lambda v: isinstance(v, Mapping), "a mapping")
SEEDS = Kind(_are_seeds, "how many seeds, at least 1, or which, in a list")
INPUTS = optional(
    Kind(
        lambda v: isinstance(v, (Tensor, list, tuple, Mapping)),
        "example inputs: a tensor, or a sequence of the positional ones",
    )
)
BATCHES = Kind(
    lambda v: hasattr(v, "__iter__") and not isinstance(v, (str, bytes, Mapping, type)),
    "an iterable of batches",
)
SEVERAL = Kind(lambda v: isinstance(v, (list, tuple)), "a list or a tuple")
