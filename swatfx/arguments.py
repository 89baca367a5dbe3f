"""Checks of what callers hand over, each an InputError that names the argument, value and range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from swatfx.errors import InputError

LARGEST = 2**31 - 1


def whole(name: str, value: Any, low: int = 1, high: int = LARGEST) -> int:
    """`value` if it is a whole number from `low` to `high`.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} is a whole number from {low} to {high}", value=_short(value))
    return value


def number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, below: bool = True
) -> float:
    """`value` if it is a finite number from `low` to less than `high` (or `high` too).

    Raises:
        InputError: it is not.
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high or (below and value == high) or math.isinf(value):
        end = ")" if below else "]"
        raise InputError(f"{name} is a number in [{low:g}, {high:g}{end}", value=_short(value))
    return float(value)


def flag(name: str, value: Any) -> bool:
    """`value` if it is True or False.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is True or False", value=_short(value))
    return value


def inputs(value: Any) -> Any:
    """Example inputs as a tuple of forward's positional inputs, or as a dict of inputs by name.

    Raises:
        InputError: no sequence of inputs, or one without any.
    """
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, dict) and value:
        return value
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not len(value):
        raise InputError(
            "example inputs are a tensor, a tuple of forward's positional inputs or a dict by name",
            value=_short(value),
            remedy='pass e.g. (torch.empty(32, 3, 224, 224, device="meta"),); nothing is computed',
        )
    return tuple(value)


def listed(name: str, value: Any) -> list[Any]:
    """`value` as a list, if it is a collection other than text.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Iterable):
        raise InputError(f"{name} is a list", value=_short(value))
    return list(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["LARGEST", "flag", "inputs", "listed", "number", "whole"]
