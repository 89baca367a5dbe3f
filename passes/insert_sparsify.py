"""Rewrite each layer that takes part into thresholds, a packed activation and a sparse op.

Reads LayerPlans and LayerCalls; replaces layer nodes by `swatfx::conv` or `swatfx::linear` nodes,
which carry the metadata on, and puts the state they need under `swat.`. Layers that read the same
tensor at the same density share one packed activation, unless the tensor is written between them.
Parameters keep their names. A second run finds no layer node left and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.reading.aliasing import Versions
from passes.reading.layer_calls import Site, find_site
from passes.writing.layer_states import States, activation_threshold, weight_threshold
from swatfx import meta
from swatfx.compiled import CONV, LINEAR, Pack, SwatModule, all_parts, is_root, relative
from swatfx.meta import LayerCall, LayerPlan
from swatfx.ops.calls import ConvCall, LinearCall
from swatfx.ops.where import Where, density_text
from swatfx.options import VALUE_DTYPES
from swatfx.passing import Context, PassResult
from swatfx.tensors.layouts import ROW_MAJOR


def insert_sparsify(gm: SwatModule, ctx: Context) -> PassResult:
    """Insert thresholds, packs and sparse ops, in the root graph and in every part."""
    states = States(gm)
    rewriters = [_Rewriter(gm, part, prefix, states) for prefix, part in all_parts(gm)]
    # Older versions knew only the first of these graphs: their checkpoints lack the others' states.
    first = [r for r in rewriters if "(" not in r.prefix and r.prefix not in gm.spare]
    count = sum(rewriter.run() for rewriter in first)
    known = {id(threshold) for _, threshold in gm.swat.thresholds()}
    count += sum(rewriter.run() for rewriter in rewriters if rewriter not in first)
    for _, threshold in gm.swat.thresholds():
        threshold.is_spare = threshold.is_spare or id(threshold) not in known
    for rewriter in rewriters if count else ():
        graph = rewriter.graph
        if is_root(rewriter.prefix) and not any(n.target == "swat.clock" for n in graph.nodes):
            rewriter.insert_clock()  # all layers are below eager code: the root still counts
            rewriter.part.recompile()
    return PassResult(gm, count > 0, (f"{count} sparse calls",))


@dataclass
class _Shared:
    """One packed activation: its nodes, and the weights whose gradients read it."""

    threshold: fx.Node
    pack: fx.Node | None
    weights: dict[fx.Node, None]


class _Rewriter:
    """Rewrites one graph."""

    def __init__(self, gm: SwatModule, part: fx.GraphModule, prefix: str, states: States) -> None:
        self.gm = gm
        self.part = part
        self.prefix = prefix
        self.graph = part.graph
        self.states = states
        self.value_dtype = VALUE_DTYPES[gm.swat.options.value_dtype]
        self.step: fx.Node | None = None
        self.thresholds: dict[str | fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.shared: dict[tuple[Any, ...], _Shared] = {}
        self.taken: set[str] = set()
        self.attributes: dict[str, fx.Node] = {
            str(n.target): n for n in reversed(self.graph.nodes) if n.op == "get_attr"
        }

    def run(self) -> int:
        """Rewrite every layer node; return how many."""
        todo = []
        for node in self.graph.nodes:
            record = meta.read(node)
            if record.role == "layer" and record.plan is not None and record.plan.takes_part:
                todo.append(node)
        if not todo:
            return 0
        eager = {relative(self.prefix, path): reason for path, reason in self.gm.eager.items()}
        versions = Versions(self.part, eager)
        # Before the first rewrite: a layer's input may be another layer's node, which is replaced.
        seen_at = {node: self._version(versions, node) for node in todo}
        self.insert_clock()
        for node in todo:
            self._rewrite(node, seen_at[node])
        for shared in self.shared.values():
            weights = tuple(shared.weights)
            shared.threshold.args = (*shared.threshold.args[:2], *weights)
            if shared.pack is not None:
                shared.pack.args = (*shared.pack.args[:2], *weights)
        self.part.recompile()
        return len(todo)

    def _version(self, versions: Versions, node: fx.Node) -> int:
        site = find_site(self.part, node)
        assert site is not None  # find_layers has seen one
        return versions.of(site.input, node)

    def insert_clock(self) -> None:
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        target = "swat.clock"
        kwargs: dict[str, Any] = {}
        if not is_root(self.prefix):
            target, kwargs = "swat.part_clock", {"part": self.prefix}
        with self.graph.inserting_after(placeholders[-1]):
            args = tuple(placeholders)
            self.step = self.graph.create_node("call_module", target, args, kwargs, name="step")

    def _rewrite(self, node: fx.Node, version: int) -> None:
        record = meta.read(node)
        plan, call = record.plan, record.call
        site = find_site(self.part, node)
        assert plan is not None and call is not None and site is not None
        with self.graph.inserting_before(node):
            weight, state = self._weight(plan, site, node)
            bias = self._attribute(site.bias, node) if isinstance(site.bias, str) else site.bias
            shared = self._activation(plan, call, site, weight, version)
            source = site.input
            if call.pad:
                source = self.graph.call_function(
                    F.pad, (source, call.pad), {"mode": call.pad_mode}
                )
            new = self._op(node, plan, call, (source, weight, bias, state), shared)
        new.meta.update(node.meta)
        named = replace(plan, state=self.states.layer(plan.name)[0])
        meta.write(new, replace(record, plan=named, role="op"))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        new.name = node.name

    def _attribute(self, path: str, reader: fx.Node) -> fx.Node:
        """What is at `path`, read before `reader`."""
        if path not in self.attributes:
            self.attributes[path] = self.graph.create_node("get_attr", path)
        elif reader < self.attributes[path]:
            # The model's own code reads it further on. It is the same tensor there, whoever writes
            # into it in between, so that it may be had earlier.
            reader.prepend(self.attributes[path])
        return self.attributes[path]

    def _call(self, target: str, args: tuple[Any, ...], short: str) -> fx.Node:
        """Call a state module; the node is named after its layer and `short`."""
        layer = target.split(".")[1]
        return self.graph.create_node("call_module", target, args, name=f"{layer}_{short}")

    def _weight(self, plan: LayerPlan, site: Site, reader: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(weight node, node of its threshold); once a weight and graph."""
        key = plan.name if isinstance(site.weight, str) else site.weight
        if key in self.thresholds:
            return self.thresholds[key]
        weight: fx.Node
        if isinstance(site.weight, fx.Node):
            weight = site.weight
        elif self._is_parametrized(site.weight):
            owner, _, leaf = site.weight.rpartition(".")
            weight = self.graph.call_module(f"{owner}.parametrizations.{leaf}")
        else:
            weight = self._attribute(site.weight, reader)
        target = self._weight_state(plan, site)
        threshold = self._call(target, (weight, self.step), "w_t")
        self.thresholds[key] = weight, threshold
        return weight, threshold

    def _is_parametrized(self, path: str) -> bool:
        owner, _, leaf = path.rpartition(".")
        module = self.part.get_submodule(owner)
        return bool(nn.utils.parametrize.is_parametrized(module, leaf))

    def _weight_state(self, plan: LayerPlan, site: Site) -> str:
        name, state = self.states.layer(plan.name)
        if "weight_threshold" in state._modules:
            return f"swat.{name}.weight_threshold"
        value = site.value
        assert value is not None  # find_layers skips the rest
        module = weight_threshold(plan, site.spatial, value)
        return self.states.add(plan.name, "weight_threshold", module, self.taken)

    def _activation(
        self, plan: LayerPlan, call: LayerCall, site: Site, weight: fx.Node, version: int
    ) -> _Shared | None:
        """Threshold and pack of the input, shared with earlier readers where that is exact."""
        if not plan.rule.sees_activation:
            return None
        moves = self.gm.swat.clock.optimizer_wanted_by is not None
        key = (
            site.input,
            version,
            plan.activation_density,
            plan.rule.activation_selector,
            plan.rule.period,
            plan.rule.global_threshold,
            plan.rule.forward_activation,
            plan.rule.backward_activation,
            site.spatial,
            bool(call.pad),
            # Densities that move, and draws that are seeded by the layer's name, are a layer's own.
            plan.name if moves or plan.rule.activation_selector == "random" else "",
            # The pack asks whether its readers' weights train, so they have to exist before it.
            None if weight.op == "get_attr" else weight,
        )
        if key not in self.shared:
            self.shared[key] = self._new_activation(plan, call, site)
        elif weight.op == "get_attr" and self.shared[key].threshold < weight:
            self.shared[key].threshold.prepend(weight)
        self.shared[key].weights[weight] = None
        return self.shared[key]

    def _new_activation(self, plan: LayerPlan, call: LayerCall, site: Site) -> _Shared:
        assert isinstance(site.value, Tensor)
        below_eager = not is_root(self.prefix)
        threshold = activation_threshold(plan, site.spatial, site.value, below_eager)
        target = self.states.add(plan.name, "activation_threshold", threshold, self.taken)
        a_t = self._call(target, (site.input, self.step), "a_t")
        if not plan.rule.backward_activation:
            return _Shared(a_t, None, {})
        # A linear layer reads rows, however its input lies. And backward pads what it unpacks: the
        # padded tensor may lie otherwise than the core.
        layout = ROW_MAJOR if call.pad or not site.spatial else ""
        pack = Pack(
            plan.name, plan.rule.activation_selector, site.spatial, layout, self.value_dtype
        )
        target = self.states.add(plan.name, "pack", pack, self.taken)
        kept = self._call(target, (site.input, a_t), "kept")
        return _Shared(a_t, kept, {})

    def _op(
        self,
        node: fx.Node,
        plan: LayerPlan,
        call: LayerCall,
        tensors: tuple[Any, ...],
        shared: _Shared | None,
    ) -> fx.Node:
        """The sparse op that takes the place of `node`.

        Arguments at their defaults are left out, to keep the graph short.
        """
        where = Where(
            plan.rule.forward_weight,
            plan.rule.forward_activation,
            plan.rule.backward_weight,
            plan.rule.backward_activation,
            not plan.gradient_density.is_dense,
            plan.rule.update == "active",
        )
        options: dict[str, Any] = {"sparse": str(where), "weight_selector": plan.weight_selector}
        if plan.rule.forward_activation and shared is not None:
            options["activation_state"] = shared.threshold
            options["activation_selector"] = plan.rule.activation_selector
        if where.gradient:
            options["gradient_density"] = density_text(plan.gradient_density)
            options["gradient_selector"] = plan.rule.gradient_selector
        if where.active_only and plan.rule.hold_from_epoch is not None:
            state: fx.Node = tensors[3]
            options["open"] = self._attribute(f"{state.target}.open", node)
        kept = shared.pack if shared is not None else None
        if kept is not None:
            options["kept_dtype"] = self.value_dtype
        if plan.kind == "linear":
            needed, given = LinearCall(**options).arguments()
            return self.graph.call_function(LINEAR, (*tensors, kept, *needed), given)
        if call.pad:
            options |= {"pad": call.pad, "pad_mode": call.pad_mode}
        steps = (call.stride, call.padding, call.dilation, call.groups)
        needed, given = ConvCall(*steps, **options).arguments()
        return self.graph.call_function(CONV, (*tensors, kept, *needed), given)
