"""What a public function may be handed: each argument has a kind, checked by name at the call."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from swatfx.errors import InputError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MOST = 2**62  # of a count: ops take int64
_MOST_SEEDS = 10_000  # each is a training run


class Kind(NamedTuple):
    """What an argument may be: a test, how the error says it, and what it tells to do."""

    fits: Callable[[Any], bool]
    text: str
    remedy: str | None = None


def check(given: Mapping[str, Any], **kinds: Kind) -> None:
    """Raise InputError for the first of `given`, values by name, that is not of its kind."""
    for name, value in given.items():
        if name in kinds and not kinds[name].fits(value):
            # A network's own text fills pages.
            shown = f"a built {type(value).__name__}" if isinstance(value, nn.Module) else value
            kind = kinds[name]
            raise InputError(f"{name} has to be {kind.text}", value=shown, remedy=kind.remedy)


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
    return Kind(lambda v: v is None or kind.fits(v), f"{kind.text}, or None", kind.remedy)


def instance(*types: type) -> Kind:
    """An instance of one of `types`."""
    names = " or ".join(t.__name__ for t in types)
    return Kind(lambda v: isinstance(v, types), f"a {names}")


_EXAMPLE = 'pass e.g. (torch.empty(32, 3, 224, 224, device="meta"),); nothing is computed'


def _is_shape(value: Any) -> bool:
    """Whether `value` is a tensor's shape, such as (4, 8), where tensors are wanted."""
    if not isinstance(value, (list, tuple)):
        return False
    return isinstance(value, torch.Size) or (len(value) > 1 and all(type(v) is int for v in value))


def as_inputs(value: Any) -> Any:
    """Example inputs as a tuple of forward's positional inputs, or as a dict of inputs by name.

    Raises:
        InputError: no inputs, or something else.
    """
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, dict) and value:
        return value
    if _is_shape(value):
        raise InputError("example inputs are tensors, not a shape", value=value, remedy=_EXAMPLE)
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not len(value):
        raise InputError(
            "example inputs are a tensor, a tuple of forward's positional inputs or a dict by name",
            value=value,
            remedy=_EXAMPLE,
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
MODEL = Kind(
    lambda v: isinstance(v, str) or (callable(v) and not isinstance(v, nn.Module)),
    "a name, or a function that builds it",
    "pass what builds the network anew, e.g. lambda: Net(), or its name",
)
MAPPING = Kind(lambda v: isinstance(v, Mapping), "a mapping")
DENSITY = Kind(lambda v: _is_amount(v) and v <= 1, "a fraction in [0, 1]")
SEEDS = Kind(_are_seeds, f"how many seeds, from 1 to {_MOST_SEEDS}, or which, in a list")
INPUTS = optional(
    Kind(
        lambda v: isinstance(v, (Tensor, list, tuple, Mapping)) and not _is_shape(v),
        "example inputs: a tensor, or a sequence of the positional ones (a shape is none)",
        _EXAMPLE,
    )
)
BATCHES = Kind(
    lambda v: hasattr(v, "__iter__") and not isinstance(v, (str, bytes, Mapping, type)),
    "an iterable of batches",
)
SEVERAL = Kind(lambda v: isinstance(v, (list, tuple)), "a list or a tuple")
