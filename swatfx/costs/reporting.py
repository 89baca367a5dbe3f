"""Per-layer cost reports: what SWAT saves, in MACs and in bytes kept for backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from passes.choose_kernels import kernels_on
from swatfx import macs
from swatfx.accelerators import Accelerator
from swatfx.accelerators.options import SimulationOptions
from swatfx.arguments import SHARE, as_inputs, checked, instance, optional
from swatfx.compiled import SwatModule, sparse_layers, unwrap
from swatfx.costs.measuring import Measured, measure
from swatfx.costs.records import PAPER, LayerRecord, OtherRecord, Report, fraction
from swatfx.costs.simulation import DESIGNS, simulate
from swatfx.errors import InputError

ACCOUNTINGS = (PAPER, "torch", "exact")
PAPER_TOPK_COST = (147.0, 470.0)  # ms, appendix table 4: ResNet-50, batch 32, RTX 2080 Ti


@checked(
    activation_floor=SHARE,
    accelerators=DESIGNS,
    simulation_options=optional(instance(SimulationOptions)),
)
def report(
    gm: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
    *,
    accounting: str = "paper",
    activation_floor: float = 0.0,
    topk_cost: str | tuple[float, float] | None = None,
    device: str | torch.device | None = None,
    accelerators: Sequence[Accelerator | str] = (),
    simulation_options: SimulationOptions | None = None,
) -> Report:
    """Count what a training step of `gm` costs, layer by layer.

    Args:
        gm: a compiled model; it is not changed, and neither are its buffers.
        example_inputs: positional inputs, or a dict by name. On the meta device nothing is
            computed and saved bytes are planned; real inputs are run through a copy and give
            realised densities.
        accounting: "paper" (appendix A.3, the tables' conventions), "torch" (as
            torch.utils.flop_counter counts), or "exact" (products that a kernel skipping every
            zero would form); see `swatfx.macs`.
        activation_floor: natural activation sparsity, in [0, 1), that a layer has at least.
        topk_cost: adds a line that weighs Top-K: (milliseconds of a dense training step, of one
            refresh of all layers), or "paper" for those of its table 4 (ResNet-50 on a GPU).
        device: tell the kernels that would run there, such as "cuda"; None: on the model's own
            device, or on this machine's CPU where the model is on meta.
        accelerators: designs to simulate the step on, such as `SCNN()` or "bit-tactical"; slow for
            large inputs, one sample of which is simulated.
        simulation_options: samples, where masks come from, memory.

    Raises:
        InputError: no inputs, inputs that do not fit (it names the layer), or unknown options.
    """
    root = unwrap(gm)
    costs = _topk_cost(topk_cost)
    kernels = None if device is None else kernels_on(root, known_device(device))
    if not isinstance(accounting, str) or accounting not in ACCOUNTINGS:
        raise InputError("accounting is 'torch', 'paper' or 'exact'", value=accounting)
    if example_inputs is None:
        raise InputError(
            "a report wants example inputs: MACs depend on shapes",
            remedy='pass e.g. (torch.empty(32, 3, 224, 224, device="meta"),); nothing is computed',
        )
    inputs = as_inputs(example_inputs)
    measured = measure(root, inputs, accounting)
    layers = tuple(_record(root, measured, kernels))
    totals = _totals(root, layers, measured, activation_floor, costs)
    simulated = None
    if isinstance(accelerators, (str, Accelerator)) or accelerators:
        simulated = simulate(root, inputs, accelerators, options=simulation_options)
    return Report(
        layers,
        totals,
        tuple(OtherRecord(*row, *kept) for row, kept in measured.other_saves.items()),
        dict(root.eager),
        root.swat.policy.name,
        accounting,
        root.swat.options.norm_saves,
        root.swat.options.value_dtype,
        simulated,
        root.swat.predicted,
    )


def known_device(device: str | torch.device) -> str:
    """The device by torch's name for it; it need not be on this machine.

    Raises:
        InputError: torch knows none of that name.
    """
    try:
        if not isinstance(device, (str, torch.device)):
            raise TypeError("a number would be a GPU's")
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError("unknown device", value=device, remedy="use cpu or cuda") from error
    return "cpu" if found.type == "meta" else str(found)


def _topk_cost(asked: Any) -> tuple[float, float] | None:
    if asked is None:
        return None
    if isinstance(asked, str) and asked == PAPER:
        return PAPER_TOPK_COST
    try:
        step, refresh = (float(x) for x in asked)
    except (TypeError, ValueError):
        step = refresh = math.nan
    if not (0 < step < math.inf and 0 <= refresh < math.inf):
        raise InputError(
            "topk_cost is milliseconds of a dense step and of one Top-K refresh",
            value=asked,
            remedy='write (147, 470), or "paper" for those of its table 4',
        )
    return step, refresh


def _record(
    gm: SwatModule, measured: Measured, kernels: Mapping[str, str] | None
) -> Iterator[LayerRecord]:
    sparse = {layer.plan.name: layer for layer in sparse_layers(gm)}
    for name, plan in measured.plans.items():
        layer = sparse.get(name)
        cost = measured.costs[name]
        realised = None
        if layer is not None and not layer.weight.is_meta:
            realised = float(layer.keep_now().double().mean().item())
        yield LayerRecord(
            name=name,
            kind=plan.kind,
            weight_shape=plan.weight_shape,
            weight_density=layer.weight_density.value if layer else 1.0,
            activation_density=measured.activation_densities.get(name, 1.0),
            realised_weight_density=realised,
            realised_activation_density=measured.realised.get(name),
            weight_selector=plan.weight_selector if plan.takes_part else "nchw",
            activation_selector=plan.rule.activation_selector if plan.takes_part else "nchw",
            parameters=measured.row_parameters.get(name, plan.parameters),
            skipped=plan.skipped or (None if cost.output_shape else "not called by these inputs"),
            kernels=plan.kernels if kernels is None else kernels.get(name, ""),
            **asdict(cost),
        )


def _totals(
    gm: SwatModule,
    layers: Sequence[LayerRecord],
    measured: Measured,
    floor: float,
    topk_cost: tuple[float, float] | None,
) -> dict[str, Any]:
    totals: dict[str, Any] = {
        key: sum(getattr(layer, key) for layer in layers)
        for key in (f.name for f in fields(LayerRecord))
        if key.endswith("_macs") or key == "parameters"
    }
    dense = sum(v for k, v in totals.items() if k.startswith("dense_"))
    sparse = sum(v for k, v in totals.items() if k.startswith("sparse_"))
    totals["training_mac_reduction"] = fraction(sparse, dense)
    totals["inference_mac_reduction"] = fraction(
        totals["inference_macs"], totals["dense_forward_macs"]
    )
    dropped, read = 0.0, 0
    for layer in layers:
        if not layer.kind.startswith("conv") or layer.kind.startswith("conv_transpose"):
            continue
        elements = measured.input_elements[layer.name]
        density = measured.counted_densities.get(layer.name, 1.0)
        dropped += elements * max(1 - density, floor)
        read += elements
    totals["conv_input_elements"], totals["norm_input_elements"] = read, measured.norm_elements
    totals["activation_floor"] = floor
    plans = measured.plans.values()
    totals["first_layer_counted"] = any(
        p.counted_activation_density is not None and not p.counted_activation_density.is_dense
        for p in plans
    )
    assumed = (p.rule.assumed_activation_density for p in plans if p.takes_part)
    totals["assumed_activation_density"] = next(filter(None, assumed), None)
    totals["activation_reduction"] = dropped / max(read + measured.norm_elements, 1)
    totals["activation_sparsity"] = dropped / max(read, 1)
    weights = sum(layer.parameters for layer in layers)
    active = sum(layer.parameters * layer.weight_density for layer in layers)
    totals["weight_sparsity"] = 1 - active / max(weights, 1)
    totals["dense_saved_bytes"] = measured.dense_saved_bytes
    totals["saved_bytes"] = measured.saved_bytes
    if topk_cost is not None:
        totals |= _topk_overhead(measured, totals["training_mac_reduction"], *topk_cost)
    return totals


def _topk_overhead(
    measured: Measured, reduction: float, step_ms: float, topk_ms: float
) -> dict[str, Any]:
    period = max(
        (plan.rule.period for plan in measured.plans.values() if plan.takes_part), default=1
    )
    speedup = macs.topk_speedup(reduction, period, step_ms, topk_ms)
    paper = (step_ms, topk_ms) == PAPER_TOPK_COST
    line = (
        f"Top-K every {period} iterations, dense step {step_ms:g} ms, one refresh {topk_ms:g} ms"
        f"{' (the paper, table 4: ResNet-50, batch 32, on its GPU)' if paper else ''}:"
        f" modelled speedup {speedup:.2f}x"
    )
    return {"topk_speedup": speedup, "topk_overhead": line}
