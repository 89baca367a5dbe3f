"""Decide which layers run sparse kernels, and in what memory order the graph keeps its tensors.

Reads LayerPlans, LayerCalls and the weights; writes `LayerPlan.kernels`, gives each linear layer
that runs sparse the argument `sparse_kernels`, and each convolution `layout="batch_innermost"`. Its
result and its input gradient lie so then, and what follows (norms, ReLUs, additions, pools) keeps
the order that it finds; a tensor that comes in another order is converted once, where it is made
(`layout_flow`). Values do not change beyond rounding. A second run finds nothing left and changes
nothing.

A model on the meta device has no device of its own yet: it is taken for one of this machine's CPU.

The rule: a layer runs sparse where all three of its products are sparse and its densities are
at most `MOST_DENSE`, above which dense kernels on masked weights were measured to be as fast; where
most convolutions are too dense or of the wrong kind, all stay dense, since conversions would eat
the gain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx

from passes.layout_flow import LayoutFlow
from passes.verify import OPS
from swatfx import kernels, masks, meta
from swatfx.graph_module import SwatModule, all_parts, evaluate
from swatfx.kernels.problems import MAX_TAPS
from swatfx.layouts import BATCH_INNERMOST
from swatfx.meta import LayerCall, LayerPlan
from swatfx.ops.layout import laid_out
from swatfx.passing import Context, PassResult
from swatfx.policy import Policy
from swatfx.state import Pack

MOST_DENSE = 0.3
LEAST_FILTERS = 16  # of a group: below, hardly a vector is filled
SPARSE = "sparse"
# Methods by the names that their papers give them, for people.
_NAMES = {
    name.lower(): name for name in ("RigL", "SET", "SNFS", "DSR", "DST", "SSC", "SAW", "meProp")
}


def choose_kernels(gm: SwatModule, ctx: Context) -> PassResult:
    """Choose for every layer, in the root graph and in every part."""
    parts = dict(all_parts(gm))
    todo = {n: part for part in parts.values() for n in _layers(part) if not _plan(n).kernels}
    if not todo:
        return PassResult(gm, False)
    reasons = _reasons(gm, todo, None)
    for node, reason in reasons.items():
        meta.update(node, plan=replace(_plan(node), kernels=_told(reason)))
        if reason is None and node.target is not OPS[0]:
            node.kwargs = {**node.kwargs, "sparse_kernels": True}
    for prefix, part in parts.items():
        _lay_out(part, prefix, gm.eager)
        part.recompile()
    # A layer that several graphs call, or one calls twice, is one layer; all its calls run alike.
    layers = {_plan(node).name: reason for node, reason in reasons.items()}
    count = sum(reason is None for reason in layers.values())
    note = f"{count} of {len(layers)} layers run sparse kernels"
    why = Counter(reason for reason in layers.values() if reason is not None)
    dense = [f"dense: {reason} ({times} of them)" for reason, times in why.most_common()]
    return PassResult(gm, True, (note, *dense))


def kernels_on(gm: SwatModule, device: str) -> dict[str, str]:
    """Layer -> what `LayerPlan.kernels` would be, were the model on `device`. Changes nothing."""
    nodes = {n: part for _, part in all_parts(gm) for n in _layers(part)}
    found: dict[str, str] = {}
    for node, reason in _reasons(gm, nodes, torch.device(device)).items():
        found.setdefault(_plan(node).name, _told(reason))
    return found


def _told(reason: str | None) -> str:
    return SPARSE if reason is None else f"dense: {reason}"


def _reasons(
    gm: SwatModule, nodes: dict[fx.Node, SwatModule], device: torch.device | None
) -> dict[fx.Node, str | None]:
    """Why each layer runs dense, or None; `device` stands in for the model's own."""
    asked = str(gm.meta.get("kernels", "auto"))
    policy = Policy.from_json(gm.meta["policy"])
    reasons = {n: _why_dense(part, n, asked, policy, device) for n, part in nodes.items()}
    convolutions = [node for node in nodes if node.target is OPS[0]]
    _agree(reasons, convolutions)
    while True:
        sparse = [node for node in convolutions if reasons[node] is None]
        unsafe = list(_unsafe(gm, sparse))
        if not unsafe:
            break
        reasons |= dict.fromkeys(unsafe, "what it makes is reshaped, and written in place later")
        _agree(reasons, convolutions)
    if asked == "auto" and 2 * len(sparse) < len(convolutions):
        for node in sparse:
            reasons[node] = "most convolutions run dense"
    return reasons


