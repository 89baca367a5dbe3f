"""Augmented assignments that nobody can tell from plain operators become these.

Reads nodes and modules; changes the target of calls. `x += y` writes into x: that shows where x, or
what shares its memory, is read later, or is somebody else's.
"""

from __future__ import annotations

from torch import fx

from passes.reading.aliasing import Versions
from passes.tracing.augmented import PLAIN


def plain_where_unseen(gm: fx.GraphModule, eager: dict[str, str]) -> None:
    """Rewrite one graph, as it was traced; `eager` as of `Versions`."""
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in PLAIN]
    if not calls:
        return
    versions = Versions(gm, eager)
    for node in calls:
        if not _is_seen(versions, node):
            node.target = PLAIN[node.target]
    gm.recompile()


def _is_seen(versions: Versions, node: fx.Node) -> bool:
    target = node.args[0]
    if not isinstance(target, fx.Node):
        return True
    for other in versions.aliases(target):
        if other is node or not versions.is_before(other, node):
            continue
        # A sum is dense where a view was not: what is asked of its strides later would differ.
        if other.op in ("placeholder", "get_attr") or versions.may_be_view(other):
            return True
        if any(versions.is_before(node, user) for user in other.users):
            return True
    return False
