"""`swatfx.tune`: per-layer densities that lose least within a budget.

The paper compares two ways to share out a budget, uniform and Erdos-Renyi-kernel (section 3.3.2),
which look at shapes alone. Here a few batches say how much each layer loses as it keeps less
(`swatfx.tuning.sensitivity`), the objective says what it costs to keep more
(`swatfx.tuning.costs`), and a knapsack weighs one against the other.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from swatfx import selectors
from swatfx.accelerators.options import SimulationOptions
from swatfx.arguments import BATCHES, COUNT, FLAG, FUNCTION, checked, instance, optional
from swatfx.compiled import SwatModule, sparse_layers, unwrap
from swatfx.density import Density
from swatfx.errors import InputError, PolicyError
from swatfx.meta import LayerPlan
from swatfx.policy import Policy, per_layer
from swatfx.tuning.costs import (
    CostCurves,
    StepCost,
    check_objective,
    cost,
    cost_curves,
    planned_inputs,
    sharers,
    with_densities,
)
from swatfx.tuning.knapsack import choose
from swatfx.tuning.sensitivity import LossFunction, Sensitivity, batches_of, sensitivity

__all__ = ["StepCost", "cost", "densities_of", "tune"]

LEVELS = 64  # densities that are tried, from the smallest to 1
LEAST_DENSITY = 0.002
WEIGHTS_A_FILTER = 2  # that a layer keeps at least, on average
_ATTEMPTS = 20


@dataclass(frozen=True)
class _Item:
    """Densities that are chosen as one.

    Attributes:
        layers: whose densities they are; several where they store one packed activation together.
        weight: they are weight densities.
        activation: they are activation densities.
        levels: indices into the grid of the densities that may be chosen.
    """

    layers: tuple[str, ...]
    weight: bool
    activation: bool
    levels: range


@checked(
    data=BATCHES,
    loss_fn=optional(FUNCTION),
    batches=COUNT,
    separate=FLAG,
    simulation_options=optional(instance(SimulationOptions)),
    quiet=FLAG,
)
def tune(
    gm: nn.Module,
    data: Iterable[Any],
    objective: str = "macs",
    *,
    budget: float | StepCost | nn.Module,
    loss_fn: LossFunction | None = None,
    batches: int = 8,
    separate: bool = False,
    simulation_options: SimulationOptions | None = None,
    quiet: bool = False,
) -> Policy:
    """Find the densities that lose least while a training step costs no more than `budget`.

    What takes part, how, and when is as in the policy of `gm`; its densities alone are replaced.
    The estimate is made at the weights that `gm` has: train the model densely for an epoch or so
    before `swatfx.compile`, then train what `tune` returns from scratch, or go on from there.

    Args:
        gm: a compiled model; neither it, nor its gradients, nor the random state change.
        data: batches (inputs, labels), inputs being a tensor or a tuple of positional ones; or
            tensors of inputs, where `loss_fn` wants no labels.
        objective: what the budget counts: "macs" (the paper's accounting), "saved_bytes" (kept for
            backward by the whole graph), "cycles:NAME" (simulated, on an accelerator).
        budget: fraction of what a dense step costs in this objective, in (0, 1]; or what shall not
            be exceeded: the `cost` of a policy, or a model compiled with it.
        loss_fn: (output, labels) -> scalar, or output -> scalar for batches without labels; cross
            entropy if None.
        batches: how many are used.
        separate: let the activation density of a layer differ from its weight density. Otherwise
            they are equal (section 3.3.2) or, where the policy sets `activation_sparsity`, that
            stays.
        simulation_options: for cycles, as in `swatfx.report`.
        quiet: show no progress bar (nor is there one when stderr is not a terminal).

    Returns:
        A per-layer policy, one rule a layer that takes part, to compile the model with.

    Raises:
        InputError: a budget that cannot be reached (it says what can), no data, a batch that does
            not fit.
        PolicyError: densities of the policy move by themselves, or none can be chosen.
        UnknownNameError: no such objective.
        SwatError: a loss is not finite.
    """
    check_objective(objective)
    root = unwrap(gm)
    policy = root.swat.policy
    plans = {layer.plan.name: layer.plan for layer in sparse_layers(root)}
    _check_policy(plans)
    seen = batches_of(data, batches)
    inputs = planned_inputs(root, seen[0][0])
    fraction = _fraction(budget, inputs, objective, simulation_options)
    grid = _grid()
    items = _items(root, policy, plans, objective, separate, grid)
    curves = cost_curves(root, _moving(items), grid[0], inputs, objective, simulation_options)
    limit = fraction * curves.dense
    _check_reachable(items, curves, grid, limit, fraction)
    losses = sensitivity(root, seen, loss_fn, grid, quiet=quiet)
    share = limit
    for _ in range(_ATTEMPTS):
        chosen = _choose(items, curves, losses, share)
        found = with_densities(root, _densities(plans, chosen))
        total = cost(found, inputs, objective, simulation_options=simulation_options).total
        if total <= limit:
            return _policy(policy, plans, chosen)
        # Cycles are interpolated: where the sum was too low, aim lower by as much.
        share -= (total - limit) * 1.05
    raise InputError(
        "no densities were found whose simulated cycles stay within the budget",
        value=fraction,
        remedy="raise it a little",
    )


def densities_of(policy: Policy) -> dict[str, tuple[float, float]]:
    """(weight, activation) density by layer name pattern, of a policy such as `tune` returns."""
    return {
        pattern: (
            Density.from_sparsity(rule.sparsity).value,
            Density.from_sparsity(
                rule.sparsity if rule.activation_sparsity is None else rule.activation_sparsity
            ).value,
        )
        for pattern, rule in policy.rules
    }


def _grid() -> tuple[float, ...]:
    """Densities in equal ratios, in three digits: they are read in policies."""
    return tuple(float(f"{d:.3g}") for d in np.geomspace(LEAST_DENSITY, 1, LEVELS))


def _check_policy(plans: Mapping[str, LayerPlan]) -> None:
    for rule in {plan.rule for plan in plans.values()}:
        if rule.moves_densities or rule.hold_from_epoch == 0:
            moves = "its densities move by themselves" if rule.moves_densities else "masks are held"
            raise PolicyError(
                f"this policy cannot be tuned: {moves}",
                value=rule.name,
                remedy="tune one that selects anew at each refresh, such as swat_u",
            )


def _fraction(
    budget: float | StepCost | nn.Module,
    inputs: Sequence[Any],
    objective: str,
    options: SimulationOptions | None,
) -> float:
    """The budget as a fraction of the dense cost."""
    if isinstance(budget, nn.Module):
        budget = cost(budget, inputs, objective, simulation_options=options)
    if isinstance(budget, StepCost):
        if budget.objective != objective:
            raise InputError(
                f"the budget counts {budget.objective}, not {objective}",
                remedy="use swatfx.tuning.cost(gm, inputs, objective)",
            )
        return budget.fraction
    is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not is_number or not 0 < budget <= 1:
        raise InputError(
            "a budget is a fraction in (0, 1] of the dense cost, or what another policy costs",
            value=budget,
            remedy='e.g. budget=0.1, or budget=swatfx.compile(model, "swat-u:0.9")',
        )
    return float(budget)


def _items(
    gm: SwatModule,
    policy: Policy,
    plans: Mapping[str, LayerPlan],
    objective: str,
    separate: bool,
    grid: Sequence[float],
) -> list[_Item]:
    """What is to be chosen; densities of one packed activation go together where bytes count."""
    groups = sharers(gm) if objective == "saved_bytes" else {name: name for name in plans}
    members: dict[tuple[str, bool, bool], list[str]] = {}
    for name, plan in plans.items():
        fixed = plan.rule.activation_sparsity is not None
        weight = plan.rule.sees_weight and not selectors.get(plan.weight_selector).fixed_density
        activation = plan.rule.sees_activation
        if weight and activation and not separate and not fixed:
            members.setdefault((groups[name], True, True), []).append(name)
            continue
        if weight:
            members.setdefault((name, True, False), []).append(name)
        if activation and (separate or not (weight or fixed)):
            members.setdefault((groups[name], False, True), []).append(name)
    if not members:
        raise PolicyError(
            "this policy leaves no density to choose",
            value=policy.name,
            remedy="tune one with Top-K weights or activations, such as swat_u",
        )
    items = []
    for (_, weight, activation), names in members.items():
        least = max(_least_density(plans[name]) for name in names) if weight else grid[0]
        first = next(k for k, density in enumerate(grid) if density >= least)
        items.append(_Item(tuple(names), weight, activation, range(first, len(grid))))
    return items


def _least_density(plan: LayerPlan) -> float:
    """At which filters have `WEIGHTS_A_FILTER` weights on average."""
    return min(1.0, WEIGHTS_A_FILTER / max(1, math.prod(plan.weight_shape[1:])))


def _moving(items: Sequence[_Item]) -> dict[str, tuple[bool, bool]]:
    """Layer -> whether its weight and its activation density are chosen."""
    found: dict[str, tuple[bool, bool]] = {}
    for item in items:
        for name in item.layers:
            weight, activation = found.get(name, (False, False))
            found[name] = weight or item.weight, activation or item.activation
    return found


def _item_costs(item: _Item, curves: CostCurves, grid: Sequence[float]) -> list[float]:
    return [
        sum(
            curves.weight_cost(name, grid[level]) * item.weight
            + curves.activation_cost(name, grid[level]) * item.activation
            for name in item.layers
        )
        for level in item.levels
    ]


def _check_reachable(
    items: Sequence[_Item],
    curves: CostCurves,
    grid: Sequence[float],
    limit: float,
    fraction: float,
) -> None:
    least = curves.fixed + sum(_item_costs(item, curves, grid)[0] for item in items)
    if least > limit:
        raise InputError(
            "the budget cannot be reached",
            value=fraction,
            remedy=f"the least possible is {math.ceil(1e4 * least / curves.dense) / 1e4:g} of the"
            f" dense cost, of which {curves.fixed / curves.dense:.4g} is no choice of densities",
        )


def _choose(
    items: Sequence[_Item], curves: CostCurves, losses: Sensitivity, limit: float
) -> dict[str, tuple[float | None, float | None]]:
    """Layer -> chosen (weight, activation) density; None where none was to be chosen."""
    costs, values = [], []
    for item in items:
        loss = np.zeros(len(losses.grid))
        for name in item.layers:
            loss = loss + losses.weight_loss(name) * item.weight
            loss = loss + losses.activation_loss(name) * item.activation
        costs.append(_item_costs(item, curves, losses.grid))
        values.append([float(loss[level]) for level in item.levels])
    chosen: dict[str, tuple[float | None, float | None]] = {}
    for item, option in zip(items, choose(costs, values, limit - curves.fixed), strict=True):
        density = losses.grid[item.levels[option]]
        for name in item.layers:
            weight, activation = chosen.get(name, (None, None))
            chosen[name] = (
                density if item.weight else weight,
                density if item.activation else activation,
            )
    return chosen


def _densities(
    plans: Mapping[str, LayerPlan], chosen: Mapping[str, tuple[float | None, float | None]]
) -> dict[str, tuple[Density, Density]]:
    """The chosen densities as the policy will say them, with those that stay."""

    def exact(density: float | None, before: Density) -> Density:
        return before if density is None else Density.from_sparsity(_sparsity(density))

    return {
        name: (
            exact(weight, plans[name].weight_density),
            exact(activation, plans[name].activation_density),
        )
        for name, (weight, activation) in chosen.items()
    }


def _sparsity(density: float) -> float:
    """1 - density in the digits that a user would write."""
    return round(1 - density, 9)


def _policy(
    policy: Policy,
    plans: Mapping[str, LayerPlan],
    chosen: Mapping[str, tuple[float | None, float | None]],
) -> Policy:
    """One rule a layer; all that has none stays dense."""
    rules = {}
    for name, plan in plans.items():
        weight, activation = chosen.get(name, (None, None))
        changes: dict[str, Any] = {"first_dense": False, "last_dense": False}
        if weight is not None:
            changes |= {"distribution": "uniform", "sparsity": _sparsity(weight)}
        if activation is not None and activation != weight:
            changes["activation_sparsity"] = _sparsity(activation)
        rules[glob.escape(name)] = replace(plan.rule, **changes)
    return replace(per_layer(rules), name=f"tuned({policy.name})")
