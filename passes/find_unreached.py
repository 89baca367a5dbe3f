"""List the conv and linear modules that no graph calls, each with the reason why.

Reads the module tree, annotated nodes and `gm.eager`; writes a skipped LayerPlan for each into
`gm.unreached`. Changes no node. Says on demand which matrices are no layer's at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from passes.reading.layer_calls import find_site, roots
from passes.tracing.module_kinds import layer_weights
from swatfx.compiled import SwatModule, all_nodes, join, layer_nodes
from swatfx.meta import LayerPlan
from swatfx.passing import Context, PassResult


def find_unreached(gm: SwatModule, ctx: Context) -> PassResult:
    """Fill `gm.unreached`: modules below eager code, unused ones, weights used in other ways."""
    called = _called(gm)
    read: set[int] = set()
    for place in all_nodes(gm):
        if place.node.op == "get_attr" and place.record.plan is None:
            read.update(_tensors(place.part, str(place.node.target)))
    plans: dict[str, LayerPlan] = {}
    for path, module in gm.named_modules():
        if path == "swat" or path.startswith("swat."):
            continue
        for leaf, kind in layer_weights(module).items():
            weight = _weight(module, leaf)
            if weight is None or id(weight) in called:
                continue
            name = path if leaf == "weight" else join(path, leaf)
            plans[name] = LayerPlan(
                name=name,
                kind=kind,
                weight=join(path, leaf),
                weight_shape=tuple(weight.shape),
                skipped=_reason(gm, path, id(weight) in read),
                rule=ctx.policy,
            )
            called.add(id(weight))  # a shared module is listed once
    gm.__dict__["unreached"] = plans
    return PassResult(gm, False, (f"{len(plans)} layers that no graph calls",))


def matrices_outside(gm: SwatModule) -> dict[str, int]:
    """Name -> elements of each parameter that something may multiply by, and that is no layer's.

    Those of embeddings are left out: rows are looked up there.
    """
    known = _called(gm)
    for module in gm.modules():
        if layer_weights(module) or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            known.update(id(parameter) for parameter in module.parameters())
    return {
        name: parameter.numel()
        for name, parameter in gm.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in known and not name.startswith("swat.")
    }


def _called(gm: SwatModule) -> set[int]:
    """Identities of the parameters that layers in graphs have their weights from."""
    return {
        tensor for layer in layer_nodes(gm) for tensor in _layer_tensors(layer.part, layer.node)
    }


def _layer_tensors(part: fx.GraphModule, node: fx.Node) -> Iterator[int]:
    """Identities of the parameters that a layer node's weight comes from."""
    site = find_site(part, node)
    weight: Any = node.args[1] if site is None else site.weight
    if node.op == "call_module":
        yield from _tensors(part, str(node.target))
    elif isinstance(weight, str):
        yield from _tensors(part, weight)
    elif site is None or site.value is not None:
        for path in roots(weight):
            yield from _tensors(part, path)


def _tensors(part: fx.GraphModule, path: str) -> Iterator[int]:
    value: Any = part
    for atom in path.split("."):
        value = getattr(value, atom, None)
    if isinstance(value, nn.Module):
        yield from (id(parameter) for parameter in value.parameters())
    elif isinstance(value, torch.Tensor):
        yield id(value)


def _weight(module: nn.Module, leaf: str) -> torch.Tensor | None:
    """The tensor that is trained: a parametrized or spectrally normed weight's original."""
    if nn.utils.parametrize.is_parametrized(module, leaf):
        originals = module.parametrizations[leaf]  # type: ignore[union-attr, index]
        return next(iter(originals.parameters()), None)  # type: ignore[operator, union-attr, arg-type]
    for name in (leaf, f"{leaf}_orig", f"{leaf}_v"):
        value = getattr(module, name, None) if name == leaf else module._parameters.get(name)
        if isinstance(value, nn.Parameter):
            return value
    value = getattr(module, leaf, None)
    return value if isinstance(value, torch.Tensor) else None


def _reason(gm: SwatModule, path: str, is_read: bool) -> str:
    if path in gm.eager:
        return gm.eager[path]
    if is_read:
        return "weight used outside conv and linear calls"
    above = path
    while above:
        above = above.rpartition(".")[0]
        if above in gm.eager:
            where = above or "the root module"
            return f"not called below eager {where} ({gm.eager[above]})"
    return "not called in forward"
