"""What composites share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


def call(tracer: Any, function: Callable[..., Any], *args: Any) -> Any:
    """A node that calls `function`, which is not looked into."""
    return fx.Tracer.create_proxy(tracer, "call_function", function, args, {})


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to attention scores: -inf where a boolean mask is True."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
