"""What a public function may be handed: each argument has a kind, checked by name at the call."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from swatfx.errors import InputError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MOST = 2**62  # of a count: ops take int64
_MOST_SEEDS = 10_000  # each is a training run


class Kind(NamedTuple):
    """What an argument may be: a test, and how the error says it."""

    fits: Callable[[Any], bool]
    text: str


def check(given: Mapping[str, Any], **kinds: Kind) -> None:
    """Raise InputError for the first of `given`, values by name, that is not of its kind."""
    for name, value in given.items():
        if name in kinds and not kinds[name].fits(value):
            raise InputError(f"{name} has to be {kinds[name].text}", value=value)


def checked(**kinds: Kind) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function refuse, with InputError, arguments that are not of their kind."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        unknown = kinds.keys() - signature.parameters.keys()
        if unknown:
            raise TypeError(f"{function.__name__} has no argument {sorted(unknown)}")

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            check(signature.bind(*args, **kwargs).arguments, **kinds)
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


def as_inputs(value: Any) -> Any:
    """Example inputs as a tuple of forward's positional inputs, or as a dict of inputs by name.

    Raises:
        InputError: no inputs, or something else.
    """
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, dict) and value:
        return value
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not len(value):
        raise InputError(
            "example inputs are a tensor, a tuple of forward's positional inputs or a dict by name",
            value=value,
            remedy='pass e.g. (torch.empty(32, 3, 224, 224, device="meta"),); nothing is computed',
        )
    return tuple(value)


def whole(low: int, high: int) -> Kind:
    """An int from `low` to `high`, and no bool."""
    return Kind(lambda v: is_whole(v, low) and v <= high, f"a whole number from {low} to {high}")


def is_whole(value: Any, low: int = 1) -> bool:
    """Whether `value` is an int from `low` on that fits 64 bits, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < _MOST


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and os.fspath(value) not in ("", b"")


def _are_seeds(value: Any) -> bool:
    if isinstance(value, (list, tuple, range)):
        return bool(value) and all(is_whole(seed, -_MOST) for seed in value)
    return is_whole(value) and value <= _MOST_SEEDS


def _is_amount(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


FLAG = Kind(lambda v: isinstance(v, bool), "true or false")
COUNT = Kind(is_whole, "a whole number, at least 1")
AMOUNT = Kind(_is_amount, "a finite number, at least 0")
SHARE = Kind(lambda v: _is_amount(v) and v < 1, "a fraction in [0, 1)")
FUNCTION = Kind(callable, "a function")
PATH = Kind(_is_path, "the path of a file or folder, and not empty")
MODEL = Kind(lambda v: isinstance(v, str) or callable(v), "a name, or a function that builds it")
MAPPING = Kind(lambda v: isinstance(v, Mapping), "a mapping")
DENSITY = Kind(lambda v: _is_amount(v) and v <= 1, "a fraction in [0, 1]")
SEEDS = Kind(_are_seeds, f"how many seeds, from 1 to {_MOST_SEEDS}, or which, in a list")
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
