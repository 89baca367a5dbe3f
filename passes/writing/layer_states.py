"""The modules below `swat.` that a rewritten layer keeps its state in, and their names.

Used by `insert_sparsify` alone: it decides where in the graph each is called.
"""

from __future__ import annotations

import keyword
from typing import Any

from torch import Tensor, nn

from swatfx import selectors
from swatfx.compiled import (
    ActivationThreshold,
    CallThresholds,
    HeldThreshold,
    LayerState,
    LearnedThreshold,
    SwatModule,
    SwatState,
    WeightThreshold,
    initial_state,
)
from swatfx.errors import InputError, PolicyError
from swatfx.meta import LayerPlan
from swatfx.ops.learned import is_learned
from swatfx.selectors import Held


class States:
    """The children of `swat`, made as they are asked for."""

    def __init__(self, gm: SwatModule) -> None:
        self.swat: SwatState = gm.swat
        self._names: dict[str, str] = {}

    def layer(self, name: str) -> tuple[str, LayerState]:
        """(name below swat, container) of a layer."""
        if name not in self._names:
            base = candidate = name.replace(".", "_")
            if not name[:1].isalpha() or keyword.iskeyword(base):
                base = candidate = "layer_" + base
            count = 1
            while hasattr(self.swat, candidate):
                candidate, count = f"{base}_{count}", count + 1
            self._names[name] = candidate
            moves = self.swat.policy.moves_densities
            self.swat.add_module(candidate, LayerState(moves))
        child = self.swat.get_submodule(self._names[name])
        assert isinstance(child, LayerState)
        return self._names[name], child

    def add(self, layer: str, role: str, module: nn.Module, taken: set[str]) -> str:
        """Register `module` for `layer` as `role`, numbered where that is `taken`; its target.

        What another graph has registered for the same call is used again: a part and a part within
        it are two ways into one layer, of which a call takes one.
        """
        name, state = self.layer(layer)
        chosen, count = role, 1
        while f"swat.{name}.{chosen}" in taken or not _alike(state._modules.get(chosen), module):
            chosen, count = f"{role}_{count}", count + 1
        target = f"swat.{name}.{chosen}"
        taken.add(target)
        if chosen not in state._modules:
            module.train(self.swat.training)
            state.add_module(chosen, module)
        return target


def _alike(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether `one` is there and is another thing than `other` (False), or not."""

    def options(m: nn.Module) -> list[Any]:
        pack = ("layer", "selector", "spatial", "layout", "value_dtype")
        threshold = ("period", "in_forward", "all_ranks")
        return [type(m), *(getattr(m, name, None) for name in (*pack, *threshold))]

    return one is None or options(one) == options(other)


def weight_threshold(plan: LayerPlan, spatial: int, weight: Tensor) -> WeightThreshold:
    """The threshold of a layer's weight, valid for `weight` as it is.

    Raises:
        InputError: NaN or complex weights; names the layer.
        PolicyError: learned thresholds that no forward pass would see.
    """
    if weight.is_complex():
        raise InputError(
            "Top-K cannot rank complex weights",
            layer=plan.name,
            value=str(weight.dtype),
            remedy="keep the layer dense: swatfx.per_layer({name: 'dense'}, default=policy)",
        )
    state = initial_state(weight, weight, plan.weight_selector, spatial, True)
    if is_learned(plan.weight_selector):
        return _learned_threshold(plan, spatial, weight, state)
    holds = isinstance(selectors.get(plan.weight_selector), Held)
    module = (HeldThreshold if holds else WeightThreshold)(
        plan.name,
        plan.weight_selector,
        plan.first_densities[0],
        state=state,
        period=plan.rule.period,
        spatial=spatial,
        is_weight=True,
        seed=plan.rule.seed,
    )
    module.recompute(weight)
    if isinstance(module, HeldThreshold) and plan.rule.hold_from_epoch == 0:
        module.hold()
    return module


def _learned_threshold(
    plan: LayerPlan, spatial: int, weight: Tensor, state: Tensor
) -> LearnedThreshold:
    if not plan.rule.forward_weight:
        raise PolicyError(
            "learned thresholds are trained by the forward pass that sees them",
            layer=plan.name,
            value="forward_weight=False",
            remedy="use forward_weight=True, or another weight selector",
        )
    # What is frozen is frozen with its threshold; of a computed weight nobody knows yet.
    trains = weight.requires_grad or not isinstance(weight, nn.Parameter)
    return LearnedThreshold(
        plan.name, plan.weight_selector, state=state, spatial=spatial, requires_grad=trains
    )


def activation_threshold(
    plan: LayerPlan, spatial: int, weight: Tensor, below_eager: bool
) -> ActivationThreshold:
    """The threshold of a layer's input, in the dtype and on the device of its weight.

    Eager code may call what is below it several times a forward. Where a state outlives a forward,
    each call needs its own.
    """
    outlives = plan.rule.period > 1 and not selectors.get(plan.rule.activation_selector).groups
    kind = CallThresholds if below_eager and outlives else ActivationThreshold
    return kind(
        plan.name,
        plan.rule.activation_selector,
        plan.first_densities[1],
        state=initial_state(None, weight, plan.rule.activation_selector, spatial, False),
        period=plan.rule.period,
        spatial=spatial,
        is_weight=False,
        seed=plan.rule.seed,
        all_ranks=plan.rule.global_threshold,
        in_forward=plan.rule.forward_activation,
    )
