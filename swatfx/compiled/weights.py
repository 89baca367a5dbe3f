"""Weights that are computed from parameters: which nodes do so, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn


@contextmanager
def evaluation_mode(*roots: nn.Module) -> Iterator[None]:
    """All below `roots` in evaluation: in training, spectral norm moves on at each use."""
    modules = [m for root in roots for m in root.modules()]
    modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    flags = [m.training for m in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def weight_chain(node: fx.Node) -> dict[fx.Node, bool] | None:
    """The nodes that compute `node` from parameters alone, in graph order; None if inputs do.

    True marks a cast whose target an input decides (`weight.to(x.dtype)`): it changes no value that
    matters here, and stands for what it casts.
    """
    ancestors: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in ancestors:
            ancestors.add(n)
            todo += n.all_input_nodes
    status: dict[fx.Node, bool] = {}
    for n in node.graph.nodes:
        if n not in ancestors or n.op in ("placeholder", "output"):
            continue
        if all(m in status for m in n.all_input_nodes):
            status[n] = False
        elif n.op == "call_method" and n.target in ("to", "type_as") and n.args[0] in status:
            status[n] = True
    if node not in status:
        return None
    needed: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in needed:
            needed.add(n)
            todo += n.all_input_nodes[:1] if status[n] else n.all_input_nodes
    return {n: is_cast for n, is_cast in status.items() if n in needed}


def evaluate(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The value, as in evaluation, of a node that depends on parameters alone, or None."""
    if node.op == "get_attr":
        value: Any = gm
        for atom in str(node.target).split("."):
            value = getattr(value, atom)
        return value if isinstance(value, torch.Tensor) else None
    chain = weight_chain(node)
    if chain is None:
        return None
    run = fx.Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad(), evaluation_mode(gm, getattr(gm, "swat_owner", gm)):
        for n, is_cast in chain.items():
            run.env[n] = run.env[n.all_input_nodes[0]] if is_cast else run.run_node(n)
    result = run.env[node]
    return result if isinstance(result, torch.Tensor) else None
