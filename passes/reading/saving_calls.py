"""Which nodes are norms, ReLUs, sums, pools, dropouts, what `RULES` name, and their arguments.

Used by `compress_saves`. Reads nodes and modules; changes nothing. What has hooks, was parametrized
or subclassed, or has arguments that are known at run time only, is not recognised.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.tracing.augmented import PLAIN
from passes.tracing.composites.attention import attention_core, attention_heads
from passes.tracing.composites.window import window_attend, window_heads
from passes.tracing.module_kinds import opaque_reason
from swatfx.compiled import Heads, saves, scaled_dot_product_heads
from swatfx.ops.coded import LAYER_NORM, MULTIPLY, RULES

_RELU = {F.relu: False, torch.relu: False, F.relu_: True, torch.relu_: True}
_RELU_METHODS = {"relu": False, "relu_": True}
_NORM = {
    "input": None,
    "running_mean": None,
    "running_var": None,
    "weight": None,
    "bias": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}
_LAYER_NORM = {
    "input": None,
    "normalized_shape": None,
    "weight": None,
    "bias": None,
    "eps": 1e-5,
}
_DROPOUT = {"input": None, "p": 0.5, "training": True, "inplace": False}
_MAX_POOL = {
    "input": None,
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}
_AVG_POOL = {
    "input": None,
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}
_POOLS: dict[Any, tuple[str, dict[str, Any]]] = {
    nn.MaxPool2d: ("max_pool2d", _MAX_POOL),
    nn.AvgPool2d: ("avg_pool2d", _AVG_POOL),
    F.max_pool2d: ("max_pool2d", _MAX_POOL),
    torch.max_pool2d: ("max_pool2d", _MAX_POOL),
    F.avg_pool2d: ("avg_pool2d", _AVG_POOL),
}

# Forms of attention, and what each is as one op.
ATTENTION: dict[Any, Callable[..., Heads | None]] = {
    attention_core: attention_heads,
    window_attend: window_heads,
    F.scaled_dot_product_attention: scaled_dot_product_heads,
}


class Calls:
    """Recognises the nodes of one graph; `eager` are the paths that tracing left to Python."""

    def __init__(self, part: fx.GraphModule, eager: dict[str, str]) -> None:
        self.part = part
        self.eager = eager

    def module(self, node: fx.Node, *kinds: type[nn.Module]) -> Any:
        """The module that `node` calls with one tensor, if it is one of `kinds`, unadorned."""
        if node.op != "call_module" or str(node.target) in self.eager:
            return None
        module = self.part.get_submodule(str(node.target))
        one = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        return module if one and type(module) in kinds and not opaque_reason(module) else None

    def relu(self, node: fx.Node) -> tuple[fx.Node, bool] | None:
        """(input, whether in place) of a ReLU."""
        module = self.module(node, nn.ReLU)
        if module is not None:
            return node.all_input_nodes[0], bool(module.inplace)
        if node.op == "call_method" and node.target in _RELU_METHODS:
            return node.all_input_nodes[0], _RELU_METHODS[str(node.target)]
        if node.op == "call_function" and node.target in _RELU:
            args = _bind(node, {"input": None, "inplace": _RELU[node.target]})
            if args is not None and isinstance(args["inplace"], bool):
                return args["input"], args["inplace"]
        return None

    def norm(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Arguments of a batch norm: its input, and for a function all others, in order."""
        if self.module(node, *saves.NORMS) is not None:
            return node.args
        if node.op == "call_function" and node.target is F.batch_norm:
            args = _bind(node, _NORM)
            return None if args is None else tuple(args.values())
        return None

    def total(self, node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
        """(operand, operand, whether the first is written) of a sum of two unscaled nodes."""
        named = {"input": None, "other": None, "alpha": 1, "out": None}
        args = _bind(node, named)
        if args is None or not isinstance(args["other"], fx.Node):
            return None
        if args["alpha"] != 1 or args["out"] is not None:
            return None
        ours: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)
        if node.op == "call_method":
            ours = ("add", "add_")
        assigns = node.target in PLAIN and PLAIN[node.target] is operator.add
        if node.op not in ("call_method", "call_function") or not (assigns or node.target in ours):
            return None
        return args["input"], args["other"], assigns or node.target in (operator.iadd, "add_")

    def pool(self, node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
        """(leaf, its arguments after the input) of a 2d pooling without indices."""
        kind = node.target
        if node.op == "call_module":
            module = self.module(node, nn.MaxPool2d, nn.AvgPool2d)
            if module is None:
                return None
            kind = type(module)
        if not isinstance(kind, type) and node.op != "call_function" or kind not in _POOLS:
            return None
        name, named = _POOLS[kind]
        if node.op == "call_module":
            values = {k: getattr(module, k) for k in named if k != "input"}
        else:
            args = _bind(node, named)
            if args is None:
                return None
            values = {k: v for k, v in args.items() if k != "input"}
        if values["stride"] is None or values["stride"] in ((), []):  # 0 is torch's to refuse
            values["stride"] = values["kernel_size"]
        if values.pop("return_indices", False) is not False:
            return None
        for key in ("kernel_size", "stride", "padding", "dilation"):
            if key in values:
                values[key] = _pair(values[key])
        known = not any(isinstance(v, fx.Node) or v is NotImplemented for v in values.values())
        return (name, tuple(values.values())) if known else None

    def dropout(self, node: fx.Node) -> tuple[tuple[Any, ...], bool] | None:
        """((input[, p, training]), whether in place) of a dropout, module or function."""
        module = self.module(node, nn.Dropout)
        if module is not None:
            return node.args, bool(module.inplace)
        named = _DROPOUT
        if node.target is torch.dropout:
            named = {"input": None, "p": None, "train": None}
        elif node.target is not F.dropout:
            return None
        args = _bind(node, named)
        if args is None or not isinstance(args["p"], (int, float)):
            return None
        inplace = args.pop("inplace", False)
        return (tuple(args.values()), inplace) if isinstance(inplace, bool) else None

    def coded(self, node: fx.Node) -> tuple[str, tuple[Any, ...], bool] | None:
        """(rule of `swatfx.ops.coded`, arguments, whether in place) of what it has a rule for."""
        for name, rule in RULES.items():
            module = self.module(node, *rule.modules)
            known = node.op == "call_function" and node.target in rule.functions
            if module is not None and all(getattr(module, k) == v for k, v in rule.options.items()):
                return name, node.args, bool(getattr(module, "inplace", False))
            if known and name == LAYER_NORM:
                args = _bind(node, _LAYER_NORM)
                return None if args is None else (name, tuple(args.values()), False)
            if known and name == MULTIPLY:
                both = len(node.args) == 2 and not node.kwargs
                nodes = both and all(isinstance(a, fx.Node) for a in node.args)
                return (name, node.args, False) if nodes else None
            if known:
                plain = {key: "none" if key == "approximate" else None for key in rule.options}
                args = _bind(node, {"input": None, **plain, "inplace": False})
                if args is None or not isinstance(args["inplace"], bool):
                    return None
                if all(args[k] == v for k, v in rule.options.items()):
                    return name, (args["input"],), args["inplace"]
        return None


def _bind(node: fx.Node, named: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name, of a call whose first is a node; None if there are others."""
    args = named | dict(zip(named, node.args, strict=False)) | node.kwargs
    fits = len(node.args) <= len(named) and len(args) == len(named)
    return args if fits and isinstance(args["input"], fx.Node) else None


def _pair(value: Any) -> Any:
    """An int, or one or two of them, as a pair; NotImplemented if it is known at run time only."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2) or not all(type(v) is int for v in values):
        return NotImplemented
    return values if len(values) == 2 else values * 2
