"""What a node does to memory: what it writes into, what its result may share, who keeps it.

Reads nodes and modules; changes nothing. Where something is not known, it may do all: a module that
was left to Python, and a function of somebody else's, write into what they get, return it and keep
it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.tracing.augmented import PLAIN
from passes.tracing.module_kinds import LAYERS, opaque_reason
from swatfx.compiled import (
    RESIDUAL,
    AvgPool2d,
    Clock,
    Elementwise,
    LayerNorm,
    LayerNormOf,
    MaxPool2d,
    Multiply,
    Norm,
    NormOf,
    Pack,
    PartClock,
    Saver,
    Threshold,
    evaluate,
)
from swatfx.ops.layout import laid_out

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
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.ELU,
    MaxPool2d,
    AvgPool2d,
    Elementwise,
    LayerNorm,
    LayerNormOf,
)
_FRESH_FUNCTIONS: set[Any] = {
    operator.sub,
    operator.truediv,
    operator.matmul,
    operator.neg,
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
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.silu,
    F.hardswish,
    F.elu,
    F.hardtanh,
}
_FRESH_METHODS = {
    "add", "sub", "mul", "div", "matmul", "bmm", "relu", "sigmoid", "tanh", "softmax", "mean",
    "sum", "clone", "size", "dim", "numel",
}  # fmt: skip
# Augmented assignment, as it was traced or as somebody called it -> the plain operator.
_ASSIGNING: dict[Any, Any] = PLAIN | {
    getattr(operator, f"i{plain.__name__.rstrip('_')}"): plain for plain in PLAIN.values()
}
_ASSIGNING_METHODS = {f"__i{plain.__name__.rstrip('_')}__" for plain in PLAIN.values()}
# Operators that join sequences or mappings, and what else than a tensor tells that they do not.
_JOINING: dict[Any, tuple[type, ...]] = {
    operator.add: (int, float, complex),
    operator.mul: (float, complex),
    operator.or_: (int,),
    operator.xor: (int,),
}
# Modules of torch that give, or hand through, something else than one tensor.
_SEVERAL = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Identity,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
# Methods of containers that bear the name of one of a tensor.
_OF_CONTAINERS = {"copy", "index", "values", "count", "split"}
_LIBRARIES = ("torch", "torchvision", "_operator", "builtins", "math", "swatfx", "passes")


@dataclass(frozen=True)
class Effect:
    """Of one node.

    Attributes:
        writes: nodes whose memory it writes into.
        shares: nodes that its result may be, or be a view of.
        keeps: whether somebody whom no graph shows holds what goes in and what comes out.
        opaque: whether it is Python that may do anything.
        writes_own: whether it writes into parameters or buffers that the graph reads elsewhere.
    """

    writes: tuple[fx.Node, ...] = ()
    shares: tuple[fx.Node, ...] = ()
    keeps: bool = False
    opaque: bool = False
    writes_own: bool = False


def _is_known(home: str) -> bool:
    return home.partition(".")[0] in _LIBRARIES


class Effects:
    """Effects of the nodes of one graph, asked for in the order of the graph."""

    def __init__(self, gm: fx.GraphModule, eager: dict[str, str]) -> None:
        self.foreign: set[fx.Node] = set()  # somebody else's Python, which may do anything
        self._gm = gm
        self._eager = eager
        self._modules: dict[str, nn.Module] = {}
        self._tensors: set[fx.Node] = set()  # those that are one tensor for sure
        read = (evaluate(gm, n) for n in gm.graph.nodes if n.op == "get_attr")
        self._read = {storage_of(t) for t in read if t is not None}

    def of(self, node: fx.Node) -> Effect:
        """What the next node does."""
        if node.op == "output":
            return Effect()
        if node.op in ("placeholder", "get_attr"):
            effect = Effect(keeps=True)
        elif self._is_foreign(node):
            self.foreign.add(node)
            if isinstance(node.target, type) and all(n.op == "output" for n in node.users):
                return Effect()  # a container of results: the caller has those anyway
            inputs = tuple(node.all_input_nodes)
            return Effect(inputs, inputs, keeps=True, opaque=True)
        else:
            effect = {
                "call_method": self._of_method,
                "call_module": self._of_module,
                "call_function": self._of_function,
            }[node.op](node)
        if self._is_tensor(node):
            self._tensors.add(node)
        return effect

    def _module(self, node: fx.Node) -> nn.Module:
        path = str(node.target)
        if path not in self._modules:
            self._modules[path] = self._gm.get_submodule(path)
        return self._modules[path]

    def _is_foreign(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._module(node)
            known = _is_known(type(module).__module__) and opaque_reason(module) is None
            return str(node.target) in self._eager or not known
        if node.op == "call_function":
            return not _is_known(getattr(node.target, "__module__", None) or "torch")
        return False

    def _of_method(self, node: fx.Node) -> Effect:
        name = str(node.target)
        if name in ("set_", "__setitem__"):
            return _in_place(node, node.args)
        if (name.endswith("_") and not name.endswith("__")) or name in _ASSIGNING_METHODS:
            return _in_place(node)
        return _fresh_if(name in _FRESH_METHODS, node)

    def _of_module(self, node: fx.Node) -> Effect:
        module = self._module(node)
        if isinstance(module, (Clock, PartClock, Threshold, Pack)):
            return Effect()
        if isinstance(module, (Norm, NormOf)):
            into = node.kwargs.get("into") == RESIDUAL
            residual = _nodes_in(node.kwargs.get("residual")) if into else ()
            state = _nodes_in(node.args[1:])
            own = isinstance(module, NormOf) and self._writes_own(module.module)
            return Effect((*residual, *state), residual, writes_own=own)
        if getattr(module, "inplace", False) or node.kwargs.get("inplace"):
            return _in_place(node)
        fresh = isinstance(module, _FRESH_MODULES)
        if isinstance(module, Multiply):  # of a tensor; else a sequence is repeated
            fresh = any(n in self._tensors for n in node.all_input_nodes)
        effect = _fresh_if(fresh, node)
        return replace(effect, writes_own=self._writes_own(module))

    def _writes_own(self, module: nn.Module) -> bool:
        """Whether it writes into tensors of its own (statistics) that the graph reads."""
        own = list(module.buffers())
        if getattr(module, "max_norm", None) is not None:  # an embedding's weight
            own += module.parameters()
        return any(storage_of(t) in self._read for t in own)

    def _of_function(self, node: fx.Node) -> Effect:
        target: Any = node.target
        if target is getattr and node.args[1] == "training":
            return Effect()  # a module's mode
        if target is operator.setitem:
            return _in_place(node, None if node.args[0] in self._tensors else node.args)
        if target in _ASSIGNING:
            return _in_place(node, node.args if self._may_join(node, _ASSIGNING[target]) else None)
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return _of_op(node)
        out = _nodes_in(node.kwargs.get("out"))
        if out:
            return Effect(out, out)
        name = getattr(target, "__name__", "")
        if _has_flag(node) or (name.endswith("_") and not name.startswith("__")):
            return _in_place(node)
        if name in ("batch_norm", "instance_norm", "embedding"):
            rest = (*node.args[1:], *(v for k, v in node.kwargs.items() if k != "input"))
            return replace(_fresh_if(target in _FRESH_FUNCTIONS, node), writes=_nodes_in(rest))
        if target in _JOINING:
            return _fresh_if(not self._may_join(node, target), node)
        return _fresh_if(target in _FRESH_FUNCTIONS, node)

    def _may_join(self, node: fx.Node, plain: Any) -> bool:
        """Whether an operator may have sequences before it: their elements are in the result."""
        if plain not in _JOINING:
            return False
        nodes = [a for a in node.args if isinstance(a, fx.Node)]
        known = any(n in self._tensors for n in nodes)
        return not known and not any(isinstance(a, _JOINING[plain]) for a in node.args)

    def _is_tensor(self, node: fx.Node) -> bool:
        """Whether the result is one tensor for sure, and no sequence of them."""
        known = any(a in self._tensors for a in node.args if isinstance(a, fx.Node))
        if node.op == "get_attr":
            return evaluate(self._gm, node) is not None
        if node.op == "call_module":
            module = self._module(node)
            torchs = type(module).__module__.startswith("torch.nn.modules.")
            hands_on = isinstance(module, nn.Identity) and known
            return hands_on or (
                isinstance(module, Saver) or (torchs and not isinstance(module, _SEVERAL))
            )
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_method":
            return name not in _OF_CONTAINERS and _gives_one(name)
        if node.op != "call_function":
            return False
        target: Any = node.target
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return _is_single(target)
        if target is operator.getitem:
            source = node.args[0]
            ours = getattr(getattr(source, "target", None), "namespace", "") == "swatfx"
            return known or ours
        if target in _ASSIGNING or target in _JOINING:
            return known
        home = getattr(target, "__module__", None) or "torch"
        if home == "_operator":
            return known and target in _FRESH_FUNCTIONS
        one = target in _FRESH_FUNCTIONS and target is not F.max_pool2d
        return one or target is laid_out or (home.startswith("torch") and _gives_one(name))


def storage_of(tensor: torch.Tensor) -> int:
    """A number that tensors have in common which share memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass that has none
        return id(tensor)


