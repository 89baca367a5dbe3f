"""What a training step costs in one objective, and how much of it each layer's density moves.

Objectives: "macs" (the paper's accounting, of the batch), "saved_bytes" (kept for backward by the
whole graph, of the batch), "cycles:NAME" (simulated, of one sample, on an accelerator of
`swatfx.accelerators`, with its options: "cycles:bit-tactical:lookahead=4").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from swatfx import accelerators
from swatfx.accelerators.options import SimulationOptions
from swatfx.compiled import SwatModule, layer_nodes, private_copy, sparse_layers, unwrap
from swatfx.costs import measure, simulate
from swatfx.density import Density
from swatfx.errors import InputError, UnknownNameError
from swatfx.meta import LayerPlan
from swatfx.training import refresh

CYCLES = "cycles:"
_CURVED_KNOTS = 8  # densities at which cycles are simulated; between them they are interpolated

Densities = Mapping[str, tuple[Density, Density]]  # layer -> those of its weight and activation
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step in one objective.

    Attributes:
        objective: as it was asked for; it says what the unit is.
        weight: layer -> what its weight density scales (forward and input gradient).
        activation: layer -> what its activation density scales (weight gradient, saved input).
        rest: of what is no layer.
        dense: of the same step with every layer dense.
    """

    objective: str
    weight: Mapping[str, float]
    activation: Mapping[str, float]
    rest: float
    dense: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return sum(self.weight.values()) + sum(self.activation.values()) + self.rest

    @property
    def fraction(self) -> float:
        """Of the dense step: what `swatfx.tune` takes as its budget."""
        return self.total / self.dense


def check_objective(objective: str) -> None:
    """Raise UnknownNameError unless `objective` is one; accelerators complain by themselves."""
    if isinstance(objective, str) and objective.startswith(CYCLES):
        accelerators.parse(objective.removeprefix(CYCLES))
    elif objective not in ("macs", "saved_bytes"):
        names = [CYCLES + name for name in accelerators.ACCELERATORS]
        raise UnknownNameError("objective", str(objective), ["macs", "saved_bytes", *names])


def cost(
    gm: nn.Module,
    example_inputs: Sequence[Any] | Tensor,
    objective: str = "macs",
    *,
    simulation_options: SimulationOptions | None = None,
) -> StepCost:
    """What a training step of `gm` costs, as `swatfx.report` counts it.

    Args:
        gm: a compiled model; only the metadata of its nodes changes.
        example_inputs: positional inputs. On the meta device saved bytes are planned at the target
            densities and activations' masks are drawn; real inputs give those that they have.
        objective: "macs", "saved_bytes" or "cycles:NAME".
        simulation_options: for cycles, as in `swatfx.report`.

    Raises:
        UnknownNameError: no such objective or accelerator.
        InputError: inputs that do not fit.
    """
    check_objective(objective)
    root = unwrap(gm)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if objective.startswith(CYCLES):
        return _cycles(root, inputs, objective, simulation_options)
    measured = measure(root, inputs, "paper")
    if objective == "saved_bytes":
        kept = {name: float(c.sparse_saved_bytes) for name, c in measured.costs.items()}
        rest = measured.saved_bytes - sum(kept.values())
        return StepCost(objective, dict.fromkeys(kept, 0.0), kept, rest, measured.dense_saved_bytes)
    weight, activation, dense = {}, {}, 0
    for name, c in measured.costs.items():
        weight[name] = float(c.sparse_forward_macs + c.sparse_input_gradient_macs)
        activation[name] = float(c.sparse_weight_gradient_macs)
        dense += c.dense_forward_macs + c.dense_input_gradient_macs + c.dense_weight_gradient_macs
    return StepCost(objective, weight, activation, 0.0, float(dense))


def _cycles(
    gm: SwatModule, inputs: tuple[Any, ...], objective: str, options: SimulationOptions | None
) -> StepCost:
    found = simulate(gm, inputs, [objective.removeprefix(CYCLES)], options=options)
    weight: dict[str, float] = {}
    activation: dict[str, float] = {}
    for row in found.rows:
        of_activation = row.stage == "weight_gradient"
        into = activation if of_activation else weight
        into[row.layer] = into.get(row.layer, 0.0) + row.cycles
        (weight if of_activation else activation).setdefault(row.layer, 0.0)
    return StepCost(objective, weight, activation, 0.0, sum(r.own_dense_cycles for r in found.rows))


