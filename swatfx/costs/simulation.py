"""Simulated accelerators on a compiled model: cycles of each layer, pass and design.

Cycles are counted, never measured. They are of one sample, or a mean over samples with its standard
error where several were simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev
from typing import Any

from torch import Tensor, nn

from swatfx import accelerators as designs
from swatfx.accelerators import Accelerator
from swatfx.accelerators.options import SimulationOptions
from swatfx.arguments import as_inputs, checked, instance, optional
from swatfx.compiled import layer_nodes, unwrap
from swatfx.costs.measuring import simulate_cycles
from swatfx.errors import InputError
from swatfx.tables import Shown, Table

DESIGNS = instance(Accelerator, str, list, tuple)
PASSES = ("forward", "input_gradient", "weight_gradient")


@dataclass(frozen=True)
class LayerCycles:
    """One layer in one pass on one accelerator, for one sample.

    Attributes:
        layer: its name.
        accelerator: name of the design.
        stage: "forward", "input_gradient" or "weight_gradient".
        cycles: with the masks; the larger of arithmetic and memory.
        standard_error: of `cycles` over samples; 0 for one sample.
        dense_cycles: of the dense tile.
        own_dense_cycles: of the same design on all-ones masks.
        full_slot_cycles: of a dense run with every slot full.
        utilisation: multiplications / (cycles * multipliers).
        memory_cycles: that the transfers take; 0 where memory is ignored.
        moved_bytes: as this design moves them, compressed or not.
        dense_bytes: likewise, nothing compressed; the sum of the three below.
        weight_bytes: of the weights (of the output gradient, for the weight gradient).
        activation_bytes: of the activation (of the output gradient, for the input gradient).
        output_bytes: of the result.
        compressed_weight_bytes: nonzeros and a bitmask.
        compressed_activation_bytes: likewise.
        limits: cycles lost, by cause; causes may overlap.
        note: what the design could not do here.
        masks: where the masks come from.
    """

    layer: str
    accelerator: str
    stage: str
    cycles: float
    standard_error: float
    dense_cycles: float
    own_dense_cycles: float
    full_slot_cycles: float
    utilisation: float
    memory_cycles: float
    moved_bytes: float
    dense_bytes: float
    weight_bytes: float
    activation_bytes: float
    output_bytes: float
    compressed_weight_bytes: float
    compressed_activation_bytes: float
    limits: Mapping[str, float]
    note: str
    masks: str

    @property
    def limit(self) -> str:
        """The cause that costs most cycles, or nothing."""
        worst = max(self.limits, key=lambda cause: self.limits[cause], default="")
        return worst if worst and self.limits[worst] else ""


@dataclass(frozen=True)
class Simulation(Shown):
    """Cycles of every layer, and their sums.

    Attributes:
        rows: a record a layer, pass and accelerator.
        totals: accelerator -> "forward", "input_gradient", "weight_gradient", "step" -> sums.
        skipped: layer -> why no design could run it.
        samples: how many samples were simulated.
    """

    rows: tuple[LayerCycles, ...]
    totals: Mapping[str, Mapping[str, Mapping[str, float]]]
    skipped: Mapping[str, str]
    samples: int

    def data(self) -> dict[str, Any]:
        """By the attributes' names."""
        return asdict(self)

    def records(self) -> Table:
        """A row a record, all fields; of the causes of lost cycles, the worst."""
        named = {f.name: [getattr(row, f.name) for row in self.rows] for f in fields(LayerCycles)}
        return Table.of(named | {"limits": [row.limit for row in self.rows]})

    def blocks(self) -> list[Table | str]:
        """A table of layers and totals for each design."""
        masks = "; ".join(dict.fromkeys(row.masks for row in self.rows))
        return [
            *(self._table(name) for name in dict.fromkeys(row.accelerator for row in self.rows)),
            f"simulated cycles of one sample, mean of {self.samples}; masks: {masks}",
            *(f"not simulated: {name}: {why}" for name, why in self.skipped.items()),
        ]

    def _table(self, name: str) -> Table:
        heads = (
            "layer",
            "pass",
            "cycles",
            "x tile",
            "x own dense",
            "utilisation",
            "bytes moved",
            "limited by",
        )
        rows = [
            (
                row.layer,
                row.stage.replace("_", " "),
                _count(row.cycles, row.standard_error),
                _times(row.dense_cycles, row.cycles),
                _times(row.own_dense_cycles, row.cycles),
                f"{100 * row.utilisation:.1f}%",
                f"{row.moved_bytes:,.0f}",
                row.note or row.limit,
            )
            for row in self.rows
            if row.accelerator == name
        ]
        rows += [
            (
                "all layers",
                stage.replace("_", " "),
                _count(sums["cycles"], sums["standard_error"]),
                _times(sums["dense_cycles"], sums["cycles"]),
                _times(sums["own_dense_cycles"], sums["cycles"]),
                f"{100 * sums['utilisation']:.1f}%",
                f"{sums['moved_bytes']:,.0f}",
                "",
            )
            for stage, sums in self.totals[name].items()
        ]
        return Table(heads, tuple(rows), name)


