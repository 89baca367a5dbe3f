"""Identify conv and linear nodes and give each a LayerPlan and a LayerCall.

Reads nodes, modules and weights; writes metadata on layer nodes: name, kind, weight shape, whether
the layer is first or last, and why it is skipped if it has to be. A weight that several calls share
is one layer. Changes no node.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from passes.reading.dataflow import Key, first_and_last, reached_layers, to_networkx
from passes.reading.layer_calls import Site, expression, find_site, normal_call, roots
from passes.tracing.module_kinds import LAYERS, opaque_reason
from swatfx import meta
from swatfx.compiled import SwatModule, all_nodes, join
from swatfx.meta import LayerPlan, NodeRecord
from swatfx.passing import Context, PassResult


def find_layers(gm: SwatModule, ctx: Context) -> PassResult:
    """Annotate layer nodes in the root graph and in every part."""
    names: dict[object, str] = {}
    found: dict[Key, fx.Node] = {}
    for place in all_nodes(gm):
        part, node = place.part, place.node
        site = find_site(part, node)
        if site is None or place.record.plan is not None:
            continue
        plan = _plan(part, node, place.prefix, site, names)
        kernel = plan.weight_shape[2:]
        call = None if plan.skipped else normal_call(plan.name, site, kernel)
        if call is None and not plan.skipped:
            plan = replace(plan, skipped="arguments known only at run time")
        meta.write(node, NodeRecord(plan=plan, call=call, role="layer"))
        found[place.key] = node
    if found:
        _mark_ends(gm, found)
    return PassResult(gm, bool(found), (f"{len(set(names.values()))} layers",))


def _mark_ends(gm: SwatModule, found: dict[Key, fx.Node]) -> None:
    """Mark the first and the last layers."""
    if gm.ways is None or gm.ways.fallback is None:
        first, last = first_and_last(to_networkx(gm))
        _mark(found, first & set(found), last & set(found))
        return
    # In which order Python calls the parts is a guess: only for layers that no graph leads to.
    graph = to_networkx(gm, fallback=False)
    known = reached_layers(graph)
    sure = {k: n for k, n in found.items() if _plan_of(n).name in known}
    first, last = first_and_last(graph)
    _mark(sure, first & set(sure), last & set(sure))
    rest = {k: n for k, n in found.items() if k not in sure}
    first, last = first_and_last(to_networkx(gm))
    _mark(rest, first & set(rest), last & set(rest))


def _mark(found: dict[Key, fx.Node], first: set[Key], last: set[Key]) -> None:
    """Set is_first and is_last; calls of one layer agree."""
    firsts = {_plan_of(found[key]).name for key in first}
    lasts = {_plan_of(found[key]).name for key in last}
    for node in found.values():
        plan = _plan_of(node)
        if plan.name in firsts or plan.name in lasts:
            changed = replace(plan, is_first=plan.name in firsts, is_last=plan.name in lasts)
            meta.update(node, plan=changed)


def _plan_of(node: fx.Node) -> LayerPlan:
    plan = meta.read(node).plan
    assert plan is not None  # only annotated nodes are asked
    return plan


def _plan(
    part: fx.GraphModule, node: fx.Node, prefix: str, site: Site, names: dict[object, str]
) -> LayerPlan:
    weight = site.weight if isinstance(site.weight, str) else ""
    path = weight or node.name
    if isinstance(site.weight, fx.Node) and site.value is not None:
        path = min(roots(site.weight), default=path)
    name = join(prefix, path).removesuffix(".weight")
    if node.op == "call_module":
        name = join(prefix, str(node.target))
    identity: object = (prefix, node.name)
    if isinstance(site.weight, fx.Node):
        identity = expression(part, site.weight)
    elif site.value is not None:
        identity = id(site.value)
    parametrized = node.op == "call_module" and nn.utils.parametrize.is_parametrized(
        part.get_submodule(str(node.target)), "weight"
    )
    if parametrized:
        identity = name
    if identity in names:
        name = names[identity]
    else:
        taken = set(names.values())
        base, count = name, 1
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        names[identity] = name
    shape = () if site.value is None else tuple(site.value.shape)
    return LayerPlan(
        name=name,
        kind=site.kind,
        weight=join(prefix, weight) if weight else "",
        weight_shape=shape,
        skipped=_forced_skip(part, node, site),
    )


def _forced_skip(part: fx.GraphModule, node: fx.Node, site: Site) -> str | None:
    if node.op == "call_module":
        module = part.get_submodule(str(node.target))
        if reason := opaque_reason(module):
            return reason
        plain = next((k for k in LAYERS if isinstance(module, k)), None)
        custom = plain is not None and type(module).forward is not plain.forward
        if custom and not nn.utils.parametrize.is_parametrized(module):
            return f"own forward: {type(module).__name__}"
    if site.is_transposed:
        return "transposed convolution"
    if site.value is None:
        return "weight computed from the input"
    if not site.value.is_floating_point() and not site.value.is_complex():
        return f"weight is {site.value.dtype}"
    return None
