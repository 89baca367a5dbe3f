"""Annotate each layer node with its MACs and saved bytes, from what observed runs saw.

Reads LayerPlans and the runs of `trace_shapes`; writes a LayerCost on every layer node. Changes no
node.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch

from passes.annotate_products import add_costs, is_own, name_and_kind, product_cost
from passes.reading.products import Frame, Product
from passes.trace_shapes import Run, Seen
from swatfx import macs, meta
from swatfx.compiled import (
    LayerNode,
    SparseLayer,
    SwatModule,
    all_nodes,
    layer_nodes,
    sparse_layers,
)
from swatfx.macs import Macs
from swatfx.meta import LayerCall, LayerCost, LayerPlan


def annotate_cost(gm: SwatModule, sparse: Run, dense: Run, accounting: str) -> None:
    """Write LayerCosts.

    Args:
        gm: the compiled model.
        sparse: an observed run of the graph.
        dense: an observed run of the same graph with every layer dense.
        accounting: "paper", "torch" or "exact", see `swatfx.macs`.
    """
    layers = {layer.plan.name: layer for layer in sparse_layers(gm)}
    formed: dict[Frame, list[Product]] = {}
    for product in dense.products:
        formed.setdefault(product.frame, []).append(product)
    for node in layer_nodes(gm):
        plan, calls = node.plan, sparse.nodes.get(node.key, [])
        cost = LayerCost(
            dense_saved_bytes=sum(seen.saved_bytes for seen in dense.nodes.get(node.key, [])),
            sparse_saved_bytes=sum(seen.saved_bytes for seen in calls),
        )
        for seen in calls:
            cost = _add(cost, node, seen, layers.get(plan.name), accounting)
        if plan.name not in layers:
            products = formed.get(Frame(node.key), [])
            own = [product for product in products if is_own(node.part, node.node, product)]
            cost = _as_seen(cost, plan, calls, own, accounting)
        meta.update(node.node, cost=cost)


def _as_seen(
    cost: LayerCost, plan: LayerPlan, calls: list[Seen], own: list[Product], accounting: str
) -> LayerCost:
    """`cost`, or where a dense layer's own forward computes something else, what it does."""
    by_shapes = sum(_by_shapes(plan, seen).forward for seen in calls)
    if sum(product.macs for product in own) == by_shapes and plan.weight_shape:
        return cost
    seen = product_cost(own, accounting)
    return replace(
        seen,
        input_shape=cost.input_shape,
        output_shape=cost.output_shape,
        dense_saved_bytes=cost.dense_saved_bytes,
        sparse_saved_bytes=cost.sparse_saved_bytes,
    )


def _by_shapes(plan: LayerPlan, seen: Seen) -> Macs:
    if plan.kind.startswith("conv_transpose"):
        return macs.transposed_macs(plan.weight_shape, seen.input_shape)
    return macs.dense_macs(plan.weight_shape, seen.input_shape, seen.output_shape)


def _add(
    cost: LayerCost, node: LayerNode, seen: Seen, layer: SparseLayer | None, accounting: str
) -> LayerCost:
    plan, call = node.plan, node.record.call
    transposed = plan.kind.startswith("conv_transpose")
    if accounting == "exact" and call is not None and not transposed:
        dense, sparse = _exact(plan, call, seen, layer)
    else:
        dense, assumed = _by_shapes(plan, seen), plan.rule.assumed_activation_density
        if accounting == "torch":
            wanted = int(seen.input_requires_grad), int(seen.weight_requires_grad)
            dense = Macs(dense.forward, *(dense.forward * want for want in wanted))
            assumed = None
        sparse = dense if transposed else _scaled(dense, plan, layer, assumed)
    call_cost = LayerCost(
        input_shape=seen.input_shape,
        output_shape=seen.output_shape,
        dense_forward_macs=dense.forward,
        sparse_forward_macs=sparse.forward,
        dense_input_gradient_macs=dense.input_gradient,
        sparse_input_gradient_macs=sparse.input_gradient,
        dense_weight_gradient_macs=dense.weight_gradient,
        sparse_weight_gradient_macs=sparse.weight_gradient,
        inference_macs=_inference(dense.forward, sparse.forward, plan, layer),
    )
    return add_costs(cost, call_cost)


