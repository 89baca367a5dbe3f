"""Rows of a report for the products that are no layer's: matmul, einsum, recurrent layers, experts.

Reads the plans and the products that the dense run formed; writes nothing. Every product counts
once: as the layer's whose node formed it with its weight, or in a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.reading.products import Frame, Product
from passes.trace_shapes import Run
from swatfx import macs, meta
from swatfx.compiled import (
    Attention,
    Bound,
    Elementwise,
    LayerNormOf,
    Norm,
    NormOf,
    Saver,
    SwatModule,
    all_nodes,
    join,
)
from swatfx.macs import Macs
from swatfx.meta import LayerCall, LayerCost, LayerPlan

OF_ACTIVATIONS = "matrix product of activations"
OF_WEIGHTS = "matrix product of weights"
OUTSIDE = "weight used outside conv and linear calls"
_OPS = {"mm": "matmul", "bmm": "matmul", "mv": "matmul", "dot": "matmul"}


@dataclass
class ProductRow:
    """Products of one weight, or of one node or module without one, summed.

    Attributes:
        plan: what a row needs: name, kind, weight, its shape, and why it is dense.
        cost: dense and sparse alike.
        parameters: weights that no layer has on its account.
        input_elements: of a convolution's inputs.
        first: who formed the first of them.
        frames: who formed them, nodes of layers left out: what those keep is the layers'.
    """

    plan: LayerPlan
    cost: LayerCost
    first: Frame
    parameters: int = 0
    input_elements: int = 0
    frames: dict[Frame, None] = field(default_factory=dict)


def product_rows(gm: SwatModule, run: Run, accounting: str) -> list[ProductRow]:
    """The rows, in the order in which their first products were formed.

    Args:
        gm: the compiled model.
        run: an observed run of it with every layer dense.
        accounting: as of `annotate_cost`.
    """
    nodes = {place.key: (place.part, place.node) for place in all_nodes(gm)}
    plans = {meta.read(n).plan for _, n in nodes.values()} - {None}
    unreached = {plan.weight: plan for plan in gm.unreached.values()}
    owned = {plan.weight for plan in plans if plan is not None}
    taken = {plan.name for plan in plans if plan is not None}
    sizes = {name: tuple(p.shape) for name, p in gm.named_parameters()}
    rows: dict[object, ProductRow] = {}
    for product in run.products:
        part_and_node = nodes.get(product.frame.node) if product.frame.node else None
        if part_and_node is not None and is_own(*part_and_node, product):
            continue
        weights = product.left | product.right
        single = next(iter(weights)) if len(weights) == 1 else None
        known = unreached.get(single) if single is not None else None
        key: object = single if single is not None else (product.frame, weights)
        if key not in rows:
            plan = _plan(part_and_node, product, single, taken, sizes)
            if known is not None:
                plan = replace(known, skipped=_called(known.skipped))
            taken.add(plan.name)
            fresh = (
                [] if known is not None else [n for n in weights if n in sizes and n not in owned]
            )
            owned.update(fresh)
            count = sum(math.prod(sizes[name]) for name in fresh)
            rows[key] = ProductRow(plan, LayerCost(), product.frame, count)
        row = rows[key]
        row.cost = add_costs(row.cost, product_cost([product], accounting))
        if part_and_node is None or meta.read(part_and_node[1]).plan is None:
            row.frames[product.frame] = None
        if product.convolution is not None and not product.convolution.transposed:
            row.input_elements += math.prod(product.shapes[0])
    return list(rows.values())


def _called(reason: str | None) -> str:
    """What `find_unreached` says of a layer, mended: its weight was used after all."""
    if reason is None or reason.startswith("not called in"):
        return OUTSIDE
    return reason.removeprefix("not ")


def is_own(part: fx.GraphModule, node: fx.Node, product: Product) -> bool:
    """Whether a layer's node formed the product as that layer, with its weight."""
    plan = meta.read(node).plan
    if plan is None:
        return False
    if node.op != "call_module":
        return True
    owner, _, leaf = plan.weight.rpartition(".")
    own = (plan.weight, *(f"{plan.weight}_{end}" for end in ("orig", "v", "g")))
    below = join(owner, f"parametrizations.{leaf}.")
    return any(n in own or n.startswith(below) for n in product.left | product.right)


