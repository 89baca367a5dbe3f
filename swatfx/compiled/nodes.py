"""The one way to walk a compiled model: its nodes, those of layers, and what a sparse op reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from swatfx import meta
from swatfx.compiled.module import SwatModule
from swatfx.compiled.parts import all_parts, join
from swatfx.compiled.state import ActivationThreshold, Pack, WeightThreshold
from swatfx.compiled.swat_state import LayerState
from swatfx.compiled.weights import evaluate
from swatfx.meta import LayerPlan, NodeRecord

CONV = torch.ops.swatfx.conv.default
LINEAR = torch.ops.swatfx.linear.default


@dataclass(frozen=True)
class Place:
    """One node of one graph of a compiled model.

    Attributes:
        prefix: path of the graph, as of `all_parts`.
        part: the graph's module.
        node: in `part.graph`.
    """

    prefix: str
    part: SwatModule
    node: fx.Node

    @property
    def key(self) -> tuple[str, str]:
        """What tells the node from all others of the model, in copies of it too."""
        return self.prefix, self.node.name

    @property
    def path(self) -> str:
        """Of the module or attribute that the node calls or reads, from the model's root."""
        return join(self.prefix, str(self.node.target))

    @property
    def record(self) -> NodeRecord:
        """What the node carries of ours; empty if nothing."""
        return meta.read(self.node)


@dataclass(frozen=True)
class LayerNode(Place):
    """A call of a layer: the node as it was found, or the sparse op that took its place."""

    @property
    def plan(self) -> LayerPlan:
        """What the policy decided, as it stands now."""
        plan = self.record.plan
        assert plan is not None
        return plan

    @property
    def is_sparse(self) -> bool:
        """Whether the node is a sparse op. What is below asks for one."""
        return self.record.role == "op"

    @property
    def is_conv(self) -> bool:
        """Whether the op is a convolution."""
        return self.node.target is CONV

    @property
    def input(self) -> fx.Node:
        """The activation."""
        return self._operand(0)

    @property
    def weight(self) -> fx.Node:
        """The dense weight: read, or computed."""
        return self._operand(1)

    @property
    def pack(self) -> fx.Node | None:
        """The call that packs the activation, if anything is packed."""
        kept = self.node.args[4]
        return kept if isinstance(kept, fx.Node) else None

    @property
    def pack_module(self) -> Pack | None:
        """The module that packs the activation."""
        if self.pack is None:
            return None
        module = self.part.get_submodule(str(self.pack.target))
        assert isinstance(module, Pack)
        return module

    @property
    def activation_state(self) -> fx.Node | None:
        """The call of the activation's threshold: the pack's, or forward's own."""
        pack = self.pack
        state = self.node.kwargs.get("activation_state") if pack is None else pack.args[1]
        return state if isinstance(state, fx.Node) else None

    @property
    def layer_state(self) -> LayerState:
        """The layer's thresholds, and what ran it last."""
        state = self.part.swat.get_submodule(self.plan.state)
        assert isinstance(state, LayerState)
        return state

    @property
    def densities_now(self) -> dict[str, float]:
        """Of the weight, and of the activation where one is packed: targets, as they are now."""
        weight = self.layer_state.get_submodule("weight_threshold")
        assert isinstance(weight, WeightThreshold)
        found = {"weight": float(weight.density)}
        if self.plan.rule.backward_activation:
            state, density = self.activation_state, self.plan.activation_density.value
            if state is not None:
                module = self.part.get_submodule(str(state.target))
                assert isinstance(module, ActivationThreshold)
                density = float(module.density)
            found["activation"] = density
        return found

    def weight_now(self) -> Tensor | None:
        """The weight as it is; None where inputs decide it."""
        return evaluate(self.part, self.weight)

    def replan(self, **changes: Any) -> None:
        """Change fields of the plan, on this node."""
        meta.update(self.node, plan=replace(self.plan, **changes))

    def tell(self, **options: Any) -> None:
        """Give the op keyword arguments."""
        self.node.kwargs = {**self.node.kwargs, **options}

    def _operand(self, at: int) -> fx.Node:
        node = self.node.args[at]
        assert isinstance(node, fx.Node)
        return node


def all_nodes(gm: SwatModule) -> Iterator[Place]:
    """Every node of every graph, part by part; nodes may be replaced on the way."""
    for prefix, part in all_parts(gm):
        for node in list(part.graph.nodes):
            yield Place(prefix, part, node)


def nodes_of(part: SwatModule, prefix: str = "") -> Iterator[LayerNode]:
    """The nodes of one graph that call a layer, in order."""
    for node in list(part.graph.nodes):
        if meta.read(node).plan is not None:
            yield LayerNode(prefix, part, node)


def layer_nodes(gm: SwatModule) -> Iterator[LayerNode]:
    """Every call of a layer, sparse or not, part by part; nodes may be replaced on the way."""
    for prefix, part in all_parts(gm):
        yield from nodes_of(part, prefix)


def sparse_nodes(gm: SwatModule) -> Iterator[LayerNode]:
    """Every sparse op, part by part; nodes may be replaced on the way."""
    return (layer for layer in layer_nodes(gm) if layer.is_sparse)
