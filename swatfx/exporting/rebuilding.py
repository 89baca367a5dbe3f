"""Modules of exported graphs, made anew of the tensors that the graphs read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from swatfx.exporting.channels import attribute


def rebuilt(gm: fx.GraphModule, tensors: Mapping[fx.Node, Tensor]) -> fx.GraphModule:
    """A module of the tensors that the graph reads: those of `tensors`, and the others as they are.

    Two of one name that differ get two names.
    """
    root, taken = nn.Module(), dict[str, Tensor]()
    read = [node for node in gm.graph.nodes if node.op == "get_attr"]
    for node in sorted(read, key=lambda node: node in tensors):
        value = tensors.get(node)
        if value is None:
            value = attribute(gm, node)
            assert value is not None
        base, count = str(node.target), 1
        while not torch.equal(taken.setdefault(str(node.target), value), value):
            count += 1
            node.target = f"{base}_{count}"
        place(root, str(node.target), value)
    for node in gm.graph.nodes:
        if node.op == "call_module":
            root.add_module(str(node.target), gm.get_submodule(str(node.target)))
    gm.graph._tracer_cls = None  # the exporter's own, which no pickle finds again
    return fx.GraphModule(root, gm.graph, type(gm).__name__).eval()


def place(root: nn.Module, path: str, value: Tensor) -> None:
    """Put a parameter that does not train there; modules on the way are made."""
    *above, name = path.split(".")
    for atom in above:
        if atom not in root._modules:
            root.add_module(atom, nn.Module())
        root = root.get_submodule(atom)
    if value.is_floating_point():
        root.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        root.register_buffer(name, value)


def drop_guards(gm: fx.GraphModule) -> None:
    """Let the module of a program be exported again."""
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            gm.graph.erase_node(node)
    gm.recompile()
