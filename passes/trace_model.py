"""Stage 0: trace a model into a SwatModule; what cannot be traced stays eager, with a reason.

Reads the model's mirror; writes a graph whose leaves are torch.nn modules. A module whose forward
symbolic tracing cannot follow becomes one call in the graph, and what lies below it is traced by
itself into a *part*. Nothing else of the model changes.
"""

from __future__ import annotations

import inspect
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from passes import composites
from swatfx.errors import InputError
from swatfx.graph_module import EagerRoot, SwatModule, join

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ON_TRAINING = "control flow on self.training"
ON_TENSOR = "untraceable: control flow on a tensor"


class TrainingFlag:
    """Stands for `self.training` while a module is traced, so that the graph reads it when it runs."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __bool__(self) -> bool:
        raise fx.proxy.TraceError(ON_TRAINING)


class _Tracer(fx.Tracer):
    """Traces through everything but torch.nn leaves; recovers where a forward cannot be traced."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.eager: dict[str, str] = {}
        self._tensors: dict[int, str] = {}
        self._cache: dict[str, fx.Proxy] = {}

    def trace_root(self, root: nn.Module, inputs: int | None) -> fx.Graph:
        """Trace `root`, whose first `inputs` arguments (None: those without default) are inputs."""
        self._inputs = inputs
        for name, module in root.named_modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._tensors.setdefault(id(tensor), join(name, key))
        with _training_flags(root, self.prefix):
            return self.trace(root)

    def is_leaf_module(self, m: nn.Module, path: str) -> bool:
        if reason := opaque_reason(m):
            if has_layers(m):
                self.eager[path] = reason
            return True
        if isinstance(m, LAYERS):
            return bool(super().is_leaf_module(m, path)) or nn.utils.parametrize.is_parametrized(m)
        if super().is_leaf_module(m, path):
            return not has_layers(m)
        return False

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if any(p.kind in variadic for p in parameters):
            result: tuple[Any, list[Any]] = super().create_args_for_root(root_fn, is_module)
            return result
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        checks = []
        for index, p in enumerate(parameters):
            default = () if p.default is p.empty else (p.default,)
            proxy = self.create_proxy("placeholder", p.name, default, {})
            free = not default or (self._inputs is not None and index < self._inputs)
            if not free:
                checks.append((proxy, p.name, p.default))
            value = proxy if free else p.default
            if p.kind is p.KEYWORD_ONLY:
                keywords[p.name] = value
            else:
                positional.append(value)
        for check in checks:
            self.create_proxy("call_function", composites.check_default, check, {})

        def call(*args: Any) -> Any:
            return self._watched(lambda: root_fn(*args, **keywords))

        return call, [self.root, *positional]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            last = self.graph._root._prev
            run = composites.MODULES.get(type(m))
            try:
                if run is not None:
                    return run(self, m, *args, **kwargs)
                return self._watched(lambda: forward(*args, **kwargs))
            except Exception as error:  # a user's forward may fail on a proxy in any way
                self._roll_back(last)
                self.eager[path] = reason_of(error)
        return self.create_proxy("call_module", path, args, kwargs)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        expand = composites.FUNCTIONS.get(getattr(target, "__qualname__", ""))
        if kind == "call_function" and expand is not None:
            return expand(self, *args[0], **args[1])
        return super().create_proxy(kind, target, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, TrainingFlag):
            owner = self.create_node("get_attr", a.path, (), {})
            return self.create_node("call_function", getattr, (owner, "training"), {})
        if type(a) is OrderedDict:
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        path = self._tensors.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if path is None:
            return attr_val
        if path not in self._cache:
            self._cache[path] = self.create_proxy("get_attr", path, (), {})
        return self._cache[path]

    def _watched(self, run: Callable[[], Any]) -> Any:
        """Run a forward; random numbers drawn while tracing would be frozen into the graph."""
        before = (torch.get_rng_state(), random.getstate())
        result = run()
        if random.getstate() != before[1] or not torch.equal(torch.get_rng_state(), before[0]):
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            raise fx.proxy.TraceError("random numbers drawn in forward")
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
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "control flow" in text and ON_TRAINING not in text:
        return ON_TENSOR
    if isinstance(error, fx.proxy.TraceError):
        return f"untraceable: {text}"[:160]
    return f"untraceable: {type(error).__name__}: {text}"[:160]


def opaque_reason(m: nn.Module) -> str | None:
    """Why `m` has to be called as a module, or None."""
    if any(getattr(m, table, None) for table in _HOOK_TABLES):
        return "hook on the module"
    if isinstance(m, torch.jit.ScriptModule):
        return "untraceable: TorchScript module"
    return None