@checked(accelerators=DESIGNS, options=optional(instance(SimulationOptions)))
def simulate(
    gm: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    accelerators: Sequence[Accelerator | str],
    *,
    options: SimulationOptions | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Simulation:
    """Simulate a training step of `gm`, layer by layer, on each of `accelerators`.

    Args:
        gm: a compiled model; only the metadata of its nodes changes.
        example_inputs: positional inputs, or a dict by name. A real batch gives the activations'
            masks; on the meta device they are drawn.
        accelerators: models, or strings such as "bit-tactical:lookahead=4".
        options: samples, where masks come from, memory.
        tick: called after each layer and accelerator.

    Raises:
        InputError: no accelerator, or a layer that a model cannot take; names the layer.
    """
    root = unwrap(gm)
    chosen = SimulationOptions() if options is None else options
    named = _named(accelerators)
    inputs = as_inputs(example_inputs)
    simulate_cycles(root, inputs, named, chosen, tick)
    rows, skipped, samples = [], {}, 1
    for node in layer_nodes(root):
        layer, cycles = node.plan.name, node.record.cycles
        if "skipped" in cycles:
            skipped[layer] = cycles["skipped"]
        for name in named:
            for stage, found in cycles.get(name, {}).items():
                samples = max(samples, len(found["cycles"]))
                rows.append(_row(layer, name, stage, found, cycles["masks"]))
    totals = {name: dict(_totals(rows, name)) for name in named}
    return Simulation(tuple(rows), totals, skipped, samples)


def _named(accelerators: Sequence[Accelerator | str]) -> dict[str, Accelerator]:
    asked = [accelerators] if isinstance(accelerators, (str, Accelerator)) else accelerators
    result: dict[str, Accelerator] = {}
    for one in asked:
        if not isinstance(one, (str, Accelerator)):
            raise InputError("an accelerator is a design or its name", value=repr(one)[:60])
        result[one if isinstance(one, str) else repr(one)] = (
            designs.parse(one) if isinstance(one, str) else one
        )
    if not result:
        raise InputError("no accelerator to simulate", remedy="name one, e.g. scnn")
    return result


def _row(layer: str, name: str, stage: str, found: Mapping[str, Any], masks: str) -> LayerCycles:
    cycles: list[int] = found["cycles"]
    n = len(cycles)
    busy = sum(cycles) * found["multipliers"]
    sizes = {key: found[key] / n for key in _BYTES}
    return LayerCycles(
        layer=layer,
        accelerator=name,
        stage=stage,
        cycles=mean(cycles),
        standard_error=stdev(cycles) / math.sqrt(n) if n > 1 else 0.0,
        dense_cycles=found["dense_cycles"] / n,
        own_dense_cycles=found["own_dense_cycles"] / n,
        full_slot_cycles=found["full_slot_cycles"] / n,
        utilisation=found["multiplications"] / busy if busy else 0.0,
        memory_cycles=found["memory_cycles"] / n,
        moved_bytes=found["moved_bytes"] / n,
        dense_bytes=sizes["weight_bytes"] + sizes["activation_bytes"] + sizes["output_bytes"],
        **sizes,
        limits={cause: lost / n for cause, lost in found["limits"].items()},
        note=found["note"],
        masks=masks,
    )


_BYTES = (
    "weight_bytes",
    "activation_bytes",
    "output_bytes",
    "compressed_weight_bytes",
    "compressed_activation_bytes",
)
_SUMS = ("cycles", "dense_cycles", "own_dense_cycles", "full_slot_cycles", "memory_cycles")


def _totals(rows: Sequence[LayerCycles], name: str) -> Iterator[tuple[str, dict[str, float]]]:
    for stage in (*PASSES, "step"):
        mine = [r for r in rows if r.accelerator == name and stage in (r.stage, "step")]
        if not mine:
            continue
        sums: dict[str, float] = {key: sum(getattr(r, key) for r in mine) for key in _SUMS}
        sums["moved_bytes"] = sum(r.moved_bytes for r in mine)
        sums["dense_bytes"] = sum(r.dense_bytes for r in mine)
        sums["standard_error"] = math.sqrt(sum(r.standard_error**2 for r in mine))
        useful = sum(r.utilisation * r.cycles for r in mine)
        sums["utilisation"] = useful / sums["cycles"] if sums["cycles"] else 0.0
        yield stage, sums


def _count(cycles: float, error: float) -> str:
    return f"{cycles:,.0f}" + (f" +- {error:,.0f}" if error else "")


def _times(base: float, cycles: float) -> str:
    return f"{base / cycles:.2f}" if cycles else "-"
