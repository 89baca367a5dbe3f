"""Stage 0: trace a model into a SwatModule; what cannot be traced stays eager, with a reason.

Reads the model's mirror; writes a graph whose leaves are torch.nn modules. A module whose forward
symbolic tracing cannot follow becomes one call in the graph, and what lies below it is traced by
itself into a *part*. Nothing else of the model changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.reading.layer_calls import find_site
from passes.tracing import composites
from passes.tracing.module_kinds import (
    LAYERS,
    is_script,
    may_call_layers,
    opaque_reason,
    owns_layer,
    untraceable_reason,
)
from passes.tracing.tracer import Tracer, reason_of
from swatfx.compiled import (
    Arguments,
    EagerRoot,
    Pattern,
    Reroute,
    SwatModule,
    Ways,
    all_parts,
    holds_none,
    is_root,
    join,
    lends_layers,
    signature_of,
    split_inputs,
)
from swatfx.errors import InputError

_VARIADIC = "untraceable: variadic arguments, and no example_inputs"
_NO_INPUT = "untraceable: every argument is optional, and no example_inputs"
# What example_inputs of the whole model do not tell of a part of it.
_BELOW = {
    _VARIADIC: "untraceable: variadic arguments, given by eager code",
    _NO_INPUT: "untraceable: every argument is optional, and eager code decides which are given",
}


def trace_model(twin: nn.Module, example_inputs: Any) -> SwatModule:
    """Trace a mirrored model.

    Args:
        twin: a mirror (`swatfx.compiled.module.mirror`); its modules are changed in place.
        example_inputs: a call that shall be a graph: positional inputs, or a dict by name.

    Raises:
        InputError: the example inputs are no call of forward.
    """
    _check_wrappers(twin)
    signature, arguments = signature_of(twin), Arguments(twin.forward)
    first = None if example_inputs is None else _example(arguments, example_inputs)
    gm = _trace_ways(twin, arguments, first)
    gm.__dict__["signature"] = signature
    gm.share_hooks(twin)
    gm.__dict__["mirrored"] = twin
    if "" not in gm.eager:
        for path in list(gm.eager):
            _trace_below(gm, twin.get_submodule(path), path, gm.eager)
        gm.__dict__["lends"] = arguments.is_open or lends_layers(twin)
        if gm.ways is not None and gm.ways.arguments.is_open:
            gm.ways.fallback = _eager_graph(twin, gm)
        if gm.__dict__["lends"] and not composites.takes_any(twin):
            _trace_below(gm, twin, "", gm.otherwise)
    else:
        gm.__dict__["lends"] = True
        for path in list(gm.eager):
            _trace_below(gm, twin.get_submodule(path), path, gm.eager)
    twin.__dict__["forward"] = Reroute(gm)
    gm.recompile()
    return gm


def _example(arguments: Arguments, example_inputs: Any) -> Pattern:
    """The pattern of the example call."""
    args, kwargs = split_inputs(example_inputs)
    given = arguments.bind(args, kwargs)
    if given is None:
        try:
            arguments.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"the example inputs are no call of forward{arguments.signature}: {error}",
                value=f"{len(args)} by position, {', '.join(kwargs) or 'none'} by name",
                remedy="give a sequence of positional inputs, or a dict of inputs by name",
            ) from error
    assert given is not None  # else Python refuses it
    return arguments.pattern(given)


def _trace_ways(twin: nn.Module, arguments: Arguments, example: Pattern | None) -> SwatModule:
    """The root traced for the example call, or for the likeliest, and for a few others."""
    if composites.takes_any(twin):
        gm, tracer = _trace(twin, "", arguments, None)
        gm.eager.update(tracer.eager)
        return gm
    if example is not None and any(holds_none(v) for v in example.values.values() if v is not None):
        gm = _eager_root(twin)
        gm.eager[""] = "untraceable: None inside an input"
        return gm
    todo = [] if example is None else [example]
    if not arguments.rest or arguments.required:
        todo += list(arguments.patterns())
    found, reason = _trace_patterns(twin, "", arguments, todo, example is not None)
    if not found:
        gm = _eager_root(twin)
        gm.eager[""] = reason
        return gm
    gm = _joined(found, arguments)
    gm.__dict__["_modules"] = dict(twin._modules)
    for _, graph, tracer in found:
        graph.__dict__["_modules"] = gm.__dict__["_modules"]
        gm.eager.update(tracer.eager)
    return gm


_Found = list[tuple[Pattern, SwatModule, Tracer]]


def _trace_patterns(
    root: nn.Module, prefix: str, arguments: Arguments, todo: list[Pattern], must: bool
) -> tuple[_Found, str]:
    """A graph for each pattern that can be traced; and why there is none, if there is none.

    Args:
        root: what to trace.
        prefix: its path.
        arguments: of its forward.
        todo: patterns, the likeliest first.
        must: whether the first one has to be traced.
    """
    found: _Found = []
    reason = _VARIADIC if not todo else ""
    for number, pattern in enumerate(todo):
        if any(pattern.values == other.values for other in todo[:number]):
            continue
        if not pattern.inputs:
            reason = reason or _NO_INPUT
            continue
        try:
            graph, tracer = _trace(root, prefix, arguments, pattern)
        except Exception as error:  # tracing a user's forward may fail in any way
            reason = reason or reason_of(error)
            if must and not number:
                break
            continue
        found.append((pattern, graph, tracer))
    return found, reason


def _joined(found: _Found, arguments: Arguments) -> SwatModule:
    """The first graph, with the others as further ways."""
    pattern, gm, _ = found[0]
    gm.__dict__["ways"] = ways = Ways(arguments, pattern)
    ways.graphs = [(pattern, graph) for pattern, graph, _ in found[1:]]
    return gm


def _check_wrappers(twin: nn.Module) -> None:
    if is_script(twin):
        raise InputError(
            "a TorchScript module cannot be traced",
            value=type(twin).__name__,
            remedy="compile the Python module that it was made from",
        )
    if isinstance(twin, nn.parallel.DistributedDataParallel) or "_orig_mod" in twin._modules:
        raise InputError(
            "the model is wrapped already",
            value=type(twin).__name__,
            remedy="give swatfx.compile the model itself, and wrap what it returns",
        )


def _trace(
    root: nn.Module, prefix: str, arguments: Arguments, pattern: Pattern | None
) -> tuple[SwatModule, Tracer]:
    if reason := untraceable_reason(root):
        raise fx.proxy.TraceError(reason)
    tracer = Tracer(prefix)
    kept = set(root.__dict__)
    graph = tracer.trace_root(root, arguments, pattern)
    gm = SwatModule(root, graph)
    leaves = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    gm.__dict__["called"] = frozenset(leaves.union(tracer.inlined))
    gm.__dict__["iterates"] = isinstance(root, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
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


def _eager_graph(twin: nn.Module, gm: SwatModule) -> SwatModule:
    """What runs the calls that no graph of `gm` is for."""
    fallback = _eager_root(twin)
    fallback.__dict__["_modules"] = gm.__dict__["_modules"]
    return fallback


def _trace_below(gm: SwatModule, module: nn.Module, path: str, notes: dict[str, str]) -> None:
    """Give the layers below the eager `module` parts of their own; reasons go to `notes`."""
    if isinstance(module, (*LAYERS, nn.MultiheadAttention)) or is_script(module):
        return  # attention reads its children's weights and does not call them
    composites.avoid_fused_path(module)
    if gm.eager.get(path) == "hook on the module" and path and _trace_part(gm, module, path, notes):
        _trace_owners(gm, module, path, notes)
        return
    for name, child in module.named_children():
        below = join(path, name)
        if below in gm.parts or below in gm.eager or below in notes:
            continue
        if reason := opaque_reason(child):
            if is_script(child) or may_call_layers(child):
                notes[below] = reason
        elif not may_call_layers(child):
            continue
        elif _splits(gm, below):
            continue
        elif type(child).forward is not nn.Module.forward and _trace_part(gm, child, below, notes):
            _trace_owners(gm, child, below, notes)
            continue
        _trace_below(gm, child, below, notes)


def _trace_owners(gm: SwatModule, module: nn.Module, path: str, notes: dict[str, str]) -> None:
    """Give every module below a part that owns a weight a part of its own.

    Eager code need not call what it holds: it may walk through a Sequential, or use a whole network
    as a bag of stages.
    """
    part = gm.parts.get(path)  # none where no call of a layer is in it
    for name, below in module.named_modules(prefix=path):
        known = name in gm.parts or name in gm.eager or name in notes
        if name == path or known or not owns_layer(below):
            continue
        split = part is not None and _is_split(part, name.removeprefix(f"{path}."))
        if not split and not _splits(gm, name):
            _trace_part(gm, below, name, notes)


def _splits(gm: SwatModule, attention: str) -> bool:
    """Whether a graph of the whole model projects with slices of this attention's weight."""
    return any(_is_split(g, attention) for prefix, g in all_parts(gm) if is_root(prefix))


