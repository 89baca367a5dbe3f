"""Names of what passes put into a model."""

from __future__ import annotations

from collections.abc import Container

from torch import fx


def unused(name: str, taken: Container[str]) -> str:
    """`name`, numbered if it is taken."""
    chosen, count = name, 1
    while chosen in taken:
        chosen, count = f"{name}_{count}", count + 1
    return chosen


def rename(node: fx.Node, name: str) -> None:
    """Call `node` by `name`, numbered if another node has that; those erased do not count."""
    node.name = unused(name, {n.name for n in node.graph.nodes if n is not node})
