"""Per-layer cost reports: what SWAT saves, in MACs and in bytes kept for backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
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
from swatfx.costs.simulation import DESIGNS, Simulation, simulate
from swatfx.errors import InputError
from swatfx.ops.norm import EXACT
from swatfx.tables import Shown, Table

PAPER = "paper"
ACCOUNTINGS = (PAPER, "torch", "exact")
PAPER_TOPK_COST = (147.0, 470.0)  # ms, appendix table 4: ResNet-50, batch 32, RTX 2080 Ti


@dataclass(frozen=True)
class LayerRecord:
    """One layer's row; MACs and bytes are summed over its calls.

    `skipped` says why it is dense, `kernels` which ones a layer that is not runs: as in LayerPlan.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_density: float
    activation_density: float
    realised_weight_density: float | None
    realised_activation_density: float | None
    weight_selector: str
    activation_selector: str
    parameters: int
    dense_forward_macs: int
    sparse_forward_macs: int
    dense_input_gradient_macs: int
    sparse_input_gradient_macs: int
    dense_weight_gradient_macs: int
    sparse_weight_gradient_macs: int
    inference_macs: int
    dense_saved_bytes: int
    sparse_saved_bytes: int
    skipped: str | None
    kernels: str


@dataclass(frozen=True)
class OtherRecord:
    """Bytes kept for backward by what is no layer: a norm, a ReLU, a pool, a module left to eager.

    A norm's are those of the addition and the ReLU behind it as well, where they are one.
    """

    name: str
    kind: str
    dense_saved_bytes: int
    sparse_saved_bytes: int


