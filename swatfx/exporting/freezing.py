"""A compiled model for inference on this machine: sparse kernels, and nothing but layers."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from swatfx.compiled import (
    CONV,
    LINEAR,
    LayerNode,
    NormOf,
    SwatModule,
    all_parts,
    evaluate,
    join,
    sparse_nodes,
    unwrap,
)
from swatfx.compiled.saves import Saves, Then, is_changed
from swatfx.errors import InputError
from swatfx.exporting.plain import drop_state, make_plain, masked_weight, replace_layer
from swatfx.ops.layout import laid_out
from swatfx.tensors.keeping import let_keep
from swatfx.training import refresh

ALL_ACTIVE = "_all_active"  # names of states by which every weight but zeros is
_STAY = ("clock", "eager_root", "saves")  # below `swat`
_FUNCTIONS = (CONV, F.conv2d, F.conv3d)


class Frozen(nn.Module):
    """What `freeze` makes: called as the model is, without gradients.

    Attributes:
        graph_module: the graph that runs.
    """

    def __init__(self, graph_module: SwatModule) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model computes in evaluation."""
        with torch.no_grad():
            return self.graph_module(*args, **kwargs)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation.

        Raises:
            InputError: `mode` is true.
        """
        if mode:
            raise InputError(
                "a frozen model does not train", remedy="train the model that it was made of"
            )
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _let_keep(self.graph_module)
        return self


def freeze(gm: nn.Module) -> Frozen:
    """A copy of `gm` for inference: what `gm.eval()` computes after `swatfx.refresh(gm)`.

    Layers that run sparse kernels have their Top-K weights as the kernels read them, made at the
    first call for a size of input; no threshold and no pack is left, and batch norms behind
    convolutions of images are folded into these, so that results are the same but for rounding.
    All other layers are dense, on exact Top-K weights. `gm` is not changed, and goes its own way
    from here. To serve in bfloat16, freeze `gm.bfloat16()`, or call within autocast.

    Args:
        gm: a compiled model.

    Returns:
        A module that is called as `gm` is. Its weights are buffers: nobody should write into them.

    Raises:
        InputError: `gm` is on the meta device, and has no weights.
    """
    root = unwrap(gm)
    if any(t.is_meta for t in (*root.parameters(), *root.buffers())):
        raise InputError("the model has no weights yet", remedy="load them, then freeze it")
    twin = copy.deepcopy(root)
    refresh(twin)
    twin.eval()
    for layer in list(sparse_nodes(twin)):
        if layer.plan.kernels == "sparse":
            _make_frozen(twin, layer)
        else:
            make_plain(twin, layer)
    uses = _uses(twin)
    for prefix, part in all_parts(twin):
        part.__dict__["watch"] = None  # its layers are others from here on
        for node in list(part.graph.nodes):
            if node.op == "call_module":
                _fold(part, prefix, node, uses)
    called = {str(n.target) for _, part in all_parts(twin) for n in part.graph.nodes}
    for name, leaf in twin.swat.named_modules():
        for child in [c for c in leaf._modules if isinstance(leaf, Saves)]:
            if f"swat.{name}.{child}" not in called:
                del leaf._modules[child]
    drop_state(twin, _STAY)
    _let_keep(twin)
    return Frozen(twin)


def _make_frozen(gm: SwatModule, layer: LayerNode) -> None:
    """Let a sparse op read its exact Top-K weight, whose zeros alone are not active."""
    sparse, state = masked_weight(gm, layer), layer.plan.state + ALL_ACTIVE
    if state not in layer.part._buffers:
        weight = layer.part.get_buffer(str(sparse.target))
        layer.part.register_buffer(state, weight.new_zeros(()), persistent=False)
    with layer.part.graph.inserting_before(layer.node):
        least = layer.part.graph.get_attr(state)
    call = layer.record.call
    assert call is not None
    steps = (call.stride, call.padding, call.dilation, call.groups) if layer.is_conv else ()
    options = {k: v for k, v in layer.node.kwargs.items() if k in ("layout", "sparse_kernels")}
    args = (layer.input, sparse, layer.node.args[2], least, None, *steps)
    replace_layer(layer, CONV if layer.is_conv else LINEAR, args, **options)


def _let_keep(gm: SwatModule) -> None:
    """Let kernels keep what they make of weights, which nobody writes from here on."""
    for _, part in all_parts(gm):
        for name, buffer in part._buffers.items():
            if name.endswith(ALL_ACTIVE) and buffer is not None:
                let_keep(buffer)


def _uses(gm: SwatModule) -> Counter[str]:
    """How often graphs call a module, or read a parameter of it."""
    found: Counter[str] = Counter()
    for prefix, part in all_parts(gm):
        for node in part.graph.nodes:
            if node.op == "call_module":
                found[join(prefix, str(node.target))] += 1
            elif node.op == "get_attr":
                found[join(prefix, str(node.target)).rpartition(".")[0]] += 1
    return found


def finish(y: Tensor, **follows: Any) -> Tensor:
    """What followed a batch norm that was folded into what made `y`: see `Then`."""
    return Then(**follows).finish(y)


def _fold(part: SwatModule, prefix: str, node: fx.Node, uses: Counter[str]) -> None:
    """Fold a batch norm of images into the convolution before it, if nobody else sees between."""
    leaf = part.get_submodule(str(node.target))
    if not isinstance(leaf, NormOf) or not node.args:
        return
    last = made = node.args[0]
    if isinstance(made, fx.Node) and made.target is laid_out and len(made.users) == 1:
        made = made.args[0]
    if not isinstance(last, fx.Node) or not isinstance(made, fx.Node) or len(made.users) != 1:
        return
    norm = leaf.module
    if is_changed(norm, (nn.BatchNorm2d, nn.BatchNorm3d)) or norm.running_var is None:
        return
    if made.target in _FUNCTIONS:
        _fold_into_call(part, made, norm, node.name)
    elif made.op == "call_module" and uses[join(prefix, str(made.target))] == 1:
        conv: Any = part.get_submodule(str(made.target))
        if is_changed(conv, (nn.Conv2d, nn.Conv3d)):
            return
        weight, bias = _folded(conv.weight, conv.bias, norm)
        conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    else:
        return
    follows = {k: v for k, v in node.kwargs.items() if k in Then._fields}
    with part.graph.inserting_before(node):
        new = part.graph.call_function(finish, (last,), follows) if follows else last
    node.replace_all_uses_with(new)
    part.graph.erase_node(node)
    if follows:
        new.name = node.name


def _fold_into_call(part: SwatModule, made: fx.Node, norm: nn.Module, name: str) -> None:
    """Into a convolution by a weight that is a buffer of the part."""
    source, bias = made.args[1], made.args[2]
    assert isinstance(source, fx.Node)
    given = evaluate(part, bias) if isinstance(bias, fx.Node) else None
    both = _folded(part.get_buffer(str(source.target)), given, norm)
    nodes = []
    for kind, value in zip(("weight", "bias"), both, strict=True):
        attribute = f"{name}_folded_{kind}"
        part.register_buffer(attribute, value)
        with part.graph.inserting_before(made):
            nodes.append(part.graph.get_attr(attribute))
    made.args = (made.args[0], *nodes, *made.args[3:])
    if not source.users:
        part.graph.erase_node(source)


def _folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that normalises, too; computed in double precision."""
    given = (weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    w, b, mean, var, *affine = [None if t is None else t.detach().double() for t in given]
    found = fuse_conv_bn_weights(w, b, mean, var, norm.eps, *affine)  # type: ignore[arg-type]
    return found[0].detach().to(weight.dtype), found[1].detach().to(weight.dtype)
