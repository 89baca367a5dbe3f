"""Decide which layers run sparse kernels, and in what memory order the graph keeps its tensors.

Reads LayerPlans, LayerCalls and the weights; writes `LayerPlan.kernels`, gives each linear layer
that runs sparse the argument `sparse_kernels`, and each convolution `layout="batch_innermost"`. Its
result and its input gradient lie so then, and what follows (norms, ReLUs, additions, pools) keeps
the order that it finds; a tensor that comes in another order is converted once, where it is made
(`layout_flow`). Values do not change beyond rounding. A second run finds nothing left and changes
nothing.

The rule: a layer runs sparse where all three of its products are sparse and its densities are
at most `MOST_DENSE`, above which dense kernels on masked weights were measured to be as fast; where
most convolutions are too dense or of the wrong kind, all stay dense, since conversions would eat
the gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from passes.layout_flow import LayoutFlow
from passes.verify import OPS
from swatfx import kernels, meta
from swatfx.graph_module import SwatModule, all_parts, evaluate
from swatfx.kernels.problems import MAX_TAPS
from swatfx.layouts import BATCH_INNERMOST
from swatfx.meta import LayerCall, LayerPlan
from swatfx.passing import Context, PassResult
from swatfx.state import Pack

MOST_DENSE = 0.3
LEAST_FILTERS = 16  # of a group: below, hardly a vector is filled
SPARSE = "sparse"


def choose_kernels(gm: SwatModule, ctx: Context) -> PassResult:
    """Choose for every layer, in the root graph and in every part."""
    parts = dict(all_parts(gm))
    todo = {n: part for part in parts.values() for n in _layers(part) if not _plan(n).kernels}
    if not todo:
        return PassResult(gm, False)
    asked = str(gm.meta.get("kernels", "auto"))
    reasons = {node: _why_dense(part, node, asked) for node, part in todo.items()}
    convolutions = [node for node in todo if node.target is OPS[0]]
    _agree(reasons, convolutions)
    sparse = [node for node in convolutions if reasons[node] is None]
    if asked == "auto" and 2 * len(sparse) < len(convolutions):
        for node in sparse:
            reasons[node] = "most convolutions run dense"
    for node, reason in reasons.items():
        plan = replace(_plan(node), kernels=SPARSE if reason is None else f"dense: {reason}")
        meta.update(node, plan=plan)
        if reason is None and node not in convolutions:
            node.kwargs = {**node.kwargs, "sparse_kernels": True}
    for prefix, part in parts.items():
        _lay_out(part, prefix, gm.eager)
        part.recompile()
    count = sum(reason is None for reason in reasons.values())
    return PassResult(gm, True, (f"{count} of {len(todo)} layers run sparse kernels",))


def _layers(part: fx.GraphModule) -> Iterator[fx.Node]:
    return (n for n in part.graph.nodes if n.op == "call_function" and n.target in OPS)


def _plan(node: fx.Node) -> LayerPlan:
    plan = meta.read(node).plan
    assert plan is not None  # insert_sparsify wrote it
    return plan


def _why_dense(part: fx.GraphModule, node: fx.Node, asked: str) -> str | None:
    """Why the layer has to run dense, or None."""
    plan, call = _plan(node), meta.read(node).call
    assert call is not None
    if asked == "dense":
        return "as asked"
    if not kernels.available():
        return "no compiled kernels"
    if not (plan.forward_weight and plan.backward_weight and plan.backward_activation):
        return "not sparse in every product"
    unfit = _unfit(plan, call) if node.target is OPS[0] else None
    if unfit is not None:
        return unfit
    weight = evaluate(part, node.args[1]) if isinstance(node.args[1], fx.Node) else None
    if weight is not None and (weight.dtype is not torch.float32 or weight.device.type != "cpu"):
        return f"{weight.dtype} on {weight.device.type}".removeprefix("torch.")
    if asked == "sparse":
        return None
    for name, density in (
        ("weight", plan.weight_density.value),
        ("activation", plan.activation_density.value),
    ):
        if density > MOST_DENSE:
            return f"{name} density {density:g} is above {MOST_DENSE}"
    filters = plan.weight_shape[0] // max(call.groups, 1)
    return f"{filters} filters a group" if filters < LEAST_FILTERS else None


def _unfit(plan: LayerPlan, call: LayerCall) -> str | None:
    kernel = plan.weight_shape[2:]
    if len(kernel) not in (1, 2):
        return f"{len(kernel)}d"
    if call.pad:
        return f"{call.pad_mode} padding"
    if torch.Size(kernel).numel() > MAX_TAPS or max(kernel) > kernels.LARGEST_KERNEL:
        return "kernel too large"
    return "stride too large" if max(call.stride) > kernels.LARGEST_STRIDE else None


def _agree(reasons: dict[fx.Node, str | None], convolutions: list[fx.Node]) -> None:
    """Layers that share a packed input run alike, since it was packed in one order."""
    groups: dict[str, list[fx.Node]] = {}
    for node in convolutions:
        pack = node.args[4]
        if isinstance(pack, fx.Node):  # the module: two graphs may call one
            groups.setdefault(str(pack.target), []).append(node)
    for group in groups.values():
        dense = [n for n in group if reasons[n] is not None]
        if dense:
            for node in group:
                reasons[node] = reasons[node] or f"shares its input with {_plan(dense[0]).name}"


def _lay_out(part: fx.GraphModule, prefix: str, eager: dict[str, str]) -> None:
    """Give sparse convolutions their layout, and let the graph keep it."""
    sparse = [n for n in _layers(part) if n.target is OPS[0] and _plan(n).kernels == SPARSE]
    if not sparse:
        return
    LayoutFlow(part, prefix, eager, sparse).run()
    for node in sparse:
        node.kwargs = {**node.kwargs, "layout": BATCH_INNERMOST}
        pack = node.args[4]
        assert isinstance(pack, fx.Node)  # every product is sparse
        module = part.get_submodule(str(pack.target))
        assert isinstance(module, Pack)
        module.layout = BATCH_INNERMOST
