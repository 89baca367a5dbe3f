"""Annotate each layer node with its MACs and saved bytes, from what observed runs saw.

Reads LayerPlans and the runs of `trace_shapes`; writes a LayerCost on every layer node. Changes no
node.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import fx

from passes.trace_shapes import Run, Seen, is_batch_norm
from swatfx import macs, meta
from swatfx.density import Density
from swatfx.graph_module import SwatModule, all_parts, join
from swatfx.layers import SparseLayer, sparse_layers
from swatfx.macs import Macs
from swatfx.meta import LayerCall, LayerCost, LayerPlan
from swatfx.saves import Bound, Saver


def annotate_cost(gm: SwatModule, sparse: Run, dense: Run, accounting: str) -> None:
    """Write LayerCosts.

    Args:
        gm: the compiled model.
        sparse: an observed run of the graph.
        dense: an observed run of the same graph with every layer dense.
        accounting: "paper" or "exact", see `swatfx.macs`.
    """
    layers = {layer.plan.name: layer for layer in sparse_layers(gm)}
    for prefix, part in all_parts(gm):
        for node in part.graph.nodes:
            plan = meta.read(node).plan
            if plan is None:
                continue
            calls = sparse.nodes.get((prefix, node.name), [])
            before = dense.nodes.get((prefix, node.name), [])
            cost = LayerCost(
                dense_saved_bytes=sum(seen.saved_bytes for seen in before),
                sparse_saved_bytes=sum(seen.saved_bytes for seen in calls),
            )
            for seen in calls:
                cost = _add(cost, node, plan, seen, layers.get(plan.name), accounting)
            meta.update(node, cost=cost)


def _add(
    cost: LayerCost,
    node: fx.Node,
    plan: LayerPlan,
    seen: Seen,
    layer: SparseLayer | None,
    accounting: str,
) -> LayerCost:
    call = meta.read(node).call
    if plan.kind.startswith("conv_transpose"):
        dense = sparse = macs.transposed_macs(plan.weight_shape, seen.input_shape)
    elif accounting == "exact" and call is not None:
        dense, sparse = _exact(plan, call, seen, layer)
    else:
        dense = macs.dense_macs(plan.weight_shape, seen.input_shape, seen.output_shape)
        sparse = _scaled(dense, plan, layer, plan.assumed_activation_density)
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


def other_saves(gm: SwatModule, sparse: Run, dense: Run) -> dict[tuple[str, str], tuple[int, int]]:
    """(name, kind) -> (dense, sparse) bytes kept by what is no layer, where there are any.

    A name is that of the module called, or of the node; kinds are "batch norm" (with the addition
    and the ReLU that may follow it), "relu", or what else a function or module is called.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for prefix, part in all_parts(gm):
        for node in part.graph.nodes:
            key = (prefix, node.name)
            kept = [sum(s.saved_bytes for s in run.nodes.get(key, [])) for run in (dense, sparse)]
            if meta.read(node).plan is not None or not any(kept):
                continue
            row = _name_and_kind(part, prefix, node)
            before = found.get(row, (0, 0))
            found[row] = (before[0] + kept[0], before[1] + kept[1])
    return found


def _name_and_kind(part: fx.GraphModule, prefix: str, node: fx.Node) -> tuple[str, str]:
    name, kind = join(prefix, node.name), getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        module = part.get_submodule(str(node.target))
        kind = type(module).__name__.lower()
        if isinstance(module, Bound):
            name = module.path
            kind = "dropout"
        elif not isinstance(module, Saver):
            name = join(prefix, str(node.target))
    return name, "batch norm" if is_batch_norm(part, node) else kind


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


def _inference(dense: int, forward: int, plan: LayerPlan, layer: SparseLayer | None) -> int:
    """MACs of the forward in evaluation: activations are dense there, zeroed weights are not."""
    if layer is None or plan.kind.startswith("conv_transpose"):
        return dense
    if plan.forward_weight and not plan.forward_activation:
        return forward
    sparse = plan.forward_weight or plan.zeroed
    return macs.scale(Macs(dense, 0, 0), layer.weight_density.value if sparse else 1, 1, 1).forward


def _scaled(
    dense: Macs, plan: LayerPlan, layer: SparseLayer | None, assumed: Density | None = None
) -> Macs:
    """Scaled by target densities; `assumed` is that of activations that are not sparsified."""
    if layer is None:
        return dense
    weight = layer.weight_density.value
    activation = activation_density(plan, layer)
    gradient = plan.gradient_density.value
    forward = weight if plan.forward_weight else 1.0
    forward *= activation if plan.forward_activation else 1.0
    backward = weight if plan.backward_weight else 1.0
    natural = 1.0 if assumed is None else assumed.value
    kept = activation if plan.backward_activation else natural
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
        weight = macs.exact_weight_macs(layer.keep().cpu(), taps, batch)
    else:
        weight = macs.scale(dense, layer.weight_density.value, 1, 1).forward
    gradient = plan.gradient_density.value
    forward = weight if plan.forward_weight else full
    if plan.forward_activation:
        forward = math.ceil(forward * activation_density(plan, layer) - 1e-6)
    backward = weight if plan.backward_weight else full
    kept = scaled.weight_gradient
    if seen.keep is not None:
        filters = plan.weight_shape[0] // (call.groups if kernel else 1)
        kept = macs.exact_activation_macs(seen.keep.cpu(), uses, filters)
        kept = math.ceil(kept * gradient - 1e-6)
    if plan.update == "active":  # of inactive weights, no gradient is formed
        kept = math.ceil(kept * weight / max(full, 1) - 1e-6)
    return dense, Macs(forward, math.ceil(backward * gradient - 1e-6) * wanted, kept)
