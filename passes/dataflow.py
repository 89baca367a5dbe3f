"""The dataflow graph of a compiled model, for the questions that analysis asks.

Reads nodes and parts; changes nothing. One networkx graph spans the root graph and the parts below
eager code: a part hangs between the eager call that reaches it and that call's readers, in the
order in which the model registered its modules, since Python decides at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import fx

from swatfx import meta
from swatfx.graph_module import SwatModule, all_parts

Key = tuple[str, str]  # (part path, node name)

if TYPE_CHECKING:
    Graph = nx.DiGraph[Key]
else:
    Graph = nx.DiGraph  # not subscriptable when it runs


def to_networkx(gm: SwatModule) -> Graph:
    """Nodes (part, name) with `op`, `target`, `layer` and `part`; edges from producer to reader."""
    graph: Graph = nx.DiGraph()
    for prefix, part in all_parts(gm):
        for node in part.graph.nodes:
            record = meta.read(node)
            graph.add_node(
                (prefix, node.name),
                op=node.op,
                target=str(node.target),
                layer=record.plan.name if record.plan else None,
                part=prefix,
            )
            for source in node.all_input_nodes:
                graph.add_edge((prefix, source.name), (prefix, node.name))
    _join_parts(gm, graph)
    return graph


def _join_parts(gm: SwatModule, graph: Graph) -> None:
    """Put each part between the eager call above it and that call's readers, one after another."""
    calls: dict[str, list[tuple[Key, fx.Node]]] = {}
    for prefix, part in all_parts(gm):
        for node in part.graph.nodes:
            if node.op == "call_module":
                path = f"{prefix}.{node.target}" if prefix else str(node.target)
                calls.setdefault(path, []).append(((prefix, node.name), node))
    order = {name: i for i, (name, _) in enumerate(gm.named_modules())}
    below: dict[str, list[str]] = {}
    for path in sorted(gm.parts, key=lambda p: order.get(p, 0)):
        if any(path.startswith(f"{other}.") for other in gm.parts):
            continue  # another way into a part that is in the chain
        caller = path
        while caller and caller not in calls:
            caller = caller.rpartition(".")[0]
        below.setdefault(caller or "swat.eager_root", []).append(path)
    for caller, paths in below.items():
        for key, node in calls.get(caller, []):
            readers = [(key[0], user.name) for user in node.users]
            sources = [key]
            for path in paths:
                nodes = list(gm.parts[path].graph.nodes)
                ends = [(path, n.name) for n in nodes if n.op == "output"]
                for n in nodes:
                    if n.op == "placeholder":
                        graph.add_edges_from((s, (path, n.name)) for s in sources)
                sources = ends
            graph.add_edges_from((s, r) for s in sources for r in readers)


def first_and_last(graph: Graph) -> tuple[set[Key], set[Key]]:
    """Layer nodes with no layer between them and a graph input, and a graph output."""
    order = list(nx.topological_sort(graph)) if nx.is_directed_acyclic_graph(graph) else list(graph)
    return (
        _frontier(graph, order, "placeholder", graph.predecessors),
        _frontier(graph, order[::-1], "output", graph.successors),
    )


def _frontier(graph: Graph, order: list[Key], start: str, before: Any) -> set[Key]:
    reached: set[Key] = set()
    behind_layer: set[Key] = set()
    frontier: set[Key] = set()
    for key in order:
        data = graph.nodes[key]
        above = list(before(key))
        if (data["op"] == start and not data["part"]) or any(k in reached for k in above):
            reached.add(key)
        if any(k in behind_layer or graph.nodes[k]["layer"] for k in above):
            behind_layer.add(key)
        if data["layer"] and key in reached and key not in behind_layer:
            frontier.add(key)
    return frontier