def _nodes_in(argument: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return tuple(found)


def _in_place(node: fx.Node, shares: Any = None) -> Effect:
    """The first operand is written, and is the result."""
    first = _nodes_in(node.args[0]) if node.args else tuple(node.all_input_nodes)  # `input=x`
    return Effect(first, first if shares is None else _nodes_in(shares))


def _fresh_if(fresh: bool, node: fx.Node) -> Effect:
    return Effect() if fresh else Effect(shares=tuple(node.all_input_nodes))


def _of_op(node: fx.Node) -> Effect:
    """An op tells itself what it writes; none but torch's own may return what it was given."""
    target: Any = node.target
    overloads = _overloads(target)
    names = [a.name for a in overloads[0]._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    writes = {
        a.name
        for overload in overloads
        for a in overload._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    }
    if "batch_norm" in overloads[0].name():  # which does not tell
        writes |= {name for name in names if name.startswith("running")}
    aliases = any(r.alias_info is not None for o in overloads for r in o._schema.returns)
    own = overloads[0].namespace != "aten"
    shares = () if own and not aliases else tuple(node.all_input_nodes)
    return Effect(_nodes_in([given[name] for name in writes if name in given]), shares)


def _overloads(op: Any) -> list[torch._ops.OpOverload]:
    if isinstance(op, torch._ops.OpOverload):
        return [op]
    return [getattr(op, name) for name in op.overloads()]


def _is_single(op: Any) -> bool:
    """Whether an op gives one tensor and nothing else, in whichever form."""
    returns = [overload._schema.returns for overload in _overloads(op)]
    return all(len(r) == 1 and str(r[0].type) == "Tensor" for r in returns)


@functools.cache
def _gives_one(name: str) -> bool:
    """Whether torch's function or method of this name gives one tensor."""
    op = getattr(torch.ops.aten, name, None)
    return isinstance(op, torch._ops.OpOverloadPacket) and _is_single(op)


def _has_flag(node: fx.Node) -> bool:
    """Whether `inplace` is set, by name or by position, or may be."""
    given = node.kwargs.get("inplace", False)
    place = _place_of_flag(node.target)
    if place is not None and place < len(node.args):
        given = node.args[place]
    return isinstance(given, fx.Node) or bool(given)


@functools.cache
def _place_of_flag(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a function of C, which has no such argument
        return None
    return names.index("inplace") if "inplace" in names else None
