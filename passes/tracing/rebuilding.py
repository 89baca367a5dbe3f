"""Containers of a user's type in a graph: made again, of the same type, whenever it runs.

fx keeps tuples, lists and dicts, and would turn a subclass of one into the plain thing. Here such
an object is taken apart as for a copy, and a node puts it together around what the graph computed.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

_KNOWN = (dict, list, tuple, immutable_dict, immutable_list)
_CONTAINERS = (dict, list, tuple, set, frozenset)


def is_own(value: Any) -> bool:
    """Whether `value` is a container that fx does not keep: a subclass, a set, a dataclass."""
    if isinstance(value, (type, Tensor, fx.Proxy)):
        return False
    kind = type(value)
    if kind in _KNOWN or kind.__module__.split(".")[0] in ("torch", "passes", "swatfx"):
        return kind in (set, frozenset)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return False  # fx knows named tuples
    return isinstance(value, _CONTAINERS) or dataclasses.is_dataclass(value)


def take_apart(value: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """(target, args, kwargs) of a node that makes an object like `value`."""
    if type(value) is OrderedDict:
        return OrderedDict, (list(value.items()),), {}
    if dataclasses.is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        if _is_made_by(value, given):
            return type(value), (), given
    leaves: list[Any] = []
    return Rebuild(type(value), _template(value, leaves)), tuple(leaves), {}


def _is_made_by(value: Any, given: dict[str, Any]) -> bool:
    """Whether the constructor alone makes an object like `value`."""
    if any(is_own(v) or isinstance(v, (list, dict)) for v in given.values()):
        return False
    try:
        other = type(value)(**given)
        same_table = _same(getattr(other, "__dict__", {}), getattr(value, "__dict__", {}))
        same_items = not isinstance(value, dict) or _same(dict(other), dict(value))
    except Exception:  # a user's constructor may raise anything
        return False
    return same_table and same_items and not isinstance(value, (list, tuple, set, frozenset))


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(a[key] is b[key] for key in a)


class Rebuild:
    """Makes an object from a template and what stands in its gaps."""

    def __init__(self, kind: type, template: Callable[[tuple[Any, ...]], Any]) -> None:
        self.__name__ = self.__qualname__ = kind.__name__
        self.__module__ = kind.__module__
        self._template = template

    def __call__(self, *leaves: Any) -> Any:
        """A new object."""
        return self._template(leaves)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rebuild:
        return self


def _template(value: Any, leaves: list[Any]) -> Callable[[tuple[Any, ...]], Any]:
    """A function of the leaves that makes `value` again; fills `leaves`."""
    if isinstance(value, (Tensor, fx.Proxy)) or type(value).__name__ == "TrainingFlag":
        leaves.append(value)
        position = len(leaves) - 1
        return lambda found: found[position]
    if type(value) in (list, tuple):
        parts = [_template(item, leaves) for item in value]
        kind = type(value)
        return lambda found: kind([part(found) for part in parts])
    if type(value) is dict:
        items = {key: _template(item, leaves) for key, item in value.items()}
        return lambda found: {key: part(found) for key, part in items.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        parts, make = [_template(item, leaves) for item in value], type(value)
        return lambda found: make(*[part(found) for part in parts])
    if type(value) in (set, frozenset):
        parts, kind = [_template(item, leaves) for item in value], type(value)
        return lambda found: kind([part(found) for part in parts])
    if not is_own(value):
        return lambda found: value
    reduced = [*value.__reduce_ex__(2), None, None, None][:5]
    function, args, state, items, pairs = reduced
    if isinstance(function, type) or callable(function):
        arguments = _template(tuple(args), leaves)
        contents = _template(state, leaves)
        listed = _template(list(items or ()), leaves)
        paired = _template(list(pairs or ()), leaves)
        return lambda found: _made(
            function, arguments(found), contents(found), listed(found), paired(found)
        )
    raise TypeError(f"cannot take a {type(value).__name__} apart")


def _made(function: Any, args: Any, state: Any, items: Any, pairs: Any) -> Any:
    result = function(*args)
    if isinstance(result, list):
        list.extend(result, items)
    base: Any = OrderedDict if isinstance(result, OrderedDict) else dict
    for key, item in pairs:
        base.__setitem__(result, key, item)
    if state is not None and hasattr(result, "__setstate__"):
        result.__setstate__(state)
    elif state is not None:
        table, slots = state if isinstance(state, tuple) else (state, {})
        result.__dict__.update(table or {})
        for name, item in slots.items():
            object.__setattr__(result, name, item)
    return result
