"""When a tensor in a graph is overwritten: which readers of it see the same values.

Reads nodes and modules; changes nothing. Nodes that may share memory are put in one class, and a
tensor's *version* at a node is the number of in-place writes to its class before that node.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.tracing.augmented import PLAIN
from passes.tracing.module_kinds import LAYERS
from swatfx.compiled import Clock, Pack, PartClock, Threshold

# Modules and functions whose result never shares memory with their inputs. All others may.
_FRESH_MODULES = (
    *LAYERS,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softmax,
)
_MAYBE_INPLACE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.ELU)
_FRESH_FUNCTIONS: set[Any] = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.matmul,
    torch.add,
    torch.sub,
    torch.mul,
    torch.cat,
    torch.matmul,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.linear,
    F.gelu,
    F.softmax,
    F.layer_norm,
    F.batch_norm,
    F.group_norm,
    F.instance_norm,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    torch.mean,
    torch.stack,
    F.avg_pool2d,
    F.max_pool2d,
    F.interpolate,
}
_MAYBE_INPLACE_FUNCTIONS = {F.relu, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.elu, F.hardtanh}
_INPLACE_OPERATORS = {
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
} | {operator.setitem}


def _shared(node: fx.Node) -> list[fx.Node]:
    """The inputs that the result of `node` may be, or be a view of."""
    plain = node.target in PLAIN and not isinstance(node.args[1], (list, tuple, dict))
    return [n for n in node.args[:1] if isinstance(n, fx.Node)] if plain else node.all_input_nodes


def _is_torchs(node: fx.Node) -> bool:
    home = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return node.op == "call_method" or (
        node.op == "call_function" and home in ("torch", "_operator", "builtins")
    )


class Versions:
    """Versions of every tensor in one graph."""

    def __init__(self, gm: fx.GraphModule, eager: dict[str, str]) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._position: dict[fx.Node, int] = {}
        self._writes: dict[fx.Node, list[int]] = {}
        self._views: set[fx.Node] = set()
        written: list[tuple[int, fx.Node]] = []
        for position, node in enumerate(gm.graph.nodes):
            self._parent[node] = node
            self._position[node] = position
            targets, fresh = self._effect(gm, node, eager)
            written += [(position, target) for target in targets]
            if not fresh:
                of_eager = node.op == "call_module" and str(node.target) in eager
                if of_eager or (not targets and _is_torchs(node)):
                    self._views.add(node)
                for source in _shared(node):
                    self._parent[self._find(source)] = self._find(node)
        for position, target in written:
            self._writes.setdefault(self._find(target), []).append(position)

    def of(self, tensor: fx.Node, reader: fx.Node) -> int:
        """Number of writes to `tensor`'s memory before `reader` runs."""
        writes = self._writes.get(self._find(tensor), [])
        return bisect_left(writes, self._position[reader])

    def aliases(self, tensor: fx.Node) -> list[fx.Node]:
        """The nodes that may share memory with `tensor`, itself among them."""
        return [n for n in self._parent if self._find(n) is self._find(tensor)]

    def may_be_view(self, tensor: fx.Node) -> bool:
        """Whether it may be a part of another: PyTorch made one of it, or eager code had it."""
        return tensor in self._views

    def is_before(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether `one` runs before `other`."""
        return self._position[one] < self._position[other]

    def _find(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _effect(
        self, gm: fx.GraphModule, node: fx.Node, eager: dict[str, str]
    ) -> tuple[list[fx.Node], bool]:
        """(nodes whose memory is written, whether the result is new memory)."""
        first = [a for a in node.args[:1] if isinstance(a, fx.Node)]
        if not node.args:  # `input=x`, or by another name
            first = list(node.all_input_nodes)
        if node.op in ("placeholder", "get_attr", "output"):
            return [], True
        if node.op == "call_method":
            name = str(node.target)
            inplace = name.endswith("_") and not name.endswith("__")
            return (first if inplace else []), False
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if str(node.target) in eager:
                return list(node.all_input_nodes), False  # whatever its Python may do
            if isinstance(module, (Clock, PartClock, Threshold, Pack)):
                return [], True
            if getattr(module, "inplace", False) is True:
                return first, False
            return [], isinstance(module, (*_FRESH_MODULES, *_MAYBE_INPLACE))
        inplace = node.kwargs.get("inplace") is True or node.target in _INPLACE_OPERATORS
        if node.target in _MAYBE_INPLACE_FUNCTIONS:
            inplace = inplace or True in node.args[1:]
            return (first if inplace else []), not inplace
        if node.target is getattr and node.args[1] == "training":
            return [], True  # a module's mode
        name = getattr(node.target, "__name__", "")
        if inplace or (name.endswith("_") and not name.startswith("_")):
            return first, False
        if getattr(node.target, "namespace", "") == "swatfx":
            return [], True  # an op may not return what it was given
        out = node.kwargs.get("out")
        if isinstance(out, fx.Node):
            return [out], False
        return [], node.target in _FRESH_FUNCTIONS
