"""From a model to a rewritten graph: a visible list of passes, run in order."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.assign_density import assign_density
from passes.choose_kernels import choose_again, choose_kernels
from passes.compress_saves import compress_saves
from passes.find_layers import find_layers
from passes.find_unreached import find_unreached, matrices_outside
from passes.insert_sparsify import insert_sparsify
from passes.reading.dataflow import to_networkx
from passes.trace_model import trace_model
from passes.tracing.random import DRAWN
from passes.verify import verify
from swatfx.arguments import INPUTS, SEVERAL, checked, optional
from swatfx.compiled import (
    Example,
    SwatModule,
    SwatState,
    all_nodes,
    mirror,
    split_inputs,
    watch,
    watch_wrappers,
)
from swatfx.costs import measure, warn_of_eager
from swatfx.errors import InputError, PassError, SwatError
from swatfx.ops.norm import EXACT
from swatfx.options import CompileOptions
from swatfx.passing import Context, Pass
from swatfx.policy import Policy, as_policy
from swatfx.training import after_load, watch_loads

# Tracing patches torch while it runs: one thread at a time. Forwards in others go straight through.
TRACING = threading.RLock()

__all__ = [
    "TRACING",
    "PassRecord",
    "compile",
    "default_passes",
    "run_passes",
    "to_networkx",
]


@dataclass(frozen=True)
class PassRecord:
    """How one pass went: seconds it took, graph nodes before and after, what it noted."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    notes: tuple[str, ...]


def default_passes() -> list[Pass]:
    """The passes that make a SWAT graph, in order."""
    return [
        find_layers,
        find_unreached,
        assign_density,
        insert_sparsify,
        compress_saves,
        choose_kernels,
    ]


@checked(example_inputs=INPUTS, passes=optional(SEVERAL))
def compile(
    model: nn.Module,
    policy: Policy | str,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None,
    norm_saves: str = EXACT,
    value_dtype: str | torch.dtype | None = None,
    kernels: str = "auto",
) -> SwatModule:
    """Rewrite `model` into a sparse-training graph.

    Args:
        model: any module. It keeps working as it was; parameters and buffers are shared with it.
        policy: what is sparse where: a Policy, or its string form such as "swat-u:0.9".
        example_inputs: a call that shall be a graph: positional inputs, or a dict of inputs by
            name. Without, the graphs are for the required arguments, and for up to three that are
            None by default. Other calls run as Python, their layers compiled one by one. With
            them, kernels are chosen by what they are predicted to take at these shapes, and under
            the autocast that is on now (`passes.predict_kernels`); values do not matter, so that
            tensors may be on the meta device.
        passes: instead of `default_passes()`.
        norm_saves: what norms, and what else `swatfx.ops.coded.RULES` has a rule for, keep for
            backward, where some layer packs its input: "exact", or codes (`swatfx.ops.codes`):
            "int8", a byte an element, or "int4", half of one, rounded by chance.
        value_dtype: dtype of the packed values, where the layer's own is wider: "bf16", or None.
        kernels: "auto" runs sparse kernels where they gain (`passes.choose_kernels`), "sparse"
            wherever they can run, "dense" nowhere.

    Returns:
        A GraphModule whose parameters have the model's names. State that changes while training
        is in buffers under `swat.`; `parts` and `eager` tell what symbolic tracing left to Python.

    Raises:
        PolicyError: the policy does not fit the model.
        InputError: nothing to sparsify, lazy modules, NaN or complex weights, unknown options.
        PassError: a pass failed.
    """
    ctx = Context(as_policy(policy))
    options = CompileOptions(norm_saves, value_dtype, kernels)  # type: ignore[arg-type]
    if not isinstance(model, nn.Module):
        raise InputError("swatfx.compile wants a torch.nn.Module", value=type(model).__name__)
    _refuse_compiled(model)
    if hasattr(model, "swat"):
        raise InputError(
            "the model has a child named 'swat', or another attribute", remedy="rename it"
        )
    watch_wrappers()
    with TRACING, _collector_paused():
        gm = _traced(model, example_inputs)
        _add_state(gm, ctx.policy, options)
        if example_inputs is not None:
            gm.swat.example = Example(_without_values(example_inputs), _autocast())
        gm = run_passes(gm, default_passes() if passes is None else passes, ctx)
        watch_loads(model, gm)
    example = None if example_inputs is None else _without_values(example_inputs)
    macs = None if example is None else lambda: _macs(gm, example)
    warn_of_eager(gm, macs, lambda: matrices_outside(gm))
    return gm


