"""How a forward may be called: which arguments a graph takes as inputs, what the others are.

Tracing follows one way through a forward: an argument that was not given, or a number, is what it
was then. A `Pattern` says so, and a graph is only run on calls that match its own.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx

_PLAIN = (bool, int, float, complex, str, bytes)


class Given(enum.Enum):
    """Stands for an argument that is an input of a graph."""

    INPUT = "input"


INPUT = Given.INPUT


class Pattern:
    """Argument -> INPUT, or the value that a graph was traced with."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @property
    def inputs(self) -> list[str]:
        """The arguments that are inputs, in order."""
        return [name for name, value in self.values.items() if value is INPUT]

    def match(self, given: dict[str, Any]) -> list[Any] | None:
        """The inputs, if `given` is such a call; or None."""
        if len(given) != len(self.values):
            return None
        found = []
        for name, value in self.values.items():
            if name not in given:
                return None
            if value is INPUT:
                if holds_none(given[name]):
                    return None
                found.append(given[name])
            elif not _is_same(given[name], value):
                return None
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Pattern:
        return self  # nothing in it changes; its values are compared by identity

    def __str__(self) -> str:
        fixed = [f"{label(n)}={v!r}" for n, v in self.values.items() if v is not INPUT]
        return f"({', '.join([*(label(name) for name in self.inputs), *fixed])})"


def label(name: str) -> str:
    """An argument as a Python identifier: "*xs.0" and "**options.scale" are of variadic ones."""
    if name.startswith("**"):
        return name.partition(".")[2]
    return name.removeprefix("*").replace(".", "_")


def holds_none(value: Any) -> bool:
    """Whether `value` is None, or a nest with None in it: Python may ask for that."""
    if isinstance(value, Tensor):
        return False
    if isinstance(value, (list, tuple)):
        return any(holds_none(item) for item in value)
    if isinstance(value, dict):
        return any(holds_none(item) for item in value.values())
    return value is None


def holds_tensor(value: Any) -> bool:
    """Whether `value` is a tensor, or a nest with one in it."""
    if isinstance(value, (list, tuple)):
        return any(holds_tensor(item) for item in value)
    if isinstance(value, dict):
        return any(holds_tensor(item) for item in value.values())
    return isinstance(value, (Tensor, fx.Proxy))


def _is_same(value: Any, fixed: Any) -> bool:
    if value is fixed:
        return True
    if isinstance(fixed, (list, tuple)) and type(value) is type(fixed):
        return len(value) == len(fixed) and all(map(_is_same, value, fixed))
    return type(value) is type(fixed) and isinstance(fixed, _PLAIN) and bool(value == fixed)


