"""What a forward changes beside computing its result, seen while it is traced.

A graph repeats operations, not assignments: an attribute set, a list appended to, a global counted
up would happen once, at compile time. `State` compares what a forward can reach by name before and
after it was traced, and puts it back.
"""

from __future__ import annotations

import copy
import dis
import itertools
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from swatfx.compiled import codes

_MISSING = object()
_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device)
_OPAQUE = (Tensor, nn.Module, fx.Proxy, types.ModuleType, types.FunctionType, types.MethodType)
# Whose objects have caches of their own, that are no state of a model.
_MACHINERY = frozenset(
    "torch logging threading _thread multiprocessing concurrent asyncio weakref io _io re functools"
    " inspect builtins".split()
)
_DEEPEST = 8
_MOST = 20_000  # objects looked at: beyond, a model's attributes are data, not state


class State:
    """What the attributes of some modules hold, and the globals and class attributes they name."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._tables: list[tuple[str, nn.Module, dict[str, Any]]] = []
        self._records: dict[int, tuple[str, Any, Any]] = {}
        self._names: list[tuple[str, Any, str, Any]] = []
        classes: dict[type, None] = {}
        for path, module in modules:
            before = {k: v for k, v in module.__dict__.items() if k != "training"}
            self._tables.append((path, module, before))
            for key, value in before.items():
                if type(value) not in _ATOMS:
                    self._look(key, value, 0)
            classes[type(module)] = None
        for cls in classes:
            for label, owner, name in _named_outside(cls):
                value = _get(owner, name)
                self._names.append((label, owner, name, value))
                self._look(label, value, 0)

    def restore(self) -> tuple[str, str] | None:
        """Put all back; (path of the module, name) of something that had changed, or None."""
        changed: tuple[str, str] | None = None
        for path, module, before in self._tables:
            table = module.__dict__
            for name in [*table, *before]:
                if name == "training" or name.startswith("_tensor_constant"):
                    continue
                value = before.get(name, _MISSING)
                if table.get(name, _MISSING) is value:
                    continue
                changed = path, name
                if value is _MISSING:
                    table.pop(name, None)
                else:
                    table[name] = value
        for label, owner, name, value in self._names:
            if _get(owner, name) is not value:
                changed = "", label
                _set(owner, name, value)
        for label, value, contents in self._records.values():
            if not _same(_contents(value), contents):
                changed = "", label
                _put_back(value, contents)
        return changed

    def _look(self, label: str, value: Any, depth: int) -> None:
        """Remember the contents of `value`, if it is something that can be changed."""
        if isinstance(value, (*_ATOMS, *_OPAQUE)) or id(value) in self._records:
            return
        if depth > _DEEPEST or len(self._records) > _MOST:
            return
        contents = _contents(value)
        if contents is not None:
            self._records[id(value)] = label, value, contents
        for inner in _inner(value, contents):
            if type(inner) not in _ATOMS:
                self._look(label, inner, depth + 1)


def _inner(value: Any, contents: Any) -> Iterable[Any]:
    if isinstance(value, tuple):
        return value
    if isinstance(contents, dict):
        return contents.values()
    return contents if isinstance(contents, (list, set)) else ()


def _contents(value: Any) -> Any:
    """A copy of what `value` holds, to compare with later; None if it cannot change."""
    if isinstance(value, dict):
        # Not `dict(value)`: a subclass may do something of its own when it is read.
        items: dict[Any, Any] = {key: item for key, item in dict.items(value)}  # noqa: C416
        extra = getattr(value, "__dict__", None)
        return {**items, ("attributes",): _Attributes(extra)} if extra else items
    if isinstance(value, list):
        return list.copy(value)
    if isinstance(value, deque):
        return list(deque.__iter__(value))
    if isinstance(value, set):
        return set(set.__iter__(value))
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, (itertools.count, itertools.cycle)):
        return repr(value) if isinstance(value, itertools.count) else None
    kind: Any = type(value)
    if kind.__module__.split(".")[0] == "numpy":
        return _numpy_contents(value)
    if kind.__module__.split(".")[0] in _MACHINERY or isinstance(value, tuple):
        return None
    table = getattr(value, "__dict__", None)
    if isinstance(table, dict):
        return dict(table) | {name: _get(value, name) for name in _slots(kind)}
    slots = _slots(kind)
    return {name: _get(value, name) for name in slots} if slots else None


class _Attributes(dict[str, Any]):
    """The instance attributes of a dict, among its items."""


class _Generator:
    """State of one of numpy's generators of random numbers."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Generator) and str(self.state) == str(other.state)

    __hash__ = None  # type: ignore[assignment]


def _numpy_contents(value: Any) -> Any:
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.ndarray):
        return value.copy() if value.dtype != object and value.size <= 1_000_000 else None
    if isinstance(value, numpy.random.Generator):
        return _Generator(copy.deepcopy(value.bit_generator.state))
    if isinstance(value, numpy.random.RandomState):
        return _Generator(copy.deepcopy(value.get_state(legacy=False)))
    return None


