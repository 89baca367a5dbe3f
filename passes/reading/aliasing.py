"""When a tensor in a graph is overwritten, and who sees it.

Reads nodes and modules; changes nothing. Nodes that share memory by what the graph does are put in
one class. Classes that hold what comes from outside (inputs, parameters, what opaque Python gave or
was given) may share memory without the graph telling: a write into one of them counts for all. A
tensor's *version* at a node is the number of writes that count for it before that node.
"""

from __future__ import annotations

from bisect import bisect_left

from torch import fx

from passes.reading.effects import Effect, Effects


class Versions:
    """Versions of every tensor in one graph."""

    def __init__(self, gm: fx.GraphModule, eager: dict[str, str]) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._position: dict[fx.Node, int] = {}
        self._effects: dict[fx.Node, Effect] = {}
        self._last_use: dict[fx.Node, int] = {}
        self._contested: dict[fx.Node, bool] = {}
        effects = Effects(gm, eager)
        for position, node in enumerate(gm.graph.nodes):
            self._parent[node] = node
            self._position[node] = position
            effect = self._effects[node] = effects.of(node)
            for source in effect.shares:
                self._parent[self._find(source)] = self._find(node)
            for source in node.all_input_nodes:
                self._last_use[source] = position
        self._foreign = effects.foreign
        self._members: dict[fx.Node, list[fx.Node]] = {}
        for node in self._effects:
            self._members.setdefault(self._find(node), []).append(node)
        self._outside = {self._find(n) for n, effect in self._effects.items() if effect.keeps}
        self._writes: dict[fx.Node | None, list[fx.Node]] = {}  # None: those that count outside
        for node, effect in self._effects.items():
            roots = {self._find(target): None for target in effect.writes}
            outside = any(root in self._outside for root in roots)
            if effect.opaque or effect.writes_own or outside:
                self._writes.setdefault(None, []).append(node)
            for root in roots:
                if root not in self._outside:
                    self._writes.setdefault(root, []).append(node)

    def of(self, tensor: fx.Node, reader: fx.Node) -> int:
        """Number of writes that count for `tensor` before `reader` runs."""
        writes = self._writers(self._find(tensor))
        return bisect_left(writes, self._position[reader], key=self._position.__getitem__)

    def shares(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether the graph may have the two share memory."""
        return self._find(one) is self._find(other)

    def is_before(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether `one` runs before `other`."""
        return self._position[one] < self._position[other]

    def is_foreign(self, node: fx.Node) -> bool:
        """Whether `node` is somebody else's Python, which may do anything."""
        return node in self._foreign

    def is_seen(self, writer: fx.Node) -> bool:
        """Whether what `writer` writes into may be read otherwise than by way of its result."""
        roots = {self._find(target) for target in self._effects[writer].writes}
        return any(self._is_seen(writer, root) for root in roots)

    def is_contested(self, tensor: fx.Node) -> bool:
        """Whether anybody's write into the memory of `tensor` is seen."""
        root = self._find(tensor)
        if root not in self._contested:
            self._contested[root] = any(self._is_seen(n, root) for n in self._writers(root))
        return self._contested[root]

    def is_known_otherwise(self, tensor: fx.Node, from_on: fx.Node) -> bool:
        """Whether its memory has another name that is read at `from_on` or later, or is kept."""
        return any(
            self._effects[other].keeps or self._last_use.get(other, -1) >= self._position[from_on]
            for other in self._members[self._find(tensor)]
            if other is not tensor and self.is_before(other, from_on)
        )

    def is_outside(self, tensor: fx.Node) -> bool:
        """Whether something comes from outside that `tensor` may be, or be a view of."""
        return self._find(tensor) in self._outside

    def sources(self, tensor: fx.Node) -> list[fx.Node]:
        """The parameters and buffers that `tensor` may be, or be a view of."""
        return [n for n in self._members[self._find(tensor)] if n.op == "get_attr"]

    def _writers(self, root: fx.Node) -> list[fx.Node]:
        return self._writes.get(None if root in self._outside else root, [])

    def _is_seen(self, writer: fx.Node, root: fx.Node) -> bool:
        effect = self._effects[writer]
        # Who reads later what opaque Python was given reads what that left there.
        but = writer.all_input_nodes if effect.opaque else ()
        position = self._position[writer]
        return any(
            self._effects[other].keeps
            or (other not in but and self._last_use.get(other, -1) > position)
            for other in self._members[root]
            if self.is_before(other, writer)
        )

    def _find(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node
