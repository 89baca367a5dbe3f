"""Decide each layer's densities and what is sparse where, from the policy.

Reads LayerPlans; writes them back with the policy's fields filled in, or with the reason why the
layer stays dense. Layers under one rule of a per-layer policy share that rule's budget. Changes no
node.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from swatfx import distributions, masks, meta, selectors
from swatfx.compiled import SwatModule, layer_nodes
from swatfx.density import DENSE, Density
from swatfx.errors import InputError, PolicyError
from swatfx.meta import LayerPlan
from swatfx.passing import Context, PassResult
from swatfx.policy import Policy


def assign_density(gm: SwatModule, ctx: Context) -> PassResult:
    """Fill the policy's decisions into every LayerPlan.

    Raises:
        PolicyError: a pattern that matches nothing, a selector that cannot do what is asked.
        InputError: nothing is left to sparsify.
    """
    nodes = list(layer_nodes(gm))
    plans: dict[str, LayerPlan] = {}
    for node in nodes:
        plans.setdefault(node.plan.name, node.plan)
    rules = _rule_of(ctx.policy, [*plans, *gm.unreached])
    for budget, rule in dict.fromkeys(rules.values()):
        group = [
            replace(plan, rule=rule, budget=budget)
            for name, plan in plans.items()
            if rules[name] == (budget, rule)
        ]
        for plan in _assign(group, rule):
            plans[plan.name] = plan
    _check_something_left(ctx.policy, plans | gm.unreached)
    for node in nodes:
        meta.update(node.node, plan=plans[node.plan.name])
    count = sum(plan.takes_part for plan in plans.values())
    return PassResult(gm, bool(plans), (f"{count} of {len(plans)} layers sparse",))


def _rule_of(policy: Policy, names: list[str]) -> dict[str, tuple[int, Policy]]:
    for pattern, _ in policy.rules:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PolicyError(
                "a per_layer pattern matches no layer",
                value=pattern,
                remedy=f"layers are called {', '.join(names[:4])}{', ...' * (len(names) > 4)}",
            )
    return {name: policy.rule_for(name) for name in names}


def _assign(group: list[LayerPlan], policy: Policy) -> list[LayerPlan]:
    skipped = {plan.name: _skip_reason(plan, policy) for plan in group}
    taking_part = [plan for plan in group if skipped[plan.name] is None]
    shapes = [plan.weight_shape for plan in taking_part]
    if policy.distribution == "dense":
        return [replace(plan, skipped=skipped[plan.name]) for plan in group]
    masks.check_rules(policy)
    share = distributions.get(policy.distribution)
    weights = share(shapes, Density.from_sparsity(policy.sparsity))
    activations = weights
    if policy.activation_sparsity is not None:
        activations = share(shapes, Density.from_sparsity(policy.activation_sparsity))
    gradient = Density.from_sparsity(policy.gradient_sparsity)
    # The paper's SWAT-U rows count the input of the dense first layer as sparse (accounting).
    counts_first = policy.distribution == "uniform" and policy.sees_activation
    counted = activations[0] if activations and counts_first else None
    result = [
        replace(
            plan,
            skipped=skipped[plan.name],
            counted_activation_density=counted if skipped[plan.name] == "first layer" else None,
        )
        for plan in group
        if skipped[plan.name] is not None
    ]
    sees_weight = policy.sees_weight or policy.zeroes_inactive
    for plan, weight, activation in zip(taking_part, weights, activations, strict=True):
        weight = selectors.get(plan.weight_selector).own_density(plan.weight_shape) or weight
        _check_selectors(policy, weight, plan.name)
        result.append(
            replace(
                plan,
                weight_density=weight if sees_weight else DENSE,
                activation_density=activation if policy.sees_activation else DENSE,
                gradient_density=gradient,
            )
        )
    return result


def _skip_reason(plan: LayerPlan, policy: Policy) -> str | None:
    if plan.skipped is not None:
        return plan.skipped
    if policy.distribution == "dense":
        return f"policy {policy.name!r}"
    if policy.first_dense and plan.is_first:
        return "first layer"
    if policy.last_dense and plan.is_last:
        return "last layer"
    return None


def _check_selectors(policy: Policy, density: Density, layer: str) -> None:
    selectors.get(policy.weight_selector).check(density, layer)
    if policy.distribution == "momentum" and selectors.get(policy.weight_selector).fixed_density:
        raise PolicyError(
            "densities move with the momentum, and this selector's cannot",
            layer=layer,
            value=policy.weight_selector,
            remedy="use another selector with swat_m, or another policy with this one",
        )
    for field in ("activation_selector", "gradient_selector"):
        name = getattr(policy, field)
        if selectors.get(name).weights_only:
            raise PolicyError(
                f"{field} selects weights only",
                value=name,
                remedy="use nchw, chw, hw or random for activations and gradients",
            )
    if policy.global_threshold and selectors.get(policy.activation_selector).groups:
        raise PolicyError(
            "global_threshold wants one threshold a tensor",
            value=policy.activation_selector,
            remedy="use activation_selector='nchw'",
        )


def _check_something_left(policy: Policy, plans: dict[str, LayerPlan]) -> None:
    if any(plan.takes_part for plan in plans.values()):
        return
    wanted = [policy, *(rule for _, rule in policy.rules)]
    if all(p.distribution == "dense" for p in wanted):
        return
    reasons = sorted({f"{p.name}: {p.skipped}" for p in plans.values()})
    raise InputError(
        "the model has nothing to sparsify",
        value="; ".join(reasons) or "no conv or linear layer",
        remedy="try first_dense=False, or the policy 'dense'",
    )
