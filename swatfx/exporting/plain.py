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

ALL_ACTIVE = "_all_active"  # names of states by which every weight but zeros is
_ORDERS = ("layout", "sparse_kernels")  # keyword arguments of our ops that say how they run
_NEEDED = ("clock", "saves")  # below `swat`, by our ops and leaves
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


def inference_module(
    gm: SwatModule, stays: Callable[[LayerNode], bool] = lambda _: False
) -> SwatModule:
    """A copy in evaluation mode whose layers are plain convs and linears on exact Top-K weights.

    Layers of which `stays` is true remain our ops; then leaves remain, too, and so do the memory
    orders that our kernels want.
    """
    twin = private_copy(gm)
    refresh(twin)
    layers = list(sparse_nodes(twin))
    kept = [layer for layer in layers if stays(layer)]
    masked: dict[str, str] = {}  # attribute that holds a masked weight -> path of the dense one
    for layer in layers:
        masked |= _make_plain(twin, layer, ours=layer in kept)
    for prefix, part in all_parts(twin):
        part.__dict__["watch"] = None  # its layers are others from here on
        for node in [] if kept else list(part.graph.nodes):
            if node.target is laid_out:  # memory orders are for our own kernels
                node.replace_all_uses_with(node.args[0])
                part.graph.erase_node(node)
            elif node.target is between_linear:
                part.graph.erase_node(node)
            elif node.op == "call_module":
                module = part.get_submodule(str(node.target))
                if isinstance(module, Saver):
                    _make_saver_plain(module, prefix, node)
        for node in reversed(part.graph.nodes):
            ours = node.op in ("call_module", "get_attr") and str(node.target).startswith("swat.")
            if ours and not node.users and node.target != "swat.eager_root":
                part.graph.erase_node(node)
        part.recompile()
    for name in list(twin.swat._modules):
        if name != "eager_root" and not (kept and name in _NEEDED):
            delattr(twin.swat, name)
    drop_unread(twin)
    _take_places(twin, masked)
    return twin.eval()


def _take_places(gm: SwatModule, masked: Mapping[str, str]) -> None:
    """Masked weights bear the names of the dense ones, wherever nothing else reads those."""
    claims: dict[str, list[Place]] = {}
    for place in all_nodes(gm):
        if place.node.op == "get_attr" and place.node.target in masked:
            claims.setdefault(masked[str(place.node.target)], []).append(place)
    for path, places in claims.items():
        owner, _, name = path.rpartition(".")
        found = [place.part._buffers[str(place.node.target)] for place in places]
        first = found[0]
        if gm.get_submodule(owner)._parameters.get(name, first) is not None or first is None:
            continue
        if all(other is not None and torch.equal(first, other) for other in found[1:]):
            weight = nn.Parameter(first, requires_grad=False)
            gm.get_submodule(owner)._parameters[name] = weight
            for place in places:
                place.part._buffers.pop(str(place.node.target), None)
                place.node.target = relative(place.prefix, path)
                place.part.recompile()


def drop_unread(gm: SwatModule) -> None:
    """Remove the parameters that no graph reads any more, where no eager code could either."""
    read: set[str] = set()
    for place in all_nodes(gm):
        if place.node.op in ("get_attr", "call_module"):
            read.add(place.path)
        if place.node.op == "call_module":
            leaf = gm.get_submodule(place.path)
            read.update([leaf.path] if isinstance(leaf, Bound) else [])
    for name, module in gm.named_modules():
        above = [name[:i] for i, c in enumerate(name) if c == "."] + [name]
        stays = "" in gm.eager or above[0] in ("", "swat")
        if not stays and not any(p in read or p in gm.eager for p in above):
            for key in list(module._parameters):
                if f"{name}.{key}" not in read:
                    module._parameters[key] = None


def _make_plain(gm: SwatModule, layer: LayerNode, *, ours: bool) -> dict[str, str]:
    """Let a layer read its exact Top-K weight, by the plain function or by our op.

    Returns:
        Where that lies -> the path of the dense one, if it is no computed one.
    """
    part, node, plan, call = layer.part, layer.node, layer.plan, layer.record.call
    weight = layer.weight_now()
    assert call is not None and weight is not None
    masked, weight_node = weight.detach(), layer.weight
    if plan.rule.forward_weight:
        threshold = gm.swat.get_submodule(f"{plan.state}.weight_threshold")
        assert isinstance(threshold, WeightThreshold)
        masked = active_weight(masked, threshold.threshold, plan.weight_selector, masked.dtype)
    attribute, state = f"{plan.state}_sparse_weight", plan.state + ALL_ACTIVE
    if attribute not in part._buffers:
        part.register_buffer(attribute, masked)
        if ours:
            part.register_buffer(state, masked.new_zeros(()), persistent=False)
    function: Any = F.linear if plan.kind == "linear" else _CONV[plan.kind]
    options: dict[str, Any] = {}
    with part.graph.inserting_before(node):
        args: tuple[Any, ...] = (layer.input, part.graph.get_attr(attribute), node.args[2])
        if ours:
            function = node.target
            args = (*args, part.graph.get_attr(state), None)
            options = {k: v for k, v in node.kwargs.items() if k in _ORDERS}
        if plan.kind != "linear":
            args = (*args, call.stride, call.padding, call.dilation, call.groups)
        plain = part.graph.call_function(function, args, options)
    node.replace_all_uses_with(plain)
    part.graph.erase_node(node)
    plain.name = node.name
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