class Arguments:
    """The parameters of a forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        signature = inspect.signature(forward)
        self.signature = signature
        self.positional: list[str] = []
        self.keywords: list[str] = []
        self.defaults: dict[str, Any] = {}
        self.only_positional: set[str] = set()
        self.rest = self.options = ""
        for p in signature.parameters.values():
            if p.kind is p.VAR_POSITIONAL:
                self.rest = p.name
                continue
            if p.kind is p.VAR_KEYWORD:
                self.options = p.name
                continue
            (self.keywords if p.kind is p.KEYWORD_ONLY else self.positional).append(p.name)
            if p.kind is p.POSITIONAL_ONLY:
                self.only_positional.add(p.name)
            if p.default is not p.empty:
                self.defaults[p.name] = p.default

    def __deepcopy__(self, memo: dict[int, Any]) -> Arguments:
        return self

    @property
    def is_open(self) -> bool:
        """Whether a caller may leave arguments out, or add some."""
        return bool(self.defaults or self.rest or self.options)

    @property
    def required(self) -> list[str]:
        """The arguments without default."""
        return [n for n in (*self.positional, *self.keywords) if n not in self.defaults]

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Argument -> value of a call, defaults filled in; None if Python would refuse it."""
        named = dict(kwargs)
        found: dict[str, Any] = {}
        for index, name in enumerate(self.positional):
            if index < len(args):
                if name in named and name not in self.only_positional:
                    return None
                found[name] = args[index]
            elif name in named and name not in self.only_positional:
                found[name] = named.pop(name)
            elif name in self.defaults:
                found[name] = self.defaults[name]
            else:
                return None
        extra = args[len(self.positional) :]
        if len(extra) and not self.rest:
            return None
        for index, value in enumerate(extra):
            found[f"*{self.rest}.{index}"] = value
        for name in self.keywords:
            if name in named:
                found[name] = named.pop(name)
            elif name in self.defaults:
                found[name] = self.defaults[name]
            else:
                return None
        if named and not self.options:
            return None
        for name, value in named.items():
            found[f"**{self.options}.{name}"] = value
        return found

    def unbind(self, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Inverse of `bind`; what is at its default is left out where it can be."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        extra = any(name.startswith("*") and not name.startswith("**") for name in values)
        for name in self.positional:
            is_default = name in self.defaults and values[name] is self.defaults[name]
            if extra or (len(args) == self.positional.index(name) and not is_default):
                args.append(values[name])
            elif not is_default:
                kwargs[name] = values[name]
        for name in self.keywords:
            if name not in self.defaults or values[name] is not self.defaults[name]:
                kwargs[name] = values[name]
        for name, value in values.items():
            if name.startswith("**"):
                kwargs[label(name)] = value
            elif name.startswith("*"):
                args.append(value)
        return args, kwargs

    def bare(self) -> Pattern:
        """A call with nothing but the required arguments."""
        names = (*self.positional, *self.keywords)
        return Pattern({n: self.defaults.get(n, INPUT) for n in names})

    def pattern(self, given: dict[str, Any]) -> Pattern:
        """That of a call with these values.

        Tensors, nests of them and what is required are inputs, unless None is in them.
        """
        required = self.required
        return Pattern(
            {
                n: INPUT if (holds_tensor(v) or n in required) and not holds_none(v) else v
                for n, v in given.items()
            }
        )

    def patterns(self, most: int = 3) -> Iterator[Pattern]:
        """Likely calls: the bare one, and where few arguments are optional, others.

        With each argument more that is None by default, and with all; with each flag turned; with
        whatever numbers.
        """
        bare = self.bare()
        yield bare
        optional = [n for n, default in self.defaults.items() if default is None]
        flags = {n: not d for n, d in self.defaults.items() if isinstance(d, bool)}
        numbers = [n for n, d in self.defaults.items() if type(d) in (int, float)]
        if len(self.defaults) > most:
            return
        more: list[dict[str, Any]] = [{n: INPUT} for n in optional]
        more += [dict.fromkeys(optional, INPUT)] if len(optional) > 1 else []
        more += [{n: turned} for n, turned in flags.items()]
        if numbers:
            more.append(dict.fromkeys(numbers, INPUT))
            more.append(dict.fromkeys((*numbers, *optional), INPUT))
        for changes in more:
            yield Pattern(bare.values | changes)


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of example inputs: a tensor, a sequence of arguments, or a dict by name."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}


class Ways:
    """The graphs that stand in for one forward, and the calls that each is for.

    Attributes:
        arguments: of the forward.
        pattern: the calls that the module's own graph is for.
        graphs: further (pattern, graph module).
        fallback: runs every other call as Python; None where the module's owner does, or nobody.
    """

    def __init__(self, arguments: Arguments, pattern: Pattern) -> None:
        self.arguments = arguments
        self.pattern = pattern
        self.graphs: list[tuple[Pattern, Any]] = []  # SwatModules, on the floor above
        self.fallback: Any = None

    def choose(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any]] | None:
        """(graph module, its inputs) for a call, None for the module's own; or None altogether."""
        given = self.arguments.bind(args, kwargs)
        if given is None:
            return None
        inputs = self.pattern.match(given)
        if inputs is not None:
            return None, inputs
        for pattern, graph in self.graphs:
            inputs = pattern.match(given)
            if inputs is not None:
                return graph, inputs
        return None
