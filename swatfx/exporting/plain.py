"""A compiled model as plain PyTorch: what others can run, on exact Top-K weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from swatfx.compiled import (
    NORM,
    Attention,
    AvgPool2d,
    Bound,
    Dropout,
    Elementwise,
    LayerNode,
    LayerNorm,
    MaxPool2d,
    Multiply,
    Norm,
    Place,
    Relu,
    Saver,
    SwatModule,
    WeightThreshold,
    all_nodes,
    all_parts,
    join,
    private_copy,
    relative,
    sparse_nodes,
)
from swatfx.ops.coded import RULES
from swatfx.ops.layout import between_linear, laid_out
from swatfx.ops.where import active_weight
from swatfx.training import refresh

_CONV = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
_PLAIN: dict[type[Saver], Callable[..., Any]] = {
    Norm: F.batch_norm,
    Relu: F.relu,
    MaxPool2d: F.max_pool2d,
    AvgPool2d: F.avg_pool2d,
    Dropout: F.dropout,
    LayerNorm: F.layer_norm,
    Multiply: operator.mul,
}


def inference_module(gm: SwatModule, kernels: bool = False) -> SwatModule:
    """A copy in evaluation mode whose layers are plain convs and linears on exact Top-K weights.

    With `kernels`, layers with sparse weights stay our ops, on exact Top-K weights, with the memory
    orders that our kernels want.
    """
    twin = private_copy(gm)
    refresh(twin)
    sparse: dict[str, str] = {}  # attribute that holds a masked weight -> path of the dense one
    for node in sparse_nodes(twin):
        sparse |= _make_plain(twin, node, kernels)
    for prefix, part in all_parts(twin):
        part.__dict__["watch"] = None  # its layers are others from here on
        for node in list(part.graph.nodes):
            if kernels and node.target in (laid_out, between_linear):
                continue
            if node.target is laid_out:  # memory orders are for our own kernels
                node.replace_all_uses_with(node.args[0])
                part.graph.erase_node(node)
            elif node.target is between_linear:
                part.graph.erase_node(node)
            elif node.op == "call_module":
                module = part.get_submodule(str(node.target))
                if isinstance(module, Saver) and not kernels:
                    _make_saver_plain(module, prefix, node)
        for node in reversed(part.graph.nodes):
            ours = node.op in ("call_module", "get_attr") and str(node.target).startswith("swat.")
            if ours and not node.users and node.target != "swat.eager_root":
                part.graph.erase_node(node)
        part.recompile()
    for name in list(twin.swat._modules):
        if name != "eager_root" and not (kernels and name == "saves"):
            delattr(twin.swat, name)
    # Leaves that stay read parameters of modules that no graph calls.
    _drop_unread(twin, set(sparse.values()) if kernels else None)
    _take_places(twin, sparse)
    twin.eval()
    return twin


def _take_places(gm: SwatModule, sparse: Mapping[str, str]) -> None:
    """Masked weights bear the names of the dense ones, wherever nothing else reads those."""
    claims: dict[str, list[Place]] = {}
    for place in all_nodes(gm):
        if place.node.op == "get_attr" and place.node.target in sparse:
            claims.setdefault(sparse[str(place.node.target)], []).append(place)
    for path, places in claims.items():
        owner, _, name = path.rpartition(".")
        masked = [place.part._buffers[str(place.node.target)] for place in places]
        first = masked[0]
        if gm.get_submodule(owner)._parameters.get(name, first) is not None or first is None:
            continue
        if all(other is not None and torch.equal(first, other) for other in masked[1:]):
            weight = nn.Parameter(first, requires_grad=False)
            gm.get_submodule(owner)._parameters[name] = weight
            for place in places:
                place.part._buffers.pop(str(place.node.target), None)
                place.node.target = relative(place.prefix, path)
                place.part.recompile()


def _drop_unread(gm: SwatModule, among: set[str] | None) -> None:
    """Remove the dense weights that no graph reads any more, where no eager code could either."""
    read: set[str] = set()
    for place in all_nodes(gm):
        if place.node.op in ("get_attr", "call_module"):
            read.add(place.path)
    for name, module in gm.named_modules():
        above = [name[:i] for i, c in enumerate(name) if c == "."] + [name]
        if name and "" not in gm.eager and not any(p in read or p in gm.eager for p in above):
            for key in list(module._parameters):
                path = f"{name}.{key}"
                if path not in read and (among is None or path in among):
                    module._parameters[key] = None


def _make_plain(gm: SwatModule, layer: LayerNode, kernels: bool) -> dict[str, str]:
    """Replace a sparse op by the plain one on its masked weight; tells where that lies, and the
    path of the dense one, if it is no computed one.
    """
    part, node, plan, call = layer.part, layer.node, layer.plan, layer.record.call
    weight = layer.weight_now()
    assert call is not None and weight is not None
    source, weight_node, bias = layer.input, layer.weight, node.args[2]
    masked, used = weight.detach(), None
    if plan.rule.forward_weight:
        threshold = gm.swat.get_submodule(f"{plan.state}.weight_threshold")
        assert isinstance(threshold, WeightThreshold)
        used = threshold.threshold.detach()
        masked = active_weight(masked, used, plan.weight_selector, masked.dtype)
    with part.graph.inserting_before(node):
        attribute = f"{plan.state}_sparse_weight"
        if attribute not in part._buffers:
            part.register_buffer(attribute, masked)
        sparse = part.graph.get_attr(attribute)
        args: tuple[Any, ...] = (source, sparse, bias)
        if kernels and used is not None:
            part.register_buffer(f"{plan.state}_threshold", used.clone())
            state = part.graph.get_attr(f"{plan.state}_threshold")
            told: dict[str, Any] = {
                k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)
            }
            args = (*args, state, None, *node.args[5:])
            plain = part.graph.create_node("call_function", node.target, args, told)
        elif plan.kind != "linear":
            args = (*args, call.stride, call.padding, call.dilation, call.groups)
            plain = part.graph.call_function(_CONV[plan.kind], args)
        else:
            plain = part.graph.call_function(F.linear, args)
    node.replace_all_uses_with(plain)
    part.graph.erase_node(node)
    for user in list(weight_node.users):
        # Thresholds and packs that asked whether the weight trains.
        user.args = tuple(a for a in user.args if a is not weight_node or user.op != "call_module")
    if not weight_node.users:
        part.graph.erase_node(weight_node)
    is_read = weight_node.op == "get_attr"
    return {attribute: join(layer.prefix, str(weight_node.target))} if is_read else {}


def _make_saver_plain(module: Saver, prefix: str, node: fx.Node) -> None:
    """Replace a leaf that keeps less for backward by what it stands for."""
    graph = node.graph
    options = dict(node.kwargs)
    residual, relu = options.pop("residual", None), options.pop("relu", False)
    into, _ = options.pop("into", None), options.pop("inplace", False)
    with graph.inserting_before(node):
        if isinstance(module, Bound):
            path = relative(prefix, module.path)
            plain = graph.call_module(path, node.args)
        elif isinstance(module, Attention):
            plain = graph.call_function(module.plain, node.args)
        elif isinstance(module, Elementwise):
            rule = RULES[module.rule]
            plain = graph.call_function(rule.functions[0], node.args, dict(rule.options))
        else:
            plain = graph.call_function(_PLAIN[type(module)], node.args, options)
        if residual is not None and into is not None:
            operands = (plain, residual) if into == NORM else (residual, plain)
            plain = graph.call_method("add_", operands)
        elif residual is not None:
            plain = graph.call_function(operator.add, (plain, residual))
        if relu:
            plain = graph.call_function(F.relu, (plain,))
    node.replace_all_uses_with(plain)
    graph.erase_node(node)
