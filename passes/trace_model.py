"""Stage 0: trace a model into a SwatModule; what cannot be traced stays eager, with a reason.

Reads the model's mirror; writes a graph whose leaves are torch.nn modules. A module whose forward
symbolic tracing cannot follow becomes one call in the graph, and what lies below it is traced by
itself into a *part*. Nothing else of the model changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes import composites
from passes.layer_calls import find_site
from passes.module_kinds import (
    LAYERS,
    has_defaults,
    is_patched,
    is_script,
    may_call_layers,
    opaque_reason,
    owns_layer,
)
from passes.tracer import Tracer, reason_of
from swatfx.errors import InputError
from swatfx.graph_module import EagerRoot, SwatModule, join

_OPTIONAL_BELOW = "untraceable: optional arguments below eager code"


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
    _check_wrappers(twin)
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


def _trace(root: nn.Module, prefix: str, inputs: int | None) -> tuple[SwatModule, Tracer]:
    if is_patched(root):
        raise fx.proxy.TraceError("forward replaced on the instance")
    tracer = Tracer(prefix)
    kept = set(root.__dict__)
    graph = tracer.trace_root(root, inputs)
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


def _trace_below(gm: SwatModule, module: nn.Module, path: str) -> None:
    """Give the layers below the eager `module` parts of their own."""
    if isinstance(module, (*LAYERS, nn.MultiheadAttention)) or is_script(module):
        return  # attention reads its children's weights and does not call them
    composites.avoid_fused_path(module)
    if gm.eager.get(path) == "hook on the module" and path and _trace_part(gm, module, path):
        _trace_owners(gm, module, path)
        return
    for name, child in module.named_children():
        below = join(path, name)
        if below in gm.parts or below in gm.eager:
            continue
        if reason := opaque_reason(child):
            if is_script(child) or may_call_layers(child):
                gm.eager[below] = reason
        elif not may_call_layers(child):
            continue
        elif type(child).forward is not nn.Module.forward and _trace_part(gm, child, below):
            _trace_owners(gm, child, below)
            continue
        _trace_below(gm, child, below)


def _trace_owners(gm: SwatModule, module: nn.Module, path: str) -> None:
    """Give every module below a part that owns a weight a part of its own.

    Eager code need not call what it holds: it may walk through a Sequential, or use a whole network
    as a bag of stages.
    """
    for name, below in module.named_modules(prefix=path):
        if name == path or name in gm.parts or name in gm.eager or not owns_layer(below):
            continue
        if not _is_split(gm.parts[path], name.removeprefix(f"{path}.")):
            _trace_part(gm, below, name)


def _is_split(part: SwatModule, attention: str) -> bool:
    """Whether `part` projects with slices of this attention's weight: layers other than its own."""
    weight = f"{attention}.in_proj_weight"
    readers = [node.users for node in part.graph.nodes if node.target == weight]
    return any(user.target is not F.linear for users in readers for user in users)


def _trace_part(gm: SwatModule, module: nn.Module, path: str) -> bool:
    """Trace `module` as a part; False (with a reason noted) if it has to stay eager."""
    if has_defaults(module) and not isinstance(module, LAYERS) and not composites.takes_any(module):
        gm.eager.setdefault(path, _OPTIONAL_BELOW)
        return False
    try:
        part, tracer = _trace(module, path, None)
    except Exception as error:  # as above
        gm.eager.setdefault(path, reason_of(error))
        return False
    if not tracer.eager and not any(find_site(part, node) for node in part.graph.nodes):
        return True  # no layer in it: it may stay what it was
    module.__dict__["forward"] = part
    part.__dict__["swat_owner"] = module
    gm.parts[path] = part
    for below, reason in tracer.eager.items():
        gm.eager[join(path, below)] = reason
        _trace_below(gm, module.get_submodule(below), join(path, below))
    return True
