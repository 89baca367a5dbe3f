"""The sparse layers of a compiled model, with their weights and thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from swatfx import meta
from swatfx.compiled.held import HeldThreshold
from swatfx.compiled.module import SwatModule
from swatfx.compiled.nodes import LayerNode, all_nodes, layer_nodes, sparse_nodes
from swatfx.compiled.state import ActivationThreshold, WeightThreshold
from swatfx.compiled.swat_state import LayerState
from swatfx.compiled.weights import evaluate, weight_chain
from swatfx.density import Density
from swatfx.meta import LayerPlan
from swatfx.ops.state import read_density
from swatfx.ops.where import weight_keep


@dataclass(frozen=True)
class SparseLayer:
    """One layer that takes part.

    Attributes:
        plan: what the policy decided.
        weight: the weight as it is now (computed afresh if it is parametrized).
        state: the layer's thresholds.
        node: its first op node.
    """

    plan: LayerPlan
    weight: Tensor
    state: LayerState
    node: LayerNode

    @property
    def weight_threshold(self) -> WeightThreshold:
        """The weight's threshold."""
        module = self.state.get_submodule("weight_threshold")
        assert isinstance(module, WeightThreshold)
        return module

    @property
    def held_threshold(self) -> HeldThreshold:
        """The weight's threshold, where the policy holds masks."""
        module = self.weight_threshold
        assert isinstance(module, HeldThreshold)
        return module

    @property
    def activation_thresholds(self) -> list[ActivationThreshold]:
        """The thresholds of its inputs; empty where it shares another layer's."""
        return [m for m in self.state.children() if isinstance(m, ActivationThreshold)]

    @property
    def weight_density(self) -> Density:
        """The target as it is now; it may have moved since the plan."""
        threshold = self.weight_threshold
        return read_density(threshold.density, threshold.fraction)

    def keep(self) -> Tensor:
        """Mask of the weights that the threshold in use keeps: what training forwards see.

        Within a period, and after an optimizer's step, these are not the Top-K of the weights.
        """
        return self._mask(self.weight_threshold.threshold)

    def keep_now(self) -> Tensor:
        """Mask of the weights that evaluation uses: selected from the weights as they are."""
        return self._mask(self.weight_threshold.state_now(self.weight))

    def _mask(self, state: Tensor) -> Tensor:
        weight = self.weight.detach()
        mask = weight_keep(weight, state, self.weight_threshold.selector)
        return mask.expand_as(weight)

    def set_density(self, density: Density, active: int = 0) -> None:
        """Move weight and activation density; both take effect at the next refresh.

        `active` is how many weights a held mask has at that density: where the density is no exact
        fraction, the number takes its place, so that masks broken by averaging can be told.
        """
        self.weight_threshold.set_density(density)
        if density.exact is None:
            self.weight_threshold.fraction[0] = active
        for threshold in self.activation_thresholds:
            threshold.set_density(density)


def sparse_layers(gm: SwatModule) -> Iterator[SparseLayer]:
    """The layers that take part, each once, in graph order."""
    seen: set[str] = set()
    for node in sparse_nodes(gm):
        plan = node.plan
        if plan.name in seen:
            continue
        seen.add(plan.name)
        weight = node.weight_now()
        assert weight is not None  # find_layers skips weights that inputs decide
        state = gm.swat.get_submodule(plan.state)
        assert isinstance(state, LayerState)
        yield SparseLayer(plan, weight, state, node)


def current(layer: SparseLayer) -> SparseLayer:
    """The layer with the weight as it is now, where that is computed from others."""
    if isinstance(layer.weight, nn.Parameter):
        return layer
    weight = layer.node.weight_now()
    return layer if weight is None else replace(layer, weight=weight)


def weight_parameters(layer: SparseLayer) -> list[nn.Parameter]:
    """The parameter that the layer's weight is, or those that it is computed from."""
    if isinstance(layer.weight, nn.Parameter):
        return [layer.weight]
    part = layer.node.part
    nodes = weight_chain(layer.node.weight) or {}
    values = [evaluate(part, node) for node in nodes if node.op == "get_attr"]
    found = [value for value in values if isinstance(value, nn.Parameter)]
    for node in nodes:
        if node.op == "call_module":
            found += part.get_submodule(str(node.target)).parameters()
    return found


def all_plans(gm: SwatModule) -> dict[str, LayerPlan]:
    """Every layer's plan, sparse or not, by name: in graph order, then those no graph calls."""
    plans: dict[str, LayerPlan] = {}
    for node in layer_nodes(gm):
        plans.setdefault(node.plan.name, node.plan)
    return plans | gm.unreached


def read_dense(gm: SwatModule, name: str) -> bool:
    """Whether anything but sparse layers reads a weight: a tied embedding, say."""
    owner = name.rpartition(".")[0]
    plain = isinstance(gm.get_submodule(owner), (nn.modules.conv._ConvNd, nn.Linear))
    for place in all_nodes(gm):
        node = place.node
        if node.op == "call_module" and place.path == owner and not plain:
            return True
        if node.op == "get_attr" and place.path == name:
            users = [u for u in node.users if meta.read(u).role != "op"]
            if not all(str(u.target).startswith("swat.") for u in users):
                return True
    return not plain and any(owner.startswith(path) for path in gm.eager)
