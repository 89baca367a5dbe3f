"""When a tensor in a graph is overwritten, and who sees it.

Reads nodes and modules; changes nothing. Nodes that may share memory are put in one class, and a
tensor's *version* at a node is the number of in-place writes to its class before that node.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from torch import fx

from passes.reading.effects import Effect, Effects


class Versions:
    """Versions of every tensor in one graph."""

    def __init__(self, gm: fx.GraphModule, eager: dict[str, str]) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._position: dict[fx.Node, int] = {}
        self._effects: dict[fx.Node, Effect] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        self._last_use: dict[fx.Node, int] = {}
        self._contested: dict[fx.Node, bool] = {}
        self._join(gm, eager)

    def _join(self, gm: fx.GraphModule, eager: dict[str, str]) -> None:
        """Go through the graph once."""
        effects = Effects(gm, eager)
        held: list[fx.Node] = []  # by Python that may write into it at its next call
        for position, node in enumerate(gm.graph.nodes):
            self._parent[node] = node
            self._position[node] = position
            effect = effects.of(node)
            if effect.opaque:
                held += node.all_input_nodes
                writes = tuple(dict.fromkeys((*effect.writes, *held)))
                effect = replace(effect, writes=writes)
                held.append(node)
            self._effects[node] = effect
            for source in effect.shares:
                self._parent[self._find(source)] = self._find(node)
            for source in node.all_input_nodes:
                self._last_use[source] = position
        for node, effect in self._effects.items():
            self._members.setdefault(self._find(node), []).append(node)
            for root in {self._find(target): None for target in effect.writes}:
                self._writes.setdefault(root, []).append(node)

    def of(self, tensor: fx.Node, reader: fx.Node) -> int:
        """Number of writes to `tensor`'s memory before `reader` runs."""
        writes = self._writes.get(self._find(tensor), [])
        return bisect_left(writes, self._position[reader], key=self._position.__getitem__)

    def shares(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether the two may share memory."""
        return self._find(one) is self._find(other)

    def is_before(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether `one` runs before `other`."""
        return self._position[one] < self._position[other]

    def is_seen(self, writer: fx.Node) -> bool:
        """Whether what `writer` writes into may be read otherwise than by way of its result."""
        roots = {self._find(target) for target in self._effects[writer].writes}
        return any(self._is_seen(writer, root) for root in roots)

    def is_contested(self, tensor: fx.Node) -> bool:
        """Whether anybody's write into the memory of `tensor` is seen."""
        root = self._find(tensor)
        if root not in self._contested:
            writers = self._writes.get(root, ())
            self._contested[root] = any(self._is_seen(node, root) for node in writers)
        return self._contested[root]

    def is_known_otherwise(self, tensor: fx.Node, from_on: fx.Node) -> bool:
        """Whether its memory has another name that is read at `from_on` or later, or is kept."""
        return any(
            self._effects[other].keeps or self._is_read(other, from_on)
            for other in self._members[self._find(tensor)]
            if other is not tensor and self.is_before(other, from_on)
        )

    def _is_seen(self, writer: fx.Node, root: fx.Node) -> bool:
        effect = self._effects[writer]
        # Who reads later what opaque Python was given reads what that left there.
        but = writer.all_input_nodes if effect.opaque else ()
        return any(
            self._effects[other].keeps or (other not in but and self._is_read(other, writer))
            for other in self._members[root]
            if self.is_before(other, writer)
        )

    def _is_read(self, tensor: fx.Node, after: fx.Node) -> bool:
        return self._last_use.get(tensor, -1) > self._position[after]

    def _find(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node
