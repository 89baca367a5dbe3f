"""What symbolic tracing would get wrong without a word, turned into an error.

Tracing runs a forward once, on proxies. Whatever that run does beside making nodes is lost, or
frozen into the graph: a branch on a type, the backward of a custom autograd.Function,
recomputation, attributes set, random numbers drawn, a mode such as autocast entered (in `modes`).
Here each of these raises TraceError, so that the module it is found in stays eager.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx
from torch.fx.proxy import TraceError

from passes.tracing.augmented import allow_augmented
from passes.tracing.guard_clauses import find_guard, refuse

ON_TRAINING = "control flow on self.training"
ON_TENSOR = "control flow on a tensor"
ON_LOOP = "loop over a tensor or argument list"
ON_NUMBER = "a traced value taken as a number"
_CHECKPOINTS = (  # what activation checkpointing runs through, by version of torch
    "_checkpoint_impl",
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)
_OWN = ("tracer", "node", "root", "attr", "_node")  # what fx itself sets on a proxy
_OF_DICTS = ("get", "pop", "setdefault", "keys", "items")
refusals: list[str] = []  # reasons given so far: a user's `except` may have swallowed one


class Refusal(TraceError):
    """A TraceError that is noted in `refusals` too."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        refusals.append(reason)


class TrainingFlag:
    """Stands for `self.training` while tracing, so that the graph reads it when it runs."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __bool__(self) -> bool:
        raise Refusal(ON_TRAINING)

    def __eq__(self, other: object) -> bool:
        raise Refusal(ON_TRAINING)

    __hash__ = None  # type: ignore[assignment]


@allow_augmented
class WatchedProxy(fx.Proxy):
    """A proxy that refuses assignments, and isinstance, whose answer would be frozen.

    In an assertion, or a condition that guards a raise, it lets the model go on and leaves a check.
    """

    def __getattr__(self, name: str) -> WatchedAttribute:
        if name in _OF_DICTS and asks(sys._getframe(1)):
            raise Refusal(f".{name} of an input: whether it is there is known only when it runs")
        return WatchedAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:
            raise Refusal(f"forward sets .{name} of a tensor")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise Refusal(f"forward deletes .{name} of a tensor")

    def __bool__(self) -> bool:
        guard = find_guard(sys._getframe(1))
        if guard is None:
            return super().__bool__()
        self.tracer.create_proxy("call_function", refuse, (self, *guard), {})
        return not guard.outcome

    def __len__(self) -> int:
        raise Refusal("length of a tensor or argument list")

    def __int__(self) -> int:
        raise Refusal(ON_NUMBER)

    def __float__(self) -> float:
        raise Refusal(ON_NUMBER)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance asks for this when the real type does not match.
        if asks(sys._getframe(1)):
            raise Refusal("isinstance on an input of the graph")
        return WatchedProxy


class WatchedAttribute(WatchedProxy, fx.proxy.Attribute):
    """An attribute of a traced value, watched likewise."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        fx.proxy.Attribute.__init__(self, root, attr)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Made when it is first asked for; again if that was in a forward that was rolled back."""
        if self._node is not None and self._node._erased:
            self._node = None
        made: Any = fx.proxy.Attribute.node
        node: fx.Node = made.fget(self)
        return node


def asks(frame: Any) -> bool:
    """Whether a user's code stands at `frame`: not torch's, not ours."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module not in ("abc", "typing", "_collections_abc"):
            return module.split(".")[0] not in ("torch", "passes", "swatfx", "copy", "inspect")
        frame = frame.f_back
    return False


def here(replacement: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`replacement` in this thread, `real` in others: they run beside, and trace nothing."""
    thread = threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (replacement if threading.get_ident() == thread else real)(*args, **kwargs)

    return chosen


def _raise(reason: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Refusal(reason)

    return refuse


def has_proxy(value: Any) -> bool:
    """Whether a proxy is in some nest of tuples, lists and dicts."""
    if isinstance(value, dict):
        return any(has_proxy(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(has_proxy(v) for v in value)
    return isinstance(value, fx.Proxy)


@contextmanager
def guarded() -> Iterator[None]:
    """Refuse checkpointing, and custom autograd functions."""
    with ExitStack() as stack:
        for name in _CHECKPOINTS:
            if hasattr(torch.utils.checkpoint, name):
                real = getattr(torch.utils.checkpoint, name)
                refuse = here(_raise("activation checkpointing"), real)
                stack.enter_context(patched(torch.utils.checkpoint, name, refuse))
        stack.enter_context(patched(torch, "is_tensor", _is_tensor))
        apply = torch.autograd.Function.__dict__["apply"]

        def watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if has_proxy(args) or has_proxy(kwargs):
                name = cls.__name__
                what = "activation checkpointing" if name == "CheckpointFunction" else None
                raise Refusal(what or f"custom autograd function {name}")
            return apply.__get__(None, cls)(*args, **kwargs)

        stack.enter_context(patched(torch.autograd.Function, "apply", classmethod(watched)))
        yield


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put `value` in the place of what a module or class has under a name."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _is_tensor(value: object) -> bool:
    if has_proxy(value):
        raise Refusal("isinstance on an input of the graph")
    return isinstance(value, torch.Tensor)
