"""A symbolic tracer that recovers where a forward cannot be traced, and knows composites.

Used by `trace_model`. A child that fails becomes one call, noted in `eager` with its reason; the
root's failure is the caller's to handle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from passes.tracing import composites
from passes.tracing.guards import (
    ON_LOOP,
    ON_TENSOR,
    Refusal,
    TrainingFlag,
    WatchedProxy,
    guarded,
    refusals,
)
from passes.tracing.modes import Modes
from passes.tracing.module_kinds import LAYERS, has_layers, is_script, opaque_reason
from passes.tracing.random import DRAWN, Generators
from passes.tracing.rebuilding import is_own, take_apart
from passes.tracing.state import State
from passes.tracing.tensors import RealTensors
from swatfx.compiled import Arguments, Pattern, SwatModule, join, label


class Tracer(fx.Tracer):
    """Traces through everything but torch.nn leaves; recovers where a forward cannot be traced."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.eager: dict[str, str] = {}
        self.inlined: list[str] = []  # modules whose calls the graph stands for
        self._tensors: dict[int, str] = {}
        self._cache: dict[str, fx.Proxy] = {}
        self._generators = Generators()
        self._thread = threading.get_ident()
        self._arguments: Arguments | None = None
        self._pattern: Pattern | None = None
        self._modes = Modes()

    def trace_root(
        self, root: nn.Module, arguments: Arguments, pattern: Pattern | None
    ) -> fx.Graph:
        """Trace `root` for calls of this pattern; None: all arguments are inputs."""
        self._arguments, self._pattern = arguments, pattern
        for name, module in root.named_modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._tensors.setdefault(id(tensor), join(name, key))
        modules = [(n, m) for n, m in root.named_modules() if not is_script(m)]
        with _training_flags(modules, self.prefix), _without_parts(modules), guarded():
            state = State(modules)
            real = RealTensors(set(self._tensors))
            watched = self._modes.watching(m for _, m in modules)
            try:
                with real, self._generators.watching(), watched:
                    graph = self.trace(root)
            finally:
                changed = state.restore()
            if changed is not None:
                raise fx.proxy.TraceError(f"forward sets {join(*changed)}")
        return graph

    def is_leaf_module(self, m: nn.Module, path: str) -> bool:
        """Torch's layers and functions of modules, and whatever has to be called as it is."""
        if reason := opaque_reason(m):
            if is_script(m) or has_layers(m):
                self.eager[path] = reason
            return True
        if isinstance(m, LAYERS):
            return bool(super().is_leaf_module(m, path)) or nn.utils.parametrize.is_parametrized(m)
        if super().is_leaf_module(m, path):
            return not has_layers(m)
        return False

    def is_caller_eager(self, m: nn.Module) -> bool:
        """Whether `m` is the root: what its arguments are is not known before it runs."""
        return m is self.root

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the inputs; other arguments are what the pattern says."""
        arguments, pattern = self._arguments, self._pattern
        assert arguments is not None
        expand = composites.find(self.root)
        values: dict[str, Any] = {}
        if pattern is None:
            for name in (*arguments.positional, *arguments.keywords):
                known = arguments.defaults
                default = (known[name],) if name in known else ()
                values[name] = self.create_proxy("placeholder", name, default, {})
        else:
            values = dict(pattern.values)
            for name in pattern.inputs:
                values[name] = self.create_proxy("placeholder", label(name), (), {})
        args, keywords = arguments.unbind(values)

        def call(root: nn.Module, *_: Any) -> Any:
            if expand is not None:
                return expand(self, root, *args, **keywords)
            return self._watched(lambda: root_fn(root, *args, **keywords))

        return call, [self.root]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through `m`, or call it: a leaf, or one whose forward cannot be traced."""
        if threading.get_ident() != self._thread:  # fx stands for the call of every module
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            last = self.graph._root._prev
            expand = composites.find(m)
            state = State(m.named_modules())
            noted, known, inlined = dict(self.eager), len(refusals), len(self.inlined)
            self.inlined.append(path)
            try:
                if expand is not None:
                    return expand(self, m, *args, **kwargs)
                result = self._watched(lambda: forward(*args, **kwargs))
                if changed := state.restore():
                    raise fx.proxy.TraceError(f"forward sets {join(*changed)}")
                return result
            except Exception as error:  # a user's forward may fail on a proxy in any way
                del refusals[known:]
                state.restore()
                self._roll_back(last)
                del self.inlined[inlined:]
                self.eager = noted | {path: reason_of(error)}
        return self.create_proxy("call_module", path, args, kwargs)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """As in fx; a composite function becomes its graph, and modes may not have changed."""
        expand = composites.find_function(target) if kind == "call_function" else None
        if expand is not None:
            return expand(self, *args[0], **args[1])
        if kind.startswith("call"):
            self._modes.check()
        return super().create_proxy(kind, target, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that refuses isinstance."""
        return WatchedProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """As in fx; training flags are read when the graph runs, containers keep their type."""
        if isinstance(a, TrainingFlag):
            owner = self.create_node("get_attr", a.path, (), {})
            return self.create_node("call_function", getattr, (owner, "training"), {})
        if is_own(a):
            target, args, kwargs = take_apart(a)
            args, kwargs = self.create_arg(args), self.create_arg(kwargs)
            return self.create_node("call_function", target, args, kwargs)
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Every parameter and buffer is one node, whichever name it is reached by."""
        if threading.get_ident() != self._thread:
            return attr_val
        path = self._tensors.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if path is None:
            return attr_val
        if path not in self._cache:
            self._cache[path] = self.create_proxy("get_attr", path, (), {})
        return self._cache[path]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse: a branch on a traced value."""
        raise Refusal(ON_TENSOR)

    def iter(self, obj: fx.Proxy) -> Any:
        """Refuse: how often to loop is not known (unpacking, where it is, comes not by here)."""
        raise Refusal(ON_LOOP)

    def _watched(self, run: Callable[[], Any]) -> Any:
        """Run a forward; random numbers drawn while tracing would be frozen into the graph."""
        before, known = self._generators.state(), len(refusals)
        try:
            with self._modes.forward():
                result = run()
        finally:
            drawn = self._generators.restore(before)
        if refusals[known:]:
            raise fx.proxy.TraceError(refusals[-1])
        if drawn:
            raise fx.proxy.TraceError(DRAWN)
        return result

    def _roll_back(self, last: fx.Node) -> None:
        """Erase the nodes that a failed forward left behind."""
        while self.graph._root._prev is not last:
            node = self.graph._root._prev
            node.users.clear()
            self.graph.erase_node(node)
        alive = set(self.graph.nodes)
        self._cache = {k: p for k, p in self._cache.items() if p.node in alive}


def reason_of(error: BaseException) -> str:
    """One line that says why a forward could not be traced."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].split(". ")[0]
    if isinstance(error, SyntaxError):  # fx writes `self.class(x)` for a child called "class"
        return "untraceable: a module below is named after a Python keyword"
    if isinstance(error, fx.proxy.TraceError):
        return f"untraceable: {text}"[:160]
    return f"untraceable: {type(error).__name__}: {text}"[:160]


@contextmanager
def _training_flags(modules: Sequence[tuple[str, nn.Module]], prefix: str) -> Iterator[None]:
    before = [m.__dict__.get("training", True) for _, m in modules]
    try:
        for name, module in modules:
            # The root's own flag is that of its child `swat`; a part's, of the module it stands in.
            module.__dict__["training"] = TrainingFlag(name or ("swat_owner" if prefix else "swat"))
        yield
    finally:
        for (_, module), flag in zip(modules, before, strict=True):
            module.__dict__["training"] = flag


@contextmanager
def _without_parts(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Show every module's own forward: one that two eager modules share may have a part already."""
    parts = [(m, m.__dict__["forward"]) for _, m in modules if _has_part(m)]
    for module, _ in parts:
        del module.__dict__["forward"]
    try:
        yield
    finally:
        for module, part in parts:
            module.__dict__["forward"] = part


def _has_part(m: nn.Module) -> bool:
    return isinstance(m.__dict__.get("forward"), SwatModule)
