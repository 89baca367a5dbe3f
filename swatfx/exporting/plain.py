"""A compiled model as plain PyTorch: what others can run, on exact Top-K weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping
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

_SPARSE_WEIGHT = "_sparse_weight"  # names of buffers
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


def inference_module(gm: SwatModule) -> SwatModule:
    """A copy in evaluation mode whose layers are plain convs and linears on exact Top-K weights."""
    twin = private_copy(gm)
    refresh(twin)
    dense = {
        node.plan.state + _SPARSE_WEIGHT: join(node.prefix, str(node.weight.target))
        for node in sparse_nodes(twin)
        if node.weight.op == "get_attr"  # and no computed one
    }
    for node in sparse_nodes(twin):
        make_plain(twin, node)
    for prefix, part in all_parts(twin):
        part.__dict__["watch"] = None  # its layers are others from here on
        for node in list(part.graph.nodes):
            if node.target is laid_out:  # memory orders are for our own kernels
                node.replace_all_uses_with(node.args[0])
                part.graph.erase_node(node)
            elif node.target is between_linear:
                part.graph.erase_node(node)
            elif node.op == "call_module":
                module = part.get_submodule(str(node.target))
                if isinstance(module, Saver):
                    _make_saver_plain(module, prefix, node)
    drop_state(twin, ("eager_root",))
    _take_places(twin, dense)
    return twin.eval()


def _take_places(gm: SwatModule, dense: Mapping[str, str]) -> None:
    """Masked weights bear the names of the dense ones, wherever nothing else reads those.

    Args:
        gm: in which no dense weight is left that nothing reads.
        dense: buffers of masked weights -> paths of the dense ones.
    """
    claims: dict[str, list[Place]] = {}
    for place in all_nodes(gm):
        if place.node.op == "get_attr" and place.node.target in dense:
            claims.setdefault(dense[str(place.node.target)], []).append(place)
    for path, places in claims.items():
        owner, _, name = path.rpartition(".")
        masked = [place.part.get_buffer(str(place.node.target)) for place in places]
        parameters = gm.get_submodule(owner)._parameters
        if parameters.get(name, masked[0]) is None and all(
            torch.equal(masked[0], other) for other in masked[1:]
        ):
            parameters[name] = nn.Parameter(masked[0], requires_grad=False)
            for place in places:
                place.part._buffers.pop(str(place.node.target), None)
                place.node.target = relative(place.prefix, path)
                place.part.recompile()


def drop_state(gm: SwatModule, keeps: Container[str]) -> None:
    """Remove what decides which weights are active, and dense weights that nothing reads any more.

    Args:
        gm: a private copy, whose layers need neither.
        keeps: children of `swat` that stay.
    """
    for _, part in all_parts(gm):
        for node in reversed(part.graph.nodes):
            ours = node.op in ("call_module", "get_attr") and str(node.target).startswith("swat.")
            if ours and not node.users and node.target != "swat.eager_root":
                part.graph.erase_node(node)
        read = {str(node.target) for node in part.graph.nodes}
        for name in [n for n in part._buffers if n.endswith(_SPARSE_WEIGHT) and n not in read]:
            del part._buffers[name]
        part.recompile()
    for name in list(gm.swat._modules):
        if name not in keeps:
            delattr(gm.swat, name)
    _drop_unread(gm)


def _drop_unread(gm: SwatModule) -> None:
    """Remove the dense weights that no graph reads any more, where no eager code could either."""
    read: set[str] = set()
    for place in all_nodes(gm):
        if place.node.op in ("get_attr", "call_module"):
            read.add(place.path)
        if place.node.op == "call_module":
            leaf = place.part.get_submodule(str(place.node.target))
            read.update([leaf.path] if isinstance(leaf, Bound) else [])
    for name, module in gm.named_modules():
        above = [name[:i] for i, c in enumerate(name) if c == "."] + [name]
        stays = "" in gm.eager or above[0] in ("", "swat")
        if not stays and not any(p in read or p in gm.eager for p in above):
            for key in list(module._parameters):
                if f"{name}.{key}" not in read:
                    module._parameters[key] = None


def make_plain(gm: SwatModule, layer: LayerNode) -> None:
    """Replace a sparse op by the plain one on its masked weight."""
    plan, call = layer.plan, layer.record.call
    assert call is not None
    sparse = masked_weight(gm, layer)
    args: tuple[Any, ...] = (layer.input, sparse, layer.node.args[2])
    function: Callable[..., Any] = F.linear
    if plan.kind != "linear":
        function = _CONV[plan.kind]
        args = (*args, call.stride, call.padding, call.dilation, call.groups)
    replace_layer(layer, function, args)


def masked_weight(gm: SwatModule, layer: LayerNode) -> fx.Node:
    """What reads a layer's exact Top-K weight, as a buffer, in front of its op."""
    part, plan, weight = layer.part, layer.plan, layer.weight_now()
    assert weight is not None
    masked = weight.detach()
    if plan.rule.forward_weight:
        threshold = gm.swat.get_submodule(f"{plan.state}.weight_threshold")
        assert isinstance(threshold, WeightThreshold)
        masked = active_weight(masked, threshold.threshold, plan.weight_selector, masked.dtype)
    attribute = plan.state + _SPARSE_WEIGHT
    if attribute not in part._buffers:
        part.register_buffer(attribute, masked)
    with part.graph.inserting_before(layer.node):
        return part.graph.get_attr(attribute)


def replace_layer(
    layer: LayerNode, function: Callable[..., Any], args: tuple[Any, ...], **options: Any
) -> None:
    """Put another call in the place of a sparse op, which no threshold and no pack feeds."""
    part, node, weight_node = layer.part, layer.node, layer.weight
    with part.graph.inserting_before(node):
        plain = part.graph.call_function(function, args, options)
    node.replace_all_uses_with(plain)
    part.graph.erase_node(node)
    plain.name = node.name
    for user in list(weight_node.users):
        # Thresholds and packs that asked whether the weight trains.
        user.args = tuple(a for a in user.args if a is not weight_node or user.op != "call_module")
    if not weight_node.users:
        part.graph.erase_node(weight_node)


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