@cache
def _slots(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, _Generator):
        return bool(a == b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_is_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_is_same(x, y) for x, y in zip(a, b, strict=True))
    if type(a).__module__.split(".")[0] == "numpy":
        return bool(a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b)


def _is_same(a: Any, b: Any) -> bool:
    return bool(a is b or (isinstance(a, _Attributes) and _same(dict(a), dict(b))))


def _put_back(value: Any, contents: Any) -> None:
    if isinstance(value, dict):
        extra = contents.pop(("attributes",), None)
        base = OrderedDict if isinstance(value, OrderedDict) else dict
        base.clear(value)
        for key, item in contents.items():
            base.__setitem__(value, key, item)
        if extra is not None:
            value.__dict__.clear()
            value.__dict__.update(extra)
            contents["attributes",] = extra
    elif isinstance(value, set):
        set.clear(value)
        set.update(value, contents)
    elif isinstance(value, (list, deque)):
        kind: Any = list if isinstance(value, list) else deque
        kind.clear(value)
        kind.extend(value, contents)
    elif isinstance(value, bytearray):
        value[:] = contents
    elif isinstance(value, random.Random):
        value.setstate(contents)
    elif isinstance(value, torch.Generator):
        value.set_state(torch.frombuffer(bytearray(contents), dtype=torch.uint8))
    elif isinstance(contents, _Generator):
        if hasattr(value, "bit_generator"):
            value.bit_generator.state = contents.state
        else:
            value.set_state(contents.state)
    elif type(contents).__module__.split(".")[0] == "numpy":
        value[...] = contents
    elif isinstance(contents, dict):
        for name in {*getattr(value, "__dict__", {}), *contents}:
            _set(value, name, contents.get(name, _MISSING))


def _get(owner: Any, name: str) -> Any:
    """A global (of a dict), the contents of a cell, or an attribute."""
    if isinstance(owner, types.CellType):
        try:
            return owner.cell_contents
        except ValueError:
            return _MISSING
    if isinstance(owner, dict):
        return owner.get(name, _MISSING)
    if isinstance(owner, type):
        return owner.__dict__.get(name, _MISSING)
    return getattr(owner, name, _MISSING)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, types.CellType):
        owner.cell_contents = value
    elif isinstance(owner, dict):
        owner.pop(name, None)
        if value is not _MISSING:
            owner[name] = value
    elif value is _MISSING:
        delattr(owner, name)
    elif isinstance(owner, type):
        setattr(owner, name, value)
    else:
        object.__setattr__(owner, name, value)


@lru_cache(maxsize=1024)
def _named_outside(cls: type) -> tuple[tuple[str, Any, str], ...]:
    """(label, owner, name) of the globals, class attributes and cells that a class's code names."""
    found: dict[tuple[int, str], tuple[str, Any, str]] = {}
    functions: list[types.FunctionType] = []
    mine = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in ("torch", "builtins")]
    for owner in mine:
        for name, value in owner.__dict__.items():
            functions += _functions(value)
            if not (name.startswith("__") or callable(value) or hasattr(value, "__get__")):
                found[id(owner), name] = (f"{owner.__name__}.{name}", owner, name)
    seen: set[types.CodeType] = set()
    while functions:
        function = functions.pop()
        within = list(codes(function.__code__))
        if function.__code__ in seen or function.__module__.split(".")[0] == "torch":
            continue
        seen.add(function.__code__)
        for name in {name for code in within for name in code.co_names}:
            value = function.__globals__.get(name, _MISSING)
            if isinstance(value, types.FunctionType):
                functions.append(value)
            elif _is_state(value) or name in _stored(within):
                found[id(function.__globals__), name] = (f"{name}", function.__globals__, name)
            for owner in mine:  # set by forward for the first time
                if name in _set_attributes(within) and name not in owner.__dict__:
                    found.setdefault((id(owner), name), (f"{owner.__name__}.{name}", owner, name))
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            value = _get(cell, name)
            if isinstance(value, types.FunctionType):
                functions.append(value)
            elif name != "__class__":
                found[id(cell), name] = (name, cell, name)
    return tuple(found.values())


def _is_state(value: Any) -> bool:
    return not (value is _MISSING or callable(value) or isinstance(value, types.ModuleType))


def _functions(value: Any) -> Iterator[types.FunctionType]:
    for candidate in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
        if isinstance(candidate, types.FunctionType):
            yield candidate


def _stored(codes: list[types.CodeType]) -> set[str]:
    return _operands(codes, ("STORE_GLOBAL", "DELETE_GLOBAL"))


def _set_attributes(codes: list[types.CodeType]) -> set[str]:
    return _operands(codes, ("STORE_ATTR", "DELETE_ATTR"))


def _operands(codes: list[types.CodeType], names: tuple[str, ...]) -> set[str]:
    return {n for code in codes for op, n in _instructions(code) if op in names}


@lru_cache(maxsize=4096)
def _instructions(code: types.CodeType) -> tuple[tuple[str, str], ...]:
    return tuple(
        (i.opname, str(i.argval))
        for i in dis.get_instructions(code)
        if "STORE" in i.opname or "DELETE" in i.opname
    )
