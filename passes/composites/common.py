"""What composites share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from swatfx.errors import InputError


def check_default(value: Any, name: str, default: Any) -> None:
    """Raise InputError if an argument that was fixed at compile time is given another value."""
    same = value is default or (not isinstance(value, Tensor) and value == default)
    if not same:
        raise InputError(
            f"argument {name!r} was fixed to its default when the model was compiled",
            value=type(value).__name__,
            remedy="pass example_inputs that reach this argument to swatfx.compile",
        )


def check_count(values: Any, name: str, count: int) -> None:
    """Raise InputError if a variadic argument has another length than at compile time."""
    if len(values) != count:
        raise InputError(
            f"argument '*{name}' had {count} values when the model was compiled",
            value=len(values),
            remedy="compile it with example_inputs of this number",
        )


def call(tracer: Any, function: Callable[..., Any], *args: Any) -> Any:
    """A node that calls `function`, which is not looked into."""
    return fx.Tracer.create_proxy(tracer, "call_function", function, args, {})


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to attention scores: -inf where a boolean mask is True."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
