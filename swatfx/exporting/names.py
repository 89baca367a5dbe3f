"""Names that a person finds again: of nodes, by the module that they belong to.

A convolution, linear layer or norm is called as the module that its weight lies in, what a module
calls as that module. The rest are called as the module around their input, and by what they do:
`layer1.0.add`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

from swatfx.exporting.channels import args_of, owner


@dataclass(frozen=True)
class Call:
    """One node, as far as its name depends on it.

    Attributes:
        result: what others name it by now.
        operation: what it does.
        module: path of the module that it belongs to, or nothing.
        inputs: results that it reads.
    """

    result: str
    operation: str
    module: str
    inputs: Sequence[str]


def readable(calls: Iterable[Call], others: Iterable[str] = ()) -> dict[str, str]:
    """Results -> names, all different, and none of `others`."""
    names: dict[str, str] = {}
    taken = set(others)
    for call in calls:
        name = call.module
        if not name or name in taken:
            above = next((names[i] for i in call.inputs if i in names), "")
            around = call.module or above.rpartition(".")[0]
            name = f"{around}.{call.operation}" if around else call.operation
        base, count = name, 1
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        names[call.result] = name
    return names


def rename_nodes(graph: fx.Graph, weights: Mapping[str, str], like: fx.Graph | None = None) -> None:
    """Give the calls of an exported graph such names, with underscores for dots.

    Args:
        graph: of an exported program, or of its module.
        weights: names of placeholders -> paths of what they hold.
        like: the graph that was exported, if it has such names already.
    """
    known = {node.name for node in like.nodes} if like else set()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    names = readable(_call(node, weights, known) for node in calls)
    taken = {node.name for node in graph.nodes} - names.keys()
    for node in calls:
        base = re.sub(r"\W", "_", names[node.name])
        base = f"_{base}" if base[0].isdigit() else base
        name, count = base, 1
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        node.name = name
        node.meta.pop("stack_trace", None)  # paths of the machine that it was made on


def rename_program(program: ExportedProgram, like: fx.Graph | None = None) -> ExportedProgram:
    """Likewise for an exported program, which is returned."""
    signature = program.graph_signature
    before = {node: node.name for node in program.graph.nodes}
    weights = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    rename_nodes(program.graph, weights, like)
    changed = {old: node.name for node, old in before.items()}
    for spec in signature.output_specs:
        if isinstance(spec.arg, TensorArgument):
            spec.arg.name = changed.get(spec.arg.name, spec.arg.name)
    program.graph_module.recompile()
    return program


def _call(node: fx.Node, weights: Mapping[str, str], known: Collection[str]) -> Call:
    operation = getattr(node.target, "__name__", str(node.target)).split(".")[0].strip("_")
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    module = stack[-1] if stack else ""
    for n in args_of(node)[1:3]:
        if isinstance(n, fx.Node) and n.op == "get_attr":
            module = owner(n)
        elif isinstance(n, fx.Node) and n.name in weights:
            module = weights[n.name].rpartition(".")[0]
    origin = [source.name for source in node.meta.get("from_node") or ()]
    if origin and origin[0] in known:
        module = origin[0]
    return Call(node.name, operation, module, [n.name for n in node.all_input_nodes])