@dataclass(frozen=True)
class Report(Shown):
    """Layers, totals, and what was left to eager Python.

    Saved bytes are those of the distinct storages that autograd keeps, parameters and buffers
    excluded: what `torch.autograd.graph.saved_tensors_hooks` see in a training forward. A storage
    that several keep is on the account of the first layer among them, or else of the first; the
    records of `layers` and `others` add up to the totals.

    Attributes:
        layers: one record a layer, in graph order.
        totals: fractions of 1, MACs, bytes, and the Top-K overhead line where it was asked for.
        others: what else keeps bytes, in graph order.
        norm_saves: what batch norms keep, as given to `compile`.
        value_dtype: what packed values are stored as, likewise.
        eager: path -> why symbolic tracing left the module there to Python.
        policy: the policy's name.
        accounting: "paper", "torch" or "exact".
        simulation: simulated cycles, where accelerators were asked for.
    """

    layers: tuple[LayerRecord, ...]
    totals: Mapping[str, Any]
    others: tuple[OtherRecord, ...] = ()
    eager: Mapping[str, str] = field(default_factory=dict)
    policy: str = ""
    accounting: str = "paper"
    norm_saves: str = "exact"
    value_dtype: str | None = None
    simulation: Simulation | None = None

    def data(self) -> dict[str, Any]:
        """By the attributes' names."""
        return asdict(self)

    def records(self) -> Table:
        """A row a layer, all fields, shapes as 64x3x7x7."""
        names = [f.name for f in fields(LayerRecord)]
        return Table.of({n: [_cell(getattr(row, n)) for row in self.layers] for n in names})

    def blocks(self) -> list[Table | str]:
        """Layers, totals, other ops, what is eager, and the simulation."""
        columns: dict[str, list[str]] = {
            "layer": [layer.name for layer in self.layers],
            "weight": [_cell(layer.weight_shape) for layer in self.layers],
            "input": [_cell(layer.input_shape) for layer in self.layers],
            "weight %": [_percent(layer.weight_density) for layer in self.layers],
            "act %": [_percent(layer.activation_density) for layer in self.layers],
            "act % seen": [_percent(layer.realised_activation_density) for layer in self.layers],
            "MACs": [_engineering(_dense(layer)) for layer in self.layers],
            "MACs -%": [_reduction(_sparse(layer), _dense(layer)) for layer in self.layers],
            "bytes kept": [_engineering(layer.dense_saved_bytes) for layer in self.layers],
            "sparse": [_engineering(layer.sparse_saved_bytes) for layer in self.layers],
            "dense because": [layer.skipped or "" for layer in self.layers],
            "kernels": [layer.kernels for layer in self.layers],
        }
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        return [
            Table.of(shown),
            *_summary(self),
            *([self._others()] if self.others else []),
            *(f"eager: {path or 'the root module'}: {why}" for path, why in self.eager.items()),
            *(() if self.simulation is None else self.simulation.blocks()),
        ]

    def _others(self) -> Table:
        kinds: dict[str, list[OtherRecord]] = {}
        for record in self.others:
            kinds.setdefault(record.kind, []).append(record)
        rows = [
            (
                kind,
                len(records),
                _engineering(sum(r.dense_saved_bytes for r in records)),
                _engineering(sum(r.sparse_saved_bytes for r in records)),
            )
            for kind, records in kinds.items()
        ]
        return Table(("other ops", "count", "bytes kept", "sparse"), tuple(rows))


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
    totals["training_mac_reduction"] = _fraction(sparse, dense)
    totals["inference_mac_reduction"] = _fraction(
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


def _summary(result: Report) -> list[str]:
    t = result.totals
    options = f", norms keep {result.norm_saves}" if result.norm_saves != EXACT else ""
    if result.value_dtype is not None:
        options += f", packed values are {result.value_dtype}"
    return [
        f"policy {result.policy}, {result.accounting} accounting{options}",
        f"training MACs    -{t['training_mac_reduction']:.1%}",
        f"inference MACs   -{t['inference_mac_reduction']:.1%}",
        *_activation_lines(t),
        *_assumption(result),
        _kept_line(t),
        *([t["topk_overhead"]] if "topk_overhead" in t else []),
    ]


def _activation_lines(t: Mapping[str, Any]) -> list[str]:
    """The paper's measure of activations, which says nothing of bytes, told as that."""
    weights = f"weight sparsity   {t['weight_sparsity']:.1%}"
    if not t["conv_input_elements"]:
        norms = "norms alone" if t["norm_input_elements"] else "none here"
        return [
            f"activations      not counted: the paper counts conv and BN inputs, {norms}",
            weights,
        ]
    floor = t["activation_floor"]
    natural = f"; {floor:.0%} natural zeros assumed, stored all the same" if floor else ""
    whole = t["first_layer_counted"]
    first = "; the first layer's, which is kept whole, as the paper counts it" if whole else ""
    return [
        f"activations      -{t['activation_reduction']:.1%} of the elements of conv and BN inputs"
        f" (the paper's count; bytes are told below{natural})",
        weights,
        f"activation sparsity {t['activation_sparsity']:.1%} (conv inputs{first})",
    ]


def _assumption(result: Report) -> list[str]:
    """What the paper's accounting takes of activations that no method sparsifies."""
    assumed = result.totals["assumed_activation_density"]
    if result.accounting != "paper" or assumed is None:
        return []
    return [
        f"weight gradients of {result.policy} are counted with {1 - assumed:.0%} of the activations"
        " zero, as the paper's tables do; none are dropped"
    ]


def _kept_line(t: Mapping[str, Any]) -> str:
    """Bytes that training really keeps, and where they do not follow the elements, why."""
    saved, dense = t["saved_bytes"], t["dense_saved_bytes"]
    change = f"{saved / dense - 1:+.1%}" if dense else "nothing is trained"
    line = (
        f"kept for backward by the whole graph: {_engineering(saved)}B,"
        f" dense {_engineering(dense)}B ({change}), parameters not counted"
    )
    if saved > dense and t["activation_reduction"] > 0:
        line += (
            "; more than dense although activations are dropped: a bit an element and the kept"
            " values cost more here than they replace, or other ops keep the same tensors whole"
        )
    elif saved == dense and t["activation_reduction"] > 0 and dense:
        line += "; as much as dense: what is counted as dropped is kept all the same"
    return line


def _dense(layer: LayerRecord) -> int:
    return (
        layer.dense_forward_macs
        + layer.dense_input_gradient_macs
        + layer.dense_weight_gradient_macs
    )


def _sparse(layer: LayerRecord) -> int:
    return (
        layer.sparse_forward_macs
        + layer.sparse_input_gradient_macs
        + layer.sparse_weight_gradient_macs
    )


def _fraction(sparse: int, dense: int) -> float:
    return 1 - sparse / dense if dense else 0.0


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return "" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _reduction(sparse: int, dense: int) -> str:
    return f"{100 * _fraction(sparse, dense):.1f}"


def _engineering(value: float) -> str:
    if value < 1000:
        return f"{value:.0f}"
    power = min(int(math.log10(value)) // 3, 5)
    return f"{value / 1000**power:.3g}{' kMGTP'[power]}"