def _unsafe(gm: SwatModule, sparse: list[fx.Node]) -> Iterator[fx.Node]:
    """Those of `sparse` whose layout in memory would change what the graph computes."""
    for prefix, part in all_parts(gm):
        own = [node for node in sparse if node.graph is part.graph]
        if own:
            yield from LayoutFlow(part, prefix, gm.eager, own).unsafe()


def choose_again(gm: SwatModule, ctx: Context) -> None:
    """Choose anew, as if nothing were chosen: the model moved to another device or dtype."""
    for _, part in all_parts(gm):
        for node in list(part.graph.nodes):
            if node.target is laid_out:
                node.replace_all_uses_with(node.args[0])
                part.graph.erase_node(node)
        for node in _layers(part):
            chosen = ("layout", "sparse_kernels")
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in chosen}
            meta.update(node, plan=replace(_plan(node), kernels=""))
            pack = node.args[4]
            if isinstance(pack, fx.Node):
                module = part.get_submodule(str(pack.target))
                if isinstance(module, Pack) and module.layout == BATCH_INNERMOST:
                    module.layout = ""
        part.recompile()
    choose_kernels(gm, ctx)


def _layers(part: fx.GraphModule) -> Iterator[fx.Node]:
    return (n for n in part.graph.nodes if n.op == "call_function" and n.target in OPS)


def _plan(node: fx.Node) -> LayerPlan:
    plan = meta.read(node).plan
    assert plan is not None  # insert_sparsify wrote it
    return plan


def _why_dense(
    part: fx.GraphModule,
    node: fx.Node,
    asked: str,
    policy: Policy,
    device: torch.device | None,
) -> str | None:
    """Why the layer has to run dense, or None."""
    plan, call = _plan(node), meta.read(node).call
    assert call is not None
    if asked == "dense":
        return "asked for"
    weight = evaluate(part, node.args[1]) if isinstance(node.args[1], fx.Node) else None
    unsuited = _unsuited(weight, device)
    if unsuited is not None:
        return unsuited
    if not kernels.available():
        return "no compiled kernels"
    if not (plan.forward_weight and plan.backward_weight and plan.backward_activation):
        return _dense_product(plan, policy)
    is_conv = node.target is OPS[0]
    unfit = _unfit(plan, call) if is_conv else None
    if unfit is not None or asked == "sparse":
        return unfit
    for name, density in (
        ("weight", plan.weight_density.value),
        ("activation", plan.activation_density.value),
    ):
        if density > MOST_DENSE:
            return f"{name} density {density:g} is above {MOST_DENSE}"
    return _too_few(plan, call, is_conv)


def _unsuited(weight: Tensor | None, device: torch.device | None) -> str | None:
    """Why no sparse kernel runs on this device, or with this dtype."""
    where = device or (None if weight is None or weight.is_meta else weight.device)
    if where is not None and where.type != "cpu":
        return f"GPUs run reference kernels ({where.type})"
    if weight is not None and weight.dtype is not torch.float32:
        return f"weights are {weight.dtype}, sparse kernels float32".replace("torch.", "")
    return None


def _dense_product(plan: LayerPlan, policy: Policy) -> str:
    """Which of the three products the method leaves dense."""
    name = _NAMES.get(plan.policy, plan.policy)
    if not plan.forward_weight:
        return f"{name} runs forward on dense weights"
    if not plan.backward_weight:
        return f"{name} takes input gradients from dense weights"
    if masks.needs(policy.rule_for(plan.name)[1]):
        return f"masks of {name} need dense weight gradients"
    return f"{name} leaves activations dense, and so weight gradients"


def _too_few(plan: LayerPlan, call: LayerCall, is_conv: bool) -> str | None:
    groups = max(call.groups, 1)
    filters = plan.weight_shape[0] // groups
    if filters >= LEAST_FILTERS:
        return None
    if not is_conv:
        return f"too few outputs ({filters})"
    if groups > 1 and plan.weight_shape[1] == 1:
        return "depthwise"
    return f"too few filters{' a group' if groups > 1 else ''} ({filters})"


def _unfit(plan: LayerPlan, call: LayerCall) -> str | None:
    kernel = plan.weight_shape[2:]
    if len(kernel) not in (1, 2):
        return f"{len(kernel)}d convolution"
    if call.pad:
        return f"{'uneven' if call.pad_mode == 'constant' else call.pad_mode} padding"
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
                reasons[node] = (
                    reasons[node] or f"shares its input with {_plan(dense[0]).name}, which is"
                )


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