def with_densities(gm: SwatModule, densities: Densities) -> SwatModule:
    """A private copy of `gm` whose layers have other densities, in plans and thresholds."""
    twin = private_copy(gm)
    for node in layer_nodes(twin):
        if node.plan.name in densities:
            node.replan(**_seen(node.plan, densities[node.plan.name]))
    for layer in sparse_layers(twin):
        if layer.plan.name in densities:
            layer.weight_threshold.set_density(layer.plan.weight_density)
            for threshold in layer.activation_thresholds:
                threshold.set_density(layer.plan.activation_density)
    if not any(p.is_meta for p in twin.parameters()):
        refresh(twin)
    return twin


def _seen(plan: LayerPlan, densities: tuple[Density, Density]) -> dict[str, Density]:
    """Those of the densities of weight and activation that `plan` has use for, by field."""
    weight, activation = densities
    found = {"weight_density": weight} if plan.rule.sees_weight else {}
    return found | ({"activation_density": activation} if plan.rule.sees_activation else {})


def sharers(gm: SwatModule) -> dict[str, str]:
    """Layer -> first of the layers that store one packed activation together."""
    first: dict[fx.Node, str] = {}
    found: dict[str, str] = {}
    for layer in sparse_layers(gm):
        name, pack = layer.plan.name, layer.node.pack
        found[name] = name if pack is None else first.setdefault(pack, name)
    return found


@dataclass(frozen=True)
class CostCurves:
    """How a step's cost depends on the densities of some layers.

    Attributes:
        knots: densities, rising, at which costs were computed.
        weight: layer -> cost at each knot of its weight density.
        activation: layer -> cost at each knot of its activation density.
        fixed: of all that does not depend on these densities.
        dense: of the same step with every layer dense.
    """

    knots: tuple[float, ...]
    weight: Mapping[str, Floats]
    activation: Mapping[str, Floats]
    fixed: float
    dense: float

    def weight_cost(self, layer: str, density: float) -> float:
        """Of what the weight density of `layer` scales."""
        return _at(density, self.knots, self.weight.get(layer))

    def activation_cost(self, layer: str, density: float) -> float:
        """Of what the activation density of `layer` scales."""
        return _at(density, self.knots, self.activation.get(layer))


def _at(density: float, knots: Sequence[float], curve: Floats | None) -> float:
    return 0.0 if curve is None else float(np.interp(density, knots, curve))


def cost_curves(
    gm: SwatModule,
    moving: Mapping[str, tuple[bool, bool]],
    least: float,
    example_inputs: Sequence[Any],
    objective: str,
    options: SimulationOptions | None,
) -> CostCurves:
    """Costs at a few densities from `least` to 1, of all layers at once: they do not interact.

    MACs and saved bytes are straight lines in the density, cycles are not; simulated ones may fall
    with a rising density by chance, which the curves leave out.

    Args:
        gm: the compiled model.
        moving: layer -> whether its weight and its activation density are to be chosen.
        least: smallest density.
        example_inputs: as for `cost`.
        objective: likewise.
        options: of the simulation.
    """
    plans = {layer.plan.name: layer.plan for layer in sparse_layers(gm)}
    curved = objective.startswith(CYCLES) or any(plans[n].rule.forward_activation for n in moving)
    knots = [float(k) for k in np.geomspace(least, 1, _CURVED_KNOTS if curved else 2)]
    runs = []
    for knot in knots:
        now = Density(knot)
        densities = {
            name: (
                now if weight else plans[name].weight_density,
                now if activation else plans[name].activation_density,
            )
            for name, (weight, activation) in moving.items()
        }
        twin = with_densities(gm, densities)
        runs.append(cost(twin, example_inputs, objective, simulation_options=options))

    def curve(values: list[float]) -> Floats:
        return np.maximum.accumulate(np.asarray(values, dtype=np.float64))

    of_weights = [name for name, (weight, _) in moving.items() if weight]
    of_activations = [name for name, (_, activation) in moving.items() if activation]
    weight = {name: curve([run.weight.get(name, 0.0) for run in runs]) for name in of_weights}
    activation = {
        name: curve([run.activation.get(name, 0.0) for run in runs]) for name in of_activations
    }
    last = runs[-1]
    moved = sum(last.weight.get(name, 0.0) for name in of_weights)
    moved += sum(last.activation.get(name, 0.0) for name in of_activations)
    return CostCurves(tuple(knots), weight, activation, last.total - moved, last.dense)


def planned_inputs(gm: SwatModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """`inputs` on the meta device if the model runs there, where nothing is computed; else itself.

    On the meta device, costs do not depend on the values of a batch.
    """
    bare: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda x: x.detach().to("meta"), inputs)
    try:
        measure(gm, bare, "paper")
    except InputError:
        return inputs
    return bare