def other_saves(
    gm: SwatModule, sparse: Run, dense: Run, counted: Collection[Frame]
) -> dict[tuple[str, str], tuple[int, int]]:
    """(name, kind) -> (dense, sparse) bytes kept by what is no layer, where there are any.

    A name is that of the module called, or of the node; for kinds see `name_and_kind`. What is in
    `counted` has a row among the layers.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for place in all_nodes(gm):
        frame = Frame(place.key)
        if place.record.plan is None and frame not in counted:
            name = name_and_kind(place.part, place.prefix, place.node)
            _add_saves(found, name, saved_by(frame, sparse, dense))
    for frame in dict.fromkeys((*sparse.modules, *dense.modules)):
        if frame not in counted:
            kind = frame.kind or "eager code"
            _add_saves(found, (frame.path, kind), saved_by(frame, sparse, dense))
    return found


def saved_by(frame: Frame, sparse: Run, dense: Run) -> tuple[int, int]:
    """(dense, sparse) bytes kept on account of a node or a module of eager code."""
    of = [
        run.nodes.get(frame.node, []) if frame.node else run.modules.get(frame, [])
        for run in (dense, sparse)
    ]
    before, now = (sum(seen.saved_bytes for seen in calls) for calls in of)
    return before, now


def _add_saves(
    found: dict[tuple[str, str], tuple[int, int]], row: tuple[str, str], kept: tuple[int, int]
) -> None:
    if any(kept):
        before = found.get(row, (0, 0))
        found[row] = (before[0] + kept[0], before[1] + kept[1])


def _inference(dense: int, forward: int, plan: LayerPlan, layer: SparseLayer | None) -> int:
    """MACs of the forward in evaluation: activations are dense there, zeroed weights are not."""
    if layer is None or plan.kind.startswith("conv_transpose"):
        return dense
    if plan.rule.forward_weight and not plan.rule.forward_activation:
        return forward
    sparse = plan.rule.forward_weight or plan.rule.zeroes_inactive
    return macs.scale(Macs(dense, 0, 0), layer.weight_density.value if sparse else 1, 1, 1).forward


def _scaled(
    dense: Macs, plan: LayerPlan, layer: SparseLayer | None, assumed: float | None = None
) -> Macs:
    """Scaled by target densities; `assumed` is that of activations that are not sparsified."""
    if layer is None:
        return dense
    weight = layer.weight_density.value
    activation = activation_density(plan, layer)
    gradient = plan.gradient_density.value
    forward = weight if plan.rule.forward_weight else 1.0
    forward *= activation if plan.rule.forward_activation else 1.0
    backward = weight if plan.rule.backward_weight else 1.0
    natural = 1.0 if assumed is None else assumed
    kept = activation if plan.rule.backward_activation else natural
    return macs.scale(dense, forward, backward * gradient, kept * gradient)


def activation_density(plan: LayerPlan, layer: SparseLayer) -> float:
    """The activation density as it is now: SWAT-M moves it with the weight's."""
    thresholds = layer.activation_thresholds
    if thresholds:
        return float(thresholds[0].density.item())
    return plan.activation_density.value


def _exact(
    plan: LayerPlan, call: LayerCall, seen: Seen, layer: SparseLayer | None
) -> tuple[Macs, Macs]:
    """(dense, sparse) products that are really formed; masks are the real ones where known."""
    kernel = plan.weight_shape[2:]
    batched = len(seen.input_shape) == len(plan.weight_shape)
    if kernel:
        batch = seen.input_shape[0] if batched else 1
        sizes = (seen.input_shape[-len(kernel) :], seen.output_shape[-len(kernel) :])
        taps = macs.tap_counts(kernel, *sizes, call)
        uses = macs.use_counts(kernel, *sizes, call)
    else:
        batch, taps, uses = math.prod(seen.input_shape[:-1]), [], []
    ones = torch.ones(plan.weight_shape, dtype=torch.bool)
    full = macs.exact_weight_macs(ones, taps, batch)
    wanted = int(seen.input_requires_grad)
    dense = Macs(full, full * wanted, full)
    if layer is None:
        return dense, dense
    scaled = _scaled(dense, plan, layer)
    weight = full
    if not layer.weight.is_meta:
        weight = macs.exact_weight_macs(layer.keep_now().cpu(), taps, batch)
    else:
        weight = macs.scale(dense, layer.weight_density.value, 1, 1).forward
    gradient = plan.gradient_density.value
    forward = weight if plan.rule.forward_weight else full
    if plan.rule.forward_activation:
        forward = math.ceil(forward * activation_density(plan, layer) - 1e-6)
    backward = weight if plan.rule.backward_weight else full
    kept = scaled.weight_gradient
    if seen.keep is not None:
        filters = plan.weight_shape[0] // (call.groups if kernel else 1)
        kept = macs.exact_activation_macs(seen.keep.cpu(), uses, filters)
        kept = math.ceil(kept * gradient - 1e-6)
    if plan.rule.update == "active":  # of inactive weights, no gradient is formed
        kept = math.ceil(kept * weight / max(full, 1) - 1e-6)
    return dense, Macs(forward, math.ceil(backward * gradient - 1e-6) * wanted, kept)