def _refuse_compiled(model: nn.Module) -> None:
    """Raise InputError if the model, or a part of it, is compiled: no policy would reach it."""
    found = [path for path, module in model.named_modules() if isinstance(module, SwatModule)]
    if not found:
        return
    outer = _outermost_wrapper(model, found[0])
    wrapper = None if outer == found[0] else type(model.get_submodule(outer)).__name__
    if not outer:
        raise InputError(
            "the model is compiled already",
            value=wrapper,
            remedy="compile the model it was made from",
        )
    inside = "" if wrapper is None else f", inside {wrapper}"
    more = f", and likewise {', '.join(found[1:])}" if found[1:] else ""
    raise InputError(
        f"is compiled already{inside}{more}",
        layer=found[0],
        remedy="compile the whole model once, made of parts that are not compiled;"
        " swatfx.per_layer gives parts policies of their own",
    )


def _outermost_wrapper(model: nn.Module, path: str) -> str:
    """Path of what wraps the module at `path` and holds nothing else; `path` if nothing does."""
    while path.rpartition(".")[2] in ("module", "_orig_mod"):
        above = path.rpartition(".")[0]
        if len(model.get_submodule(above)._modules) > 1:
            break
        path = above
    return path


def _without_values(example_inputs: Any) -> Any:
    args, kwargs = split_inputs(example_inputs)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda x: x.detach().to("meta"), (args, kwargs)
    )
    return kwargs if kwargs else args


def _autocast() -> str | None:
    """Of activations on the CPU, where autocast is on."""
    if not torch.is_autocast_enabled("cpu"):
        return None
    return "bf16" if torch.get_autocast_dtype("cpu") is torch.bfloat16 else "fp32"


def _macs(gm: SwatModule, example_inputs: Any) -> dict[str, int]:
    """MACs of a forward, layer by layer, as if dense."""
    costs = measure(gm, example_inputs, "paper").costs
    return {name: cost.dense_forward_macs for name, cost in costs.items()}


def _traced(model: nn.Module, example_inputs: Any) -> SwatModule:
    """Trace a mirror of `model`; again where another thread may have drawn the random numbers."""
    for _ in range(2):
        gm = trace_model(mirror(model), example_inputs)
        if threading.active_count() == 1 or not any(DRAWN in why for why in gm.eager.values()):
            return gm
    return trace_model(mirror(model), example_inputs)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause cyclic garbage collection: a graph of thousands of nodes is all live, yet is searched
    over and over while it is built, a third of the time that compiling takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _add_state(gm: SwatModule, policy: Policy, options: CompileOptions) -> None:
    swat = SwatState(policy, options)
    if policy.updates_masks or any(rule.updates_masks for _, rule in policy.rules):
        swat.remember(len(policy.rules) + 1)
    swat.train(gm.training)
    gm.add_module("swat", swat)
    gm.adopt_parts()
    gm.register_load_state_dict_post_hook(after_load)  # type: ignore[no-untyped-call]


def run_passes(gm: SwatModule, passes: Sequence[Pass], ctx: Context) -> SwatModule:
    """Run `passes` in order, each followed by `verify`; what happened is in `gm.pass_records`.

    Raises:
        PassError: from whatever a pass raised that is not a SwatError of its own.
    """
    records: list[PassRecord] = []
    for function in passes:
        name = getattr(function, "__name__", type(function).__name__)
        before, start = _count(gm), time.perf_counter()
        try:
            result = function(gm, ctx)
            gm = result.graph_module
            if result.modified:
                verify(gm, ctx)
        except SwatError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise PassError(name, f"{type(error).__name__}: {first}") from error
        seconds = time.perf_counter() - start
        records.append(PassRecord(name, seconds, before, _count(gm), result.notes))
    gm.__dict__["pass_records"] = records
    watch(gm)
    if choose_kernels in passes:
        gm.__dict__["choose_kernels"] = _choose_kernels_again
    return gm


def _choose_kernels_again(gm: SwatModule) -> None:
    choose_again(gm, Context(gm.swat.policy))


def _count(gm: SwatModule) -> int:
    return sum(1 for _ in all_nodes(gm))


def as_fx_pass(function: Pass, policy: Policy | str) -> Any:
    """`function` in the form that torch.fx's PassManager runs."""
    from torch.fx.passes.infra.pass_base import PassResult as FxPassResult

    ctx = Context(as_policy(policy))

    def run(gm: fx.GraphModule) -> Any:
        if not isinstance(gm, SwatModule):
            raise InputError("a swatfx pass runs on a compiled model", value=type(gm).__name__)
        result = function(gm, ctx)
        return FxPassResult(result.graph_module, result.modified)

    run.__name__ = getattr(function, "__name__", "swatfx_pass")
    return run
