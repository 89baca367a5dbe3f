"""The dataflow graph of a compiled model, for the questions that analysis asks.

Reads nodes and parts; changes nothing. One networkx graph spans the root graph and the parts below
eager code: a part hangs between the eager call that reaches it and that call's readers, in the
order in which the model registered its modules, since Python decides at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from passes.tracing.module_kinds import owns_matrix
from swatfx.arguments import FLAG, checked, instance
from swatfx.compiled import FALLBACK, SwatModule, all_nodes, is_root, weight_chain

_PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "bilinear")
Key = tuple[str, str]  # (part path, node name)

if TYPE_CHECKING:
    import networkx

    Graph = networkx.DiGraph[Key]
else:
    Graph = Any  # networkx is slow to import: the functions below do


@checked(gm=instance(SwatModule), fallback=FLAG)
def to_networkx(gm: SwatModule, fallback: bool = True) -> Graph:
    """Nodes (part, name) with `op`, `target`, `layer` and `part`; edges from producer to reader.

    A module that Python calls and that has a matrix of its own is one node, (path, "matrix");
    `product` tells what multiplies by a parameter and is no layer.

    Args:
        gm: the model.
        fallback: join the parts that only calls for which there is no graph come by.
    """
    import networkx

    graph: Graph = networkx.DiGraph()
    for place in all_nodes(gm):
        node, plan = place.node, place.record.plan
        graph.add_node(
            place.key,
            op=node.op,
            target=str(node.target),
            layer=plan.name if plan else None,
            product=_is_product(node),
            part=place.prefix,
        )
        for source in node.all_input_nodes:
            graph.add_edge((place.prefix, source.name), place.key)
    _join_parts(gm, graph, fallback)
    return graph


def _join_parts(gm: SwatModule, graph: Graph, fallback: bool) -> None:
    """Put each part between the eager call above it and that call's readers, one after another."""
    calls: dict[str, list[tuple[Key, fx.Node]]] = {}
    for place in all_nodes(gm):
        if place.node.op == "call_module":
            calls.setdefault(place.path, []).append((place.key, place.node))
    order = {name: i for i, (name, _) in enumerate(gm.named_modules())}
    matrices = _matrices(gm, graph)
    below: dict[str, list[str]] = {}
    for path in sorted([*gm.parts, *matrices], key=lambda p: order.get(p, 0)):
        caller = path
        while caller and caller not in calls:
            caller = caller.rpartition(".")[0]
        around = [other for other in gm.parts if path.startswith(f"{other}.")]
        if not all(caller.startswith(f"{other}.") for other in around):
            continue  # another way into a part that is in the chain; no eager call in it leads here
        below.setdefault(caller or "swat.eager_root", []).append(path)
    for caller, paths in below.items():
        for key, node in calls.get(caller, []):
            if key[0] == FALLBACK and not fallback:
                continue
            readers = [(key[0], user.name) for user in node.users]
            sources = [key]
            for path in paths:
                if path in matrices:
                    graph.add_edges_from((s, matrices[path]) for s in sources)
                    sources = [matrices[path]]
                    continue
                nodes = list(gm.parts[path].graph.nodes)
                ends = [(path, n.name) for n in nodes if n.op == "output"]
                for n in nodes:
                    if n.op == "placeholder":
                        graph.add_edges_from((s, (path, n.name)) for s in sources)
                sources = ends
            graph.add_edges_from((s, r) for s in sources for r in readers)


def _matrices(gm: SwatModule, graph: Graph) -> dict[str, Key]:
    """A node for each module that multiplies by a matrix of its own where no graph sees it."""
    found: dict[str, Key] = {}
    seen = {place.path.rpartition(".")[0] for place in all_nodes(gm) if place.node.op == "get_attr"}
    for path, module in gm.named_modules():
        if owns_matrix(module) and path and path not in gm.parts and path not in seen:
            found[path] = (path, "matrix")
            graph.add_node(
                found[path], op="eager", target=path, layer=None, product=True, part=path
            )
    return found


def first_and_last(graph: Graph) -> tuple[set[Key], set[Key]]:
    """Layer nodes with no layer between them and a graph input, and a graph output."""
    import networkx

    order = list(graph)
    if networkx.is_directed_acyclic_graph(graph):
        order = list(networkx.topological_sort(graph))
    return (
        _frontier(graph, order, "placeholder", graph.predecessors),
        _frontier(graph, order[::-1], "output", graph.successors),
    )


def reached_layers(graph: Graph) -> set[str]:
    """Names of the layers that a graph input leads to."""
    import networkx

    inputs = ((key, data) for key, data in graph.nodes(data=True) if data["op"] == "placeholder")
    starts = [key for key, data in inputs if is_root(data["part"])]
    reached = set(starts).union(*(networkx.descendants(graph, key) for key in starts))
    return {graph.nodes[key]["layer"] for key in reached} - {None}


def _multiplies(data: dict[str, Any]) -> bool:
    return bool(data["layer"] or data["product"])


def _is_product(node: fx.Node) -> bool:
    """Whether `node` multiplies by a matrix that is a parameter: a layer in all but name."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function") or name not in _PRODUCTS:
        return False
    return any(weight_chain(n) is not None for n in node.all_input_nodes if n.op != "placeholder")


def _frontier(graph: Graph, order: list[Key], start: str, before: Any) -> set[Key]:
    reached: set[Key] = set()
    behind_layer: set[Key] = set()
    frontier: set[Key] = set()
    for key in order:
        data = graph.nodes[key]
        above = list(before(key))
        if (data["op"] == start and is_root(data["part"])) or any(k in reached for k in above):
            reached.add(key)
        if any(k in behind_layer or _multiplies(graph.nodes[k]) for k in above):
            behind_layer.add(key)
        if data["layer"] and key in reached and key not in behind_layer:
            frontier.add(key)
    return frontier