def product_cost(products: Iterable[Product], accounting: str) -> LayerCost:
    """Cost of the products; convolutions as the accounting has them, gradients that are wanted.

    The gradient of a side that is computed from weights is a weight gradient, any other an input
    gradient.
    """
    total: LayerCost = LayerCost()
    for product in products:
        found = _convolved(product, accounting)
        if found is None:
            sides = zip((product.left, product.right), product.wants, strict=True)
            gradients = [0, 0]
            for names, wanted in sides:
                gradients[bool(names)] += product.macs * wanted
            found = Macs(product.macs, *gradients)
        cost = LayerCost(
            product.shapes[0],
            product.shapes[2],
            found.forward,
            found.forward,
            found.input_gradient,
            found.input_gradient,
            found.weight_gradient,
            found.weight_gradient,
            inference_macs=found.forward,
        )
        total = add_costs(total, cost)
    return total


def _convolved(product: Product, accounting: str) -> Macs | None:
    """A convolution's MACs as its layer's would be; None where torch's own count is right."""
    how, (seen, weight, out) = product.convolution, product.shapes
    if how is None or accounting == "torch" or not (seen and weight and out):
        return None
    if accounting == "paper":
        if how.transposed:
            return macs.transposed_macs(weight, seen)
        return macs.dense_macs(weight, seen, out)
    if how.transposed:
        return None
    call = LayerCall("", how.stride, how.padding, how.dilation)
    spatial = len(weight) - 2
    taps = macs.tap_counts(weight[2:], seen[-spatial:], out[-spatial:], call)
    batch = seen[0] if len(seen) == len(weight) else 1
    full = macs.exact_weight_macs(torch.ones(weight, dtype=torch.bool), taps, batch)
    return Macs(full, full * product.wants[0], full * product.wants[1])


def add_costs(one: LayerCost | None, other: LayerCost) -> LayerCost:
    """Sum of two calls of a layer; shapes are those of the first."""
    if one is None:
        return other
    sums = {
        f.name: getattr(one, f.name) + getattr(other, f.name)
        for f in fields(LayerCost)
        if not f.name.endswith("_shape")
    }
    return LayerCost(
        input_shape=one.input_shape or other.input_shape,
        output_shape=one.output_shape or other.output_shape,
        **sums,
    )


def _plan(
    part_and_node: tuple[fx.GraphModule, fx.Node] | None,
    product: Product,
    weight: str | None,
    taken: set[str],
    sizes: dict[str, tuple[int, ...]],
) -> LayerPlan:
    name, kind = product.frame.path, product.frame.kind
    if part_and_node is not None and product.frame.node is not None:
        name, kind = name_and_kind(part_and_node[0], product.frame.node[0], part_and_node[1])
        if meta.read(part_and_node[1]).plan is not None:
            kind = ""
        if part_and_node[1].target == "swat.eager_root":
            name, kind = "the root module", ""
    kind = kind or _kind(product)
    if weight is not None and (of := weight.removesuffix(".weight")) not in taken:
        name = of
    base, count = name or kind, 1
    name = base
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    sides = (bool(product.left), bool(product.right))
    reason = OF_WEIGHTS if all(sides) else OUTSIDE if any(sides) else OF_ACTIVATIONS
    shape = sizes.get(weight, ()) if weight is not None else ()
    return LayerPlan(name, kind, weight or "", shape, skipped=reason)


def _kind(product: Product) -> str:
    if product.convolution is not None:
        spatial = len(product.shapes[1]) - 2
        return f"conv{'_transpose' * product.convolution.transposed}{spatial}d"
    if product.op.startswith("_scaled_dot_product"):
        return "scaled_dot_product_attention"
    return _OPS.get(product.op, product.op.strip("_"))


def name_and_kind(part: fx.GraphModule, prefix: str, node: fx.Node) -> tuple[str, str]:
    """Of a node that is no layer: the module it calls or its own name, and what it is.

    Kinds are "batch norm" (with the addition and the ReLU that may follow it), "relu", or what else
    a function or module is called.
    """
    name, kind = join(prefix, node.name), getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        module = part.get_submodule(str(node.target))
        kind = type(module).__name__.lower()
        if isinstance(module, Bound):
            name = module.path
            kind = "layernorm" if isinstance(module, LayerNormOf) else "dropout"
        elif isinstance(module, Elementwise):
            kind = module.rule
        elif isinstance(module, Attention):
            kind = module.plain.__name__
        elif not isinstance(module, Saver):
            name = join(prefix, str(node.target))
    return name, "batch norm" if _is_batch_norm(part, node) else kind


def _is_batch_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a batch norm, module or function, alone or with what follows it."""
    if node.op == "call_module":
        kinds = (nn.modules.batchnorm._BatchNorm, Norm, NormOf)
        return isinstance(gm.get_submodule(str(node.target)), kinds)
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)