def _is_split(part: fx.GraphModule, attention: str) -> bool:
    """Whether `part` projects with slices of this attention's weight: layers other than its own."""
    weight = f"{attention}.in_proj_weight"
    readers = [node.users for node in part.graph.nodes if node.target == weight]
    return any(user.target is not F.linear for users in readers for user in users)


def _trace_part(gm: SwatModule, module: nn.Module, path: str, notes: dict[str, str]) -> bool:
    """Trace `module` as a part; False (with a reason noted) if it has to stay eager.

    Where its arguments may be left out, the part is for calls that do, and Python for the others.
    """
    arguments = Arguments(module.forward)
    any_value = composites.takes_any(module)
    try:
        if any_value:
            found = [(arguments.bare(), *_trace(module, path, arguments, None))]
            reason = ""
        else:
            todo = list(arguments.patterns())
            found, reason = _trace_patterns(module, path, arguments, todo, False)
            reason = _BELOW.get(reason, reason)
    except Exception as error:  # as above
        found, reason = [], reason_of(error)
    if not found:
        notes.setdefault(path, reason)
        return False
    inner = {below: why for _, _, tracer in found for below, why in tracer.eager.items()}
    graphs = [graph for _, graph, _ in found]
    if not inner and not any(find_site(graph, n) for graph in graphs for n in graph.graph.nodes):
        return True  # no layer in it: it may stay what it was
    part = graphs[0]
    if not any_value:
        _joined(found, arguments)
        part.recompile()
    module.__dict__["forward"] = part
    for graph in graphs:
        graph.__dict__["swat_owner"] = module
    gm.parts[path] = part
    if notes is gm.otherwise or arguments.is_open:
        gm.spare.add(path)
    for below, why in inner.items():
        notes[join(path, below)] = why
        _trace_below(gm, module.get_submodule(below), join(path, below), notes)
    if arguments.is_open and not any_value and not isinstance(module, LAYERS):
        _trace_below(gm, module, path, gm.otherwise)
    return True
