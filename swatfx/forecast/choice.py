"""Which calls take which side, at the least sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """Calls that take one side together.

    Attributes:
        sparse: seconds under sparse kernels; infinite where they cannot run.
        dense: seconds under dense ones.
    """

    sparse: float
    dense: float


@dataclass(frozen=True)
class Joint:
    """Tensors that lie in the sparse kernels' order as soon as one of the calls around runs sparse.

    Attributes:
        calls: those around it, by position; each that runs dense then pays a conversion.
        crossing: seconds of each of their conversions.
        sparse: seconds of what lies between (norms, say) in that order.
        dense: likewise in row-major order.
        outside: seconds of conversions where other tensors meet these, if they lie so.
    """

    calls: tuple[int, ...]
    crossing: tuple[float, ...]
    sparse: float = 0.0
    dense: float = 0.0
    outside: float = 0.0


def total(calls: Sequence[Call], joints: Sequence[Joint], sparse: AbstractSet[int]) -> float:
    """Seconds, where the calls at positions `sparse` run sparse and all others dense."""
    seconds = sum(c.sparse if i in sparse else c.dense for i, c in enumerate(calls))
    for joint in joints:
        if not sparse.isdisjoint(joint.calls):
            seconds += joint.sparse + joint.outside
            crossings = zip(joint.calls, joint.crossing, strict=True)
            seconds += sum(cost for i, cost in crossings if i not in sparse)
        else:
            seconds += joint.dense
    return seconds


def cheapest(calls: Sequence[Call], joints: Sequence[Joint]) -> set[int]:
    """Positions of the calls that run sparse where `total` is least, or near it.

    It is the least where no joint would gain by lying in the sparse order between dense calls
    alone, since `total` is what a cut costs then (Kolmogorov and Zabih 2004: submodular). Elsewhere
    the cut is improved by changing one call, or all around one joint, for as long as that gains.
    Never is it more than with all calls dense, or sparse wherever they can be.
    """
    able = {i for i, call in enumerate(calls) if math.isfinite(call.sparse)}
    moves = [{i} for i in able]
    moves += [around for joint in joints if len(around := able & set(joint.calls)) > 1]
    starts = [_cut(calls, joints), set[int](), able]
    found = [_improved(calls, joints, start, moves) for start in starts]
    return min(found, key=lambda sparse: total(calls, joints, sparse))


def _improved(
    calls: Sequence[Call], joints: Sequence[Joint], start: set[int], moves: Sequence[set[int]]
) -> set[int]:
    """`start`, with moves made sparse or dense for as long as that gains."""
    best, least = start, total(calls, joints, start)
    while True:
        before = least
        for move in moves:
            for other in (best | move, best - move):
                seconds = total(calls, joints, other)
                if seconds < least * (1 - 1e-12):
                    best, least = other, seconds
        if least == before:
            return best


def _cut(calls: Sequence[Call], joints: Sequence[Joint]) -> set[int]:
    """The calls on the sparse side of a minimum cut.

    It separates what runs and lies so from what does not; the edges that it cuts add up to `total`,
    but for a constant.
    """
    import networkx  # slow to import

    graph: Any = networkx.DiGraph()
    graph.add_nodes_from(("sparse", "dense"))

    def decide(node: tuple[str, int], sparse: float, dense: float) -> None:
        if math.isinf(sparse):
            graph.add_edge(node, "dense")  # without a capacity: never cut
            return
        least = min(sparse, dense)
        graph.add_edge("sparse", node, capacity=dense - least)
        graph.add_edge(node, "dense", capacity=sparse - least)

    for i, call in enumerate(calls):
        decide(("call", i), call.sparse, call.dense)
    for j, joint in enumerate(joints):
        sparse = joint.sparse + joint.outside
        decide(("joint", j), sparse, min(joint.dense, sparse + sum(joint.crossing)))
        paid: dict[int, float] = {}
        for i, cost in zip(joint.calls, joint.crossing, strict=True):
            paid[i] = paid.get(i, 0.0) + cost
        for i, cost in paid.items():
            graph.add_edge(("call", i), ("joint", j))  # a sparse call's tensors lie so
            graph.add_edge(("joint", j), ("call", i), capacity=cost)
    _, (side, _) = networkx.minimum_cut(graph, "sparse", "dense")
    return {node[1] for node in side if node[0] == "call"}
