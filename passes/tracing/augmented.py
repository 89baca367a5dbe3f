"""Augmented assignments: `x += y` writes into a tensor, whoever else has it under another name.

A proxy without `__iadd__` would make `x + y` of it, which has another dtype where y is wider. The
calls here are what Python does: in place for tensors and lists, a new value for numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

_NAMES = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
    "lshift", "rshift",
)  # fmt: skip


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    assign: Callable[[Any, Any], Any] = getattr(operator, f"i{name}")

    def run(x: Any, y: Any) -> Any:
        return assign(x, y)

    # Not operator's own: for those, fx writes `x += y` with x a name that others read.
    run.__name__ = run.__qualname__ = f"{name}_"
    return fx.node.has_side_effect(run)  # no dead code, though nobody reads the result


# What stands for an augmented assignment -> the plain operator.
PLAIN: dict[Any, Callable[[Any, Any], Any]] = {
    _in_place(name): getattr(operator, name, None) or getattr(operator, f"{name}_")
    for name in _NAMES
}


def _method(run: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def assign(self: fx.Proxy, other: Any) -> fx.Proxy:
        name = run.__name__.rstrip("_")  # as the plain operator's node is called
        return self.tracer.create_proxy("call_function", run, (self, other), {}, name)

    return assign


def allow_augmented(kind: type[fx.Proxy]) -> type[fx.Proxy]:
    """Give a class of proxies the methods."""
    for run in PLAIN:
        setattr(kind, f"__i{run.__name__.rstrip('_')}__", _method(run))
    return kind
