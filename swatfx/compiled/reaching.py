"""Methods and attributes of the model, reached through the compiled one.

They belong to the mirror: its layers are the compiled model's, and where those below it have parts,
a method that calls them runs compiled layers. Where a method would run plain layers it is refused.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from swatfx.errors import InputError


class Reroute:
    """Stands in for the mirror's forward, so that a method that calls `self(x)` runs the graph."""

    def __init__(self, gm: nn.Module) -> None:
        self.gm = gm

    @property
    def __code__(self) -> types.CodeType:
        """That of the compiled forward: torch.compile asks a GraphModule's forward for it."""
        code: types.CodeType = type(self.gm).forward.__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled forward."""
        return self.gm.forward(*args, **kwargs)


def reach(gm: Any, name: str) -> Any:
    """Attribute `name` of the model that `gm` was made from.

    Raises:
        AttributeError: there is none.
    """
    root: nn.Module = gm.mirrored
    root.training = gm.training
    if name not in root.__dict__ and not hasattr(type(root), name):
        if type(root).__getattr__ is nn.Module.__getattr__:
            raise AttributeError(f"{type(gm).__name__!r} object has no attribute {name!r}")
    static = inspect.getattr_static(type(root), name, None)
    is_own = name not in root.__dict__ and name not in root._modules
    if is_own and not gm.__dict__["lends"] and computes(root, name):
        if isinstance(static, (types.FunctionType, functools.partialmethod)):
            return functools.partial(_refuse, name)
        _refuse(name)
    value = getattr(root, name)
    if isinstance(value, types.MethodType) and value.__self__ is root:
        return _method(gm, root, value)
    return value


def _refuse(name: str, *args: Any, **kwargs: Any) -> Any:
    raise InputError(
        "the method computes with layers that were compiled into the graph of forward alone",
        value=name,
        remedy="call the compiled model, or call the method on the model that it was made from",
    )


def _method(gm: Any, root: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`; modules that it replaces are replaced in the compiled model too."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        root.training = gm.training
        try:
            result = method(*args, **kwargs)
        finally:
            for name, module in root._modules.items():
                if gm._modules.get(name) is not module:
                    gm._modules[name] = module
        return gm if result is root else result

    return call


def lends_layers(root: nn.Module) -> bool:
    """Whether a public method of the model's own calls its layers."""
    names = {
        name
        for cls in _own_classes(root)
        for name, value in cls.__dict__.items()
        if not name.startswith("_") and any(True for _ in _functions(value))
    }
    return any(computes(root, name) for name in names - set(_INHERITED))


_INHERITED = dir(nn.Module)


def computes(root: nn.Module, name: str) -> bool:
    """Whether the code behind `name` names a child or a parameter, or calls what does."""
    tensors = {*root._modules, *root._parameters}
    todo, seen = [name], set()
    while todo:
        current = todo.pop()
        if current in seen or current in _INHERITED:
            continue
        seen.add(current)
        for function in _functions(inspect.getattr_static(type(root), current, None)):
            used = {n for code in codes(function.__code__) for n in code.co_names}
            if used & tensors:
                return True
            todo += used
    return False


def _own_classes(root: nn.Module) -> Iterator[type]:
    yield from (c for c in type(root).__mro__ if c.__module__.split(".")[0] not in _FOREIGN)


_FOREIGN = ("torch", "builtins", "abc", "typing")


def _functions(value: Any) -> Iterator[types.FunctionType]:
    for candidate in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
        candidate = inspect.unwrap(candidate) if callable(candidate) else candidate
        if isinstance(candidate, types.FunctionType):
            yield candidate


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """`code` and that of every function within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)
