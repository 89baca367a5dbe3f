"""What a training step of a compiled model costs: observed runs, collected by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from passes.annotate_cost import activation_density, annotate_cost, other_saves, saved_by
from passes.annotate_cycles import annotate_cycles
from passes.annotate_products import ProductRow, add_costs, product_rows
from passes.reading.products import Frame
from passes.trace_shapes import Run, Seen, observe_run
from swatfx.accelerators import Accelerator
from swatfx.accelerators.options import SimulationOptions
from swatfx.compiled import SparseLayer, SwatModule, all_nodes, sparse_layers
from swatfx.meta import LayerCost, LayerPlan, NodeRecord


@dataclass(frozen=True)
class Measured:
    """What observed runs of a compiled model say, by layer name.

    Attributes:
        other_saves: (name, kind) -> bytes that what is no layer keeps, dense and now. With the
            layers' own they add up to the two below.
        saved_bytes: distinct storages kept for backward by the whole graph.
        dense_saved_bytes: likewise with every layer dense.
        norm_elements: elements of all batch-norm inputs, eager code's too.
        plans: every layer's plan, and one for each row of products that are no layer's.
        costs: MACs and bytes, summed over a layer's calls.
        activation_densities: target, as it is now.
        counted_densities: target as the accounting takes it.
        realised: stored fraction of the input, where a real batch was run.
        input_elements: elements of the layer's inputs, all calls.
        row_parameters: of a row of products, the weights that no layer has on its account.
    """

    other_saves: dict[tuple[str, str], tuple[int, int]]
    saved_bytes: int
    dense_saved_bytes: int
    norm_elements: int
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    costs: dict[str, LayerCost] = field(default_factory=dict)
    activation_densities: dict[str, float] = field(default_factory=dict)
    counted_densities: dict[str, float] = field(default_factory=dict)
    realised: dict[str, float] = field(default_factory=dict)
    input_elements: dict[str, int] = field(default_factory=dict)
    row_parameters: dict[str, int] = field(default_factory=dict)


def measure(gm: SwatModule, example_inputs: Any, accounting: str) -> Measured:
    """Run `gm` on example inputs, annotate its layers with costs, and collect them.

    Nothing of `gm` changes but the metadata of its nodes.
    """
    sparse = observe_run(gm, example_inputs, as_dense=False)
    dense = observe_run(gm, example_inputs, as_dense=True, products=True)
    annotate_cost(gm, sparse, dense, accounting)
    rows = product_rows(gm, dense, accounting)
    others = other_saves(gm, sparse, dense, {frame for row in rows for frame in row.frames})
    layers = {layer.plan.name: layer for layer in sparse_layers(gm)}
    result = Measured(
        other_saves=others,
        saved_bytes=sparse.saved_bytes,
        dense_saved_bytes=dense.saved_bytes,
        norm_elements=dense.norm_elements,
    )
    waiting, told = list(rows), set[Frame]()
    for place in all_nodes(gm):
        for row in [r for r in waiting if r.first.node == place.key]:
            waiting.remove(row)
            _add_row(result, row, _row_saves(row, sparse, dense, told))
        record = place.record
        if record.plan is not None:
            seen = sparse.nodes.get(place.key, [])
            _add_layer(result, record, seen, layers.get(record.plan.name))
    for row in waiting:
        _add_row(result, row, _row_saves(row, sparse, dense, told))
    for name, plan in gm.unreached.items():
        result.plans.setdefault(name, plan)
        result.costs.setdefault(name, LayerCost())
        result.input_elements.setdefault(name, 0)
    return result


def _add_layer(
    result: Measured, record: NodeRecord, calls: list[Seen], layer: SparseLayer | None
) -> None:
    plan = record.plan
    assert plan is not None
    name = plan.name
    result.plans.setdefault(name, plan)
    result.costs[name] = add_costs(result.costs.get(name), record.cost or LayerCost())
    elements = sum(math.prod(s.input_shape) for s in calls)
    result.input_elements[name] = result.input_elements.get(name, 0) + elements
    if layer is not None:
        density = activation_density(plan, layer)
        result.activation_densities[name] = result.counted_densities[name] = density
    elif plan.counted_activation_density is not None:
        result.counted_densities[name] = plan.counted_activation_density.value
    masks = [s.keep for s in calls if s.keep is not None]
    if masks:
        stored = sum(int(mask.sum().item()) for mask in masks)
        result.realised[name] = stored / max(sum(m.numel() for m in masks), 1)


def _row_saves(row: ProductRow, sparse: Run, dense: Run, told: set[Frame]) -> tuple[int, int]:
    """(dense, sparse) bytes kept by the row's nodes and modules that no row before it has told."""
    fresh = [frame for frame in row.frames if frame not in told]
    told.update(fresh)
    kept = [saved_by(frame, sparse, dense) for frame in fresh]
    return sum(k[0] for k in kept), sum(k[1] for k in kept)


def _add_row(result: Measured, row: ProductRow, kept: tuple[int, int]) -> None:
    name = row.plan.name
    result.plans[name] = row.plan
    result.costs[name] = replace(row.cost, dense_saved_bytes=kept[0], sparse_saved_bytes=kept[1])
    result.input_elements[name] = row.input_elements
    result.row_parameters[name] = row.parameters


def simulate_cycles(
    gm: SwatModule,
    example_inputs: Any,
    accelerators: Mapping[str, Accelerator],
    options: SimulationOptions,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Run `gm` once on example inputs and annotate its layers with simulated cycles.

    Nothing of `gm` changes but the metadata of its nodes.
    """
    observed = observe_run(gm, example_inputs, as_dense=False, masks=True)
    annotate_cycles(gm, observed, accelerators, options, tick)
