"""Predict what a graph takes under sparse and under dense kernels, at example inputs.

Reads LayerPlans, LayerCalls, the layouts' flow and an observed run; changes nothing. What is
predicted of is what the choice of kernels makes differ: layers, norms and conversions between
memory orders. Elementwise functions take the same time in either order. What a sparse linear layer
takes was measured from row-major to row-major: it takes less beside others of its kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes.trace_shapes import Seen, observe_run
from swatfx import forecast
from swatfx.compiled import LayerNode, Pack, SwatModule, saves
from swatfx.forecast import Call, Joint, Work, cheapest, total
from swatfx.forecast.work import CONVERSION, DENSE, NORM, PLAIN, SPARSE
from swatfx.tensors.layouts import FEATURES_MAJOR, between_linear

if TYPE_CHECKING:
    from passes.writing.layout_flow import LayoutFlow
    from passes.writing.linear_flow import Turned

WOULD_TAKE = "sparse kernels would take"
_Shape = tuple[int, ...]
_LIKE_INPUT = 1 / 4  # of its elements: what makes less sums up, in whatever order


class Prediction:
    """Seconds of a compiled model's layers and of what lies between, by the side they take.

    Attributes:
        dtype: "fp32" or "bf16", of activations.
        constants: what seconds are predicted by.
        source: where those are from.
    """

    def __init__(
        self,
        gm: SwatModule,
        layers: list[LayerNode],
        flows: Iterable[tuple[str, LayoutFlow]],
        turned: Iterable[Turned] = (),
    ) -> None:
        """Observe a run of `gm` on its example.

        Args:
            gm: a compiled model that has an example.
            layers: its sparse ops.
            flows: (path of a part, the layout's flow if all its convolutions ran sparse).
            turned: what lies in "features_major" if all linear layers that can ran sparse.

        Raises:
            InputError: the model does not run on the example's shapes alone.
        """
        example = gm.swat.example
        assert example is not None
        weights = _most_are(gm)
        half = "bf16" if weights is torch.bfloat16 else "fp32"
        self.dtype = half if example.autocast is None else example.autocast
        machine = forecast.this_machine()
        self.threads = machine.threads
        self.constants, self.source = forecast.read(machine)
        inputs = pytree.tree_map_only(Tensor, partial(_as, weights), example.inputs)
        self._run = observe_run(gm, inputs, as_dense=True)
        self._layers = layers
        self._groups = _groups(layers)
        self._reached = {at for layer, at in self._groups.items() if self._run.nodes.get(layer.key)}
        self._plain = 0.0
        self._seconds = {layer: self._of_layer(layer) for layer in layers}
        self._joints: list[Joint] = []
        for prefix, flow in flows:
            self._joints += self._of_part(prefix, flow)
        self._joints += [self._of_turned(one) for one in turned]

    def reaches(self, layer: LayerNode) -> bool:
        """Whether the example's run called the layer, or one that runs alike, in any graph."""
        return self._groups[layer] in self._reached

    def choose(self, fixed: Mapping[LayerNode, str | None]) -> Choice:
        """The cheapest choice, where `fixed` says why some layers have to run dense."""
        calls = [Call(0.0, 0.0)] * len(set(self._groups.values()))
        for layer, at in self._groups.items():
            sparse, dense = self._seconds[layer]
            if fixed[layer] is not None:
                sparse = math.inf
            calls[at] = Call(calls[at].sparse + sparse, calls[at].dense + dense)
        chosen = cheapest(calls, self._joints)
        everywhere = {i for i, call in enumerate(calls) if math.isfinite(call.sparse)}
        least = total(calls, self._joints, chosen)
        lost = {
            i: (calls[i].dense + total(calls, self._joints, chosen | {i}) - least) / calls[i].dense
            for i in everywhere - chosen
            if calls[i].dense > 0
        }
        return Choice(
            sparse={layer: self._groups[layer] in chosen for layer in self._layers},
            lost={layer: lost[i] for layer, i in self._groups.items() if i in lost},
            seconds=least,
            dense_seconds=total(calls, self._joints, set()),
            sparse_seconds=total(calls, self._joints, everywhere),
            plain_seconds=self._plain,
        )

    def _of_layer(self, layer: LayerNode) -> tuple[float, float]:
        """(sparse, dense) seconds of all its calls at this node."""
        plan, call = layer.plan, layer.record.call
        assert call is not None
        packed = plan.activation_density.value if plan.rule.backward_activation else None
        sparse = dense = 0.0
        for seen in self._run.nodes.get(layer.key, []):
            work = Work.of_layer(
                self.dtype,
                plan.weight_shape,
                seen.input_shape,
                seen.output_shape,
                stride=call.stride,
                groups=call.groups,
                weight_density=plan.weight_density.value,
                activation_density=packed,
            )
            sparse += self.constants.seconds(work, SPARSE)
            dense += self.constants.seconds(work, DENSE)
            self._plain += self.constants.seconds(work, PLAIN)
        return sparse, dense

    def _of_turned(self, turned: Turned) -> Joint:
        """Linear layers that convert nothing between them, unless one of them runs dense."""
        joint = _Joint()
        ends = [(layer, False) for layer in turned.makers]
        for layer, reads in (*ends, *((layer, True) for layer in turned.readers)):
            calls = self._run.nodes.get(layer.key, [])
            shapes = [seen.input_shape if reads else seen.output_shape for seen in calls]
            turns = [s for s in shapes if between_linear(s, FEATURES_MAJOR) == FEATURES_MAJOR]
            sparse, dense = self._seconds[layer]
            converting = sum(
                self.constants.seconds(
                    Work.of_tensor(CONVERSION, self.dtype, math.prod(shape)), SPARSE
                )
                for shape in turns
            )
            converting = min(converting, sparse / 2)  # as far as constants go
            self._seconds[layer] = sparse - converting, dense
            joint.add(self._groups[layer], converting)
        return joint.done()

    def _of_part(self, prefix: str, flow: LayoutFlow) -> list[Joint]:
        """What lies between the convolutions of one graph."""
        between = _Between(flow)
        built = {root: _Joint() for root in between.roots()}
        seen = {node: self._run.nodes.get((prefix, node.name), []) for node in flow.nodes}
        made = {node: _shapes(node, seen) for node in flow.nodes}
        for layer in flow.layers:
            at = self._groups[layer]
            after, before = between.find(layer.node), between.find(layer.input)
            built[after].add(at, self._converting(made[layer.node]))
            built[before].add(at, self._converting(s.input_shape for s in seen[layer.node]))
        own = {n for layer in flow.layers for n in (layer.pack, layer.activation_state)}
        for node in flow.nodes:
            joint = built.get(between.find(node))
            if joint is not None and flow.operands[node]:
                self._add_norm(joint, flow, node, made[node])
            elif joint is not None and node not in flow.sparse:
                joint.outside += self._converting(made[node])
            if flow.operands[node] or node in flow.sparse or node in own:
                continue
            for source in node.all_input_nodes:  # another's reader
                joint = built.get(between.find(source))
                if joint is not None and _copies(made[source], made[node]):
                    joint.outside += self._converting(made[source])
        return [joint.done() for joint in built.values() if joint.calls]

    def _add_norm(
        self, joint: _Joint, flow: LayoutFlow, node: fx.Node, shapes: list[_Shape]
    ) -> None:
        if node.op != "call_module":
            return
        if not isinstance(flow.part.get_submodule(str(node.target)), (saves.Norm, saves.NormOf)):
            return
        for shape in shapes:
            work = Work.of_tensor(NORM, self.dtype, math.prod(shape))
            joint.sparse += self.constants.seconds(work, SPARSE)
            joint.dense += self.constants.seconds(work, DENSE)
            self._plain += self.constants.seconds(work, PLAIN)

    def _converting(self, shapes: Iterable[tuple[int, ...]]) -> float:
        """Seconds of a conversion, and of its gradient's, a call; of images alone."""
        return sum(
            self.constants.seconds(Work.of_tensor(CONVERSION, self.dtype, math.prod(shape)), SPARSE)
            for shape in shapes
            if len(shape) > 2
        )


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it is predicted to take beside other choices.

    Attributes:
        sparse: layer -> whether it runs sparse kernels.
        lost: layer that might, but does not -> how many times as long it would take, conversions
            around it counted.
        seconds: of layers, norms and conversions in a training step.
        dense_seconds: under dense kernels alone.
        sparse_seconds: under sparse ones wherever they can run.
        plain_seconds: of the layers and norms of the model as it was.
    """

    sparse: Mapping[LayerNode, bool]
    lost: Mapping[LayerNode, float]
    seconds: float
    dense_seconds: float
    sparse_seconds: float
    plain_seconds: float

    def reason(self, layer: LayerNode) -> str | None:
        """Why the layer runs dense, or None."""
        if self.sparse[layer]:
            return None
        times = self.lost.get(layer)
        if times is None:
            return "its input was not run"
        return f"{WOULD_TAKE} {times:.2f} times as long at this input"

    def told(self, prediction: Prediction) -> str:
        """For people."""
        if not self.dense_seconds:
            return "predicted: nothing, the example reaches no layer that a choice is for"
        dense = self.seconds / self.dense_seconds
        beside = (
            f"{dense:.2f} of the time under dense kernels alone,"
            f" {self.seconds / self.sparse_seconds:.2f} of that under sparse ones wherever they run"
        )
        if not any(self.sparse.values()):
            beside = (
                "nothing gains by sparse kernels: wherever they run they would take"
                f" {self.sparse_seconds / self.dense_seconds:.2f} times as long as dense ones"
            )
        plain = self.seconds / self.plain_seconds
        faster = "" if plain < 1 else ": the plain model is faster here"
        threads = f"{prediction.threads} thread{'s' if prediction.threads > 1 else ''}"
        return (
            f"predicted of layers, norms and layouts at the example input, {prediction.dtype},"
            f" {threads}: {beside}; {plain:.2f} times the time of the model as it was{faster}."
            f" Constants: {prediction.source}"
        )


def _most_are(gm: SwatModule) -> torch.dtype:
    """The dtype of most parameters: a model may have been moved to another since."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in gm.parameters():
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and dtype.is_floating_point else x


@dataclass
class _Joint:
    """A Joint in the making."""

    calls: list[int] = field(default_factory=list)
    crossing: list[float] = field(default_factory=list)
    sparse: float = 0.0
    dense: float = 0.0
    outside: float = 0.0

    def add(self, call: int, crossing: float) -> None:
        self.calls.append(call)
        self.crossing.append(crossing)

    def done(self) -> Joint:
        return Joint(tuple(self.calls), tuple(self.crossing), self.sparse, self.dense, self.outside)


class _Between:
    """Tensors of one graph, in classes that lie in one memory order."""

    def __init__(self, flow: LayoutFlow) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        for node, operands in flow.operands.items():
            for operand in operands:
                self._parent[self.find(node)] = self.find(operand)
        self._layers = flow.layers

    def find(self, node: fx.Node) -> fx.Node:
        """The node that stands for the class."""
        while node in self._parent and self._parent[node] is not node:
            node = self._parent[node]
        return node

    def roots(self) -> set[fx.Node]:
        """Classes that a convolution reads or makes."""
        return {self.find(n) for layer in self._layers for n in (layer.node, layer.input)}


def _shapes(node: fx.Node, seen: Mapping[fx.Node, list[Seen]]) -> list[_Shape]:
    """Of what a node made, call by call; of an input of the graph, as a first reader saw it."""
    if node.op == "placeholder":
        readers = [user for user in node.users if user.all_input_nodes[0] is node and seen[user]]
        return [s.input_shape for reader in readers[:1] for s in seen[reader]]
    return [s.output_shape for s in seen[node]]


def _copies(read: list[_Shape], made: list[_Shape]) -> bool:
    """Whether a node that makes so much of what it read has to bring it into an order first."""
    before = sum(math.prod(shape) for shape in read if len(shape) > 2)
    after = sum(map(math.prod, made))
    return before > 0 and (not after or after >= _LIKE_INPUT * before)


def _groups(layers: list[LayerNode]) -> dict[LayerNode, int]:
    """Layer -> position of the call that decides for it.

    All calls of a layer run alike, and so do convolutions that share a packed input.
    """
    parent: dict[object, object] = {}

    def find(key: object) -> object:
        while key in parent:
            key = parent[key]
        return key

    for layer in layers:
        pack: Pack | None = layer.pack_module if layer.is_conv else None
        one, other = find(layer.plan.name), find(pack)
        if pack is not None and one is not other:
            parent[one] = other
    numbers: dict[object, int] = {}
    return {layer: numbers.setdefault(find(layer.plan.name), len(numbers)) for layer in layers}
