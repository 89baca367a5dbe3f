"""Check that a graph is what the plan says; runs between passes and after the last.

Reads everything, changes nothing. A violated rule is a bug in a pass, and is reported as one.
"""

from __future__ import annotations

from torch import fx

from swatfx import meta
from swatfx.compiled import CONV, LINEAR, SwatModule, all_nodes, all_parts, layer_nodes
from swatfx.errors import PassError
from swatfx.passing import Context, PassResult


def verify(gm: SwatModule, ctx: Context) -> PassResult:
    """Raise PassError if graph and plan disagree."""
    for _, part in all_parts(gm):
        part.graph.lint()
    rewritten = [_check(place.node) for place in all_nodes(gm)]
    if any(rewritten):
        for layer in layer_nodes(gm):
            if not layer.is_sparse and layer.plan.takes_part:
                raise _error(layer.node, "the layer takes part but was not rewritten")
    return PassResult(gm, False)


def _check(node: fx.Node) -> bool:
    is_op = node.op == "call_function" and node.target in (CONV, LINEAR)
    record = meta.read(node)
    if is_op != (record.role == "op"):
        raise _error(node, "sparse ops and their metadata do not agree")
    if not is_op:
        return False
    if record.plan is None or record.call is None or not record.plan.takes_part:
        raise _error(node, "a sparse op without a plan")
    state, kept = node.args[3], node.args[4]
    if not isinstance(state, fx.Node) or "weight_threshold" not in str(state.target):
        raise _error(node, "a sparse op without a weight threshold")
    if record.plan.rule.backward_activation != (kept is not None):
        raise _error(node, "packed activation and plan do not agree")
    return True


def _error(node: fx.Node, problem: str) -> PassError:
    plan = meta.read(node).plan
    return PassError("verify", problem, node=node.name, layer=plan.name if plan else None)
