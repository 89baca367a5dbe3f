"""Which nodes' results lie in memory as their operands do. Reads nodes; changes nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.tracing.augmented import PLAIN
from swatfx.compiled import Elementwise, Multiply, saves

# Leaves of ours whose results lie in memory as their operands do, and those of one element.
ELEMENTWISE = (saves.Relu, saves.DropoutOf, saves.Dropout, Elementwise)
KEEPING = (
    *ELEMENTWISE,
    saves.MaxPool2d,
    saves.AvgPool2d,
    saves.Norm,
    saves.NormOf,
    Multiply,
)
_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    nn.Identity,
)
_FUNCTIONS = (
    torch.relu,
    torch.add,
    torch.mul,
    torch.sigmoid,
    torch.tanh,
    operator.add,
    operator.iadd,
    operator.mul,
    operator.imul,
    *(assign for assign, plain in PLAIN.items() if plain in (operator.add, operator.mul)),
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.gelu,
    F.silu,
    F.hardswish,
    F.hardsigmoid,
    F.sigmoid,
)
_NAMED = ("torchvision.ops.stochastic_depth.stochastic_depth",)  # functions not to import for it
_METHODS = ("add", "add_", "mul", "mul_", "relu", "relu_", "sigmoid", "tanh", "clone")


def passing_on(
    part: fx.GraphModule, node: fx.Node, savers: tuple[type[torch.nn.Module], ...]
) -> list[fx.Node]:
    """The inputs whose memory order `node` passes on, if of our leaves these `savers` do."""
    found: tuple[Any, ...]
    if node.op == "call_module":
        module = part.get_submodule(str(node.target))
        if not isinstance(module, savers) and type(module) not in _MODULES:
            return []
        operands = 2 if isinstance(module, Multiply) else 1
        found = (*node.args[:operands], node.kwargs.get("input"), node.kwargs.get("residual"))
    elif node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS) or _named(node):
        found = (*node.args[:2], node.kwargs.get("input"), node.kwargs.get("other"))
    else:
        return []
    return [n for n in found if isinstance(n, fx.Node) and n.op != "get_attr"]


def _named(node: fx.Node) -> bool:
    target = node.target
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    return node.op == "call_function" and name in _NAMED
