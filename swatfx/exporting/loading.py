"""Exported programs, read back: what is packed is unpacked once."""

from __future__ import annotations

import os

import torch
from torch import Tensor, fx

from swatfx.arguments import PATH, checked
from swatfx.errors import ExportError
from swatfx.exporting.freezing import ALL_ACTIVE
from swatfx.exporting.packing import PARTS
from swatfx.exporting.program import first_line
from swatfx.exporting.rebuilding import rebuilt
from swatfx.tensors.keeping import let_keep


@checked(path=PATH)
def load_program(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Read a `.pt2` that `export` wrote: a module for evaluation, its packed weights unpacked once.

    What a program computes from its own tensors alone is computed here, and not at every call.
    Our kernels keep what they make of weights: nobody should write into these.

    Raises:
        ExportError: the file cannot be read as a program.
    """
    try:
        gm = torch.export.load(path).module()
    except Exception as error:  # torch raises what its reader, or a damaged graph, does
        raise ExportError(
            f"cannot read the program ({type(error).__name__}: {first_line(error)[:100]})",
            value=str(path),
            remedy="pass a .pt2 that swatfx.export wrote",
        ) from error
    assert isinstance(gm, fx.GraphModule)
    gm = _folded(gm)
    for name, state in gm.state_dict(keep_vars=True).items():
        if name.endswith(ALL_ACTIVE):
            let_keep(state)
    return gm


def _folded(gm: fx.GraphModule) -> fx.GraphModule:
    """The same with packed weights unpacked, under their own names, and nothing else of them."""
    run = fx.Interpreter(gm, garbage_collect_values=False)
    known: dict[fx.Node, str] = {}  # -> the weight that it is part of, or nothing
    for node in list(gm.graph.nodes):
        inputs = node.all_input_nodes
        weight, _, part = str(node.target).rpartition(".")
        if node.op == "get_attr" and part in PARTS and weight:
            known[node] = weight
        elif node.op == "call_function" and all(n in known for n in inputs):
            known[node] = next((known[n] for n in inputs if known[n]), "")
        else:
            continue
        with torch.no_grad():
            run.env[node] = run.run_node(node)
    dense: dict[fx.Node, Tensor] = {}
    for node, weight in known.items():
        outside = [user for user in node.users if user not in known]
        if node.op == "call_function" and weight and outside:
            with gm.graph.inserting_before(node):
                held = gm.graph.create_node("get_attr", weight)
            dense[held] = run.env[node]
            node.replace_all_uses_with(held, lambda user: user not in known)
    for node in reversed(list(gm.graph.nodes)):
        if node in known and not node.users:
            gm.graph.erase_node(node)
    left = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    for held in dense:
        if any(path.startswith(f"{held.target}.") for path in left):  # a module bears the name
            held.target = f"{held.target}.unpacked"
    return rebuilt(gm, dense)