def has_layers(m: nn.Module) -> bool:
    """Whether `m` is or holds a conv or linear layer."""
    return any(isinstance(child, (*LAYERS, nn.MultiheadAttention)) for child in m.modules())


@contextmanager
def _training_flags(root: nn.Module, prefix: str) -> Iterator[None]:
    modules = [(n, m) for n, m in root.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    before = [m.__dict__.get("training", True) for _, m in modules]
    try:
        for name, module in modules:
            # A part has no flag of its own in the tree: reading one there is control flow.
            module.__dict__["training"] = TrainingFlag(name or ("" if prefix else "swat"))
        yield
    finally:
        for (_, module), flag in zip(modules, before, strict=True):
            module.__dict__["training"] = flag


def trace_model(twin: nn.Module, example_inputs: Sequence[Any] | None) -> SwatModule:
    """Trace a mirrored model.

    Args:
        twin: a mirror (`swatfx.graph_module.mirror`); its modules are changed in place.
        example_inputs: tells how many of forward's arguments are inputs.

    Raises:
        InputError: more example inputs than forward has arguments.
    """
    count = None if example_inputs is None else len(example_inputs)
    names = [
        p for p in inspect.signature(twin.forward).parameters.values() if p.kind <= p.KEYWORD_ONLY
    ]
    if (
        count is not None
        and not any(p.kind == p.VAR_POSITIONAL for p in names)
        and count > len(names)
    ):
        raise InputError(f"forward takes {len(names)} arguments", value=f"{count} example inputs")
    try:
        gm, tracer = _trace(twin, "", count)
        eager = tracer.eager
    except Exception as error:  # tracing a user's forward may fail in any way
        gm, eager = _eager_root(twin), {"": reason_of(error)}
    gm.share_hooks(twin)
    gm.eager.update(eager)
    for path in list(eager):
        _trace_below(gm, twin.get_submodule(path), path)
    return gm


def _trace(root: nn.Module, prefix: str, inputs: int | None) -> tuple[SwatModule, _Tracer]:
    tracer = _Tracer(prefix)
    kept = set(root.__dict__)
    graph = tracer.trace_root(root, inputs)
    run = composites.MODULES.get(type(root))
    if run is not None:
        raise fx.proxy.TraceError("a composite is traced from its caller")
    gm = SwatModule(root, graph)
    for name in set(root.__dict__) - kept:  # tensors that forward made: constants of the graph
        value = root.__dict__.pop(name)
        if isinstance(value, torch.Tensor):
            gm.register_buffer(name, value, persistent=False)
    return gm, tracer


def _eager_root(twin: nn.Module) -> SwatModule:
    graph = fx.Graph()
    args = graph.placeholder("*args")
    kwargs = graph.placeholder("**kwargs")
    graph.output(graph.call_module("swat.eager_root", (args, kwargs)))
    gm = SwatModule(twin, fx.Graph())
    # The eager module must not meet our child `swat` among its own: it may iterate over them.
    gm.__dict__["_modules"] = dict(twin._modules)
    gm.__dict__["pending_eager_root"] = EagerRoot(twin)
    gm.__dict__["pending_graph"] = graph
    return gm


def _trace_below(gm: SwatModule, module: nn.Module, path: str) -> None:
    """Give the layers below the eager `module` parts of their own."""
    reason = gm.eager.get(path, "")
    if isinstance(module, LAYERS) or isinstance(module, torch.jit.ScriptModule):
        return
    if reason == "hook on the module" and path and _trace_part(gm, module, path):
        return
    for name, child in module.named_children():
        below = join(path, name)
        if below in gm.parts or below in gm.eager or not has_layers(child):
            continue
        if reason_below := opaque_reason(child):
            gm.eager[below] = reason_below
        elif type(child).forward is nn.Module.forward or not _trace_part(gm, child, below):
            pass
        else:
            continue
        _trace_below(gm, child, below)


def _trace_part(gm: SwatModule, module: nn.Module, path: str) -> bool:
    """Trace `module` as a part; False (with a reason noted) if it has to stay eager."""
    if has_defaults(module) and not isinstance(module, LAYERS):
        gm.eager.setdefault(path, "untraceable: optional arguments below eager code")
        return False
    try:
        part, tracer = _trace(module, path, None)
    except Exception as error:  # as above
        gm.eager.setdefault(path, reason_of(error))
        return False
    module.__dict__["forward"] = part
    gm.parts[path] = part
    for below, reason in tracer.eager.items():
        gm.eager[join(path, below)] = reason
        _trace_below(gm, module.get_submodule(below), join(path, below))
    return True


def has_defaults(module: nn.Module) -> bool:
    """Whether forward has arguments that a caller may leave out."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in parameters)
