"""What was done to the modules of a compiled model since: followed, or refused by name.

A graph took over the calls of modules: layers, ReLUs, the containers around them. What is done to
such a module afterwards (a hook, another module in its place, a wrapper, pruning) would have no
effect and nobody would know. A `Watch` notes what a graph took over, and looks at every call
whether that is still so. Another weight, or another plain layer of the same kind in its place,
takes effect: the layer's state is made anew for it. All else raises ChangedModelError.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import nn

from swatfx.compiled.change_rules import (
    ITERATED,
    Known,
    Weight,
    check_bias,
    children_differ,
    code_of,
    find_module,
    hooks_of,
    known_now,
    options_of,
    sharded,
    torn,
    weight_now,
)
from swatfx.compiled.mirror import TABLES
from swatfx.compiled.module import EagerRoot, SwatModule
from swatfx.compiled.nodes import layer_nodes, nodes_of
from swatfx.compiled.parts import all_parts, join
from swatfx.compiled.saves import Bound
from swatfx.compiled.state import WeightThreshold

_shape_of = operator.attrgetter("shape")


def watch(gm: SwatModule) -> None:
    """From now on, look at every call of `gm` and of its parts."""
    for prefix, part in all_parts(gm):
        assert isinstance(part, SwatModule)
        part.__dict__["watch"] = Watch(gm, part, prefix)


class Watch:
    """What one graph of a compiled model relies on."""

    def __init__(self, gm: SwatModule, part: SwatModule, prefix: str) -> None:
        self._gm = gm
        self._part = part
        self._prefix = prefix
        eager = None if prefix else gm.swat._modules.get("eager_root")
        found = eager.__dict__["root"] if isinstance(eager, EagerRoot) else None
        self._eager: nn.Module | None = found
        self._known = list(self._taken_over())
        self._weights = list(self._weights_read())
        self._without_bias = list(self._bias_unread())
        self._ties = [group for group in self._same_tensors() if len(group) > 1]
        self._size = len(part._modules) if part.iterates else None
        self.look_up()

    # ---- What is noted ----

    def _taken_over(self) -> Iterator[Known]:
        """The modules whose calls the graph stands for, those above them, and owners of parts."""
        part = self._part
        nodes = [n for n in part.graph.nodes if n.op == "call_module"]
        left = {join(self._prefix, str(n.target)) for n in nodes}
        for node in nodes:
            module = part.get_submodule(str(node.target))
            if isinstance(module, Bound):
                left.add(module.path)
        called = {path for path in part.called if join(self._prefix, path) not in left}
        owners = set(part.parts)
        above = {p[:at] for p in part.called | owners for at, c in enumerate(p) if c == "."}
        aliases: dict[int, list[str]] = {}
        for path, module in part.named_modules(remove_duplicate=False):
            aliases.setdefault(id(module), []).append(path)
        for path in sorted(called | owners | above - {""}):
            module = part.get_submodule(path)
            options = options_of(module) if path in called | owners else ()
            size = len(module._modules) if isinstance(module, ITERATED) else None
            forward = module.__dict__.get("forward")
            for alias in filter(None, aliases[id(module)]):
                kind, is_called = type(module), path in called
                code = code_of(module) if is_called else None
                yield Known(alias, module, kind, code, forward, is_called, options, size)

    def _weights_read(self) -> Iterator[Weight]:
        seen: set[str] = set()
        for node in nodes_of(self._part):
            if not node.is_sparse or node.weight.op != "get_attr":
                continue
            path = str(node.weight.target)
            owner, _, leaf = path.rpartition(".")
            tensor = self._part.get_submodule(owner)._parameters.get(leaf)
            if tensor is not None and path not in seen:
                seen.add(path)
                plan, shape = node.plan, tuple(tensor.shape)
                zeroed = plan.rule.zero_inactive == "always"
                yield Weight(owner, leaf, plan.name, plan.state, tensor, shape, zeroed)

    def _bias_unread(self) -> Iterator[str]:
        """Paths of modules without a bias, which the graph would not read if they were given one.

        Whether the module has one tells, not whether a call adds one: what reads a layer's weight
        alone leaves its bias out. And of modules that share a weight, each has a bias of its own.
        """
        called = {known.path for known in self._known if known.is_called}
        owners = {weight.owner for weight in self._weights if weight.leaf == "weight"}
        for path in sorted(called | owners):
            if self._part.get_submodule(path)._parameters.get("bias", ()) is None:
                yield path

    def _same_tensors(self) -> list[list[str]]:
        """Names of one parameter, of which a graph reads one."""
        names: dict[int, list[str]] = {}
        for name, tensor in self._part.named_parameters(remove_duplicate=False):
            if not name.startswith("swat."):
                names.setdefault(id(tensor), []).append(name)
        return list(names.values())

    def look_up(self) -> None:
        """What `_is_as_noted` compares, looked up once: lists, over which it loops in C."""
        part, known, weights = self._part, self._known, self._weights
        parents = [k.path.rpartition(".") for k in known]
        self._tables = [part.get_submodule(owner)._modules for owner, _, _ in parents]
        self._names = [leaf for _, _, leaf in parents]
        self._modules = [k.module for k in known]
        self._kinds = [k.kind for k in known]
        self._dicts = [k.module.__dict__ for k in known]
        self._forwards = [k.forward for k in known]
        self._called = [k.module for k in known if k.is_called]
        coded = [k for k in known if k.code is not None]
        self._coded, self._codes = [k.module.__dict__ for k in coded], [k.code for k in coded]
        self._children = [k.module._modules for k in known if k.children is not None]
        self._sizes = [k.children for k in known if k.children is not None]
        optional = [k for k in known if k.options]
        self._getters = [operator.attrgetter(*(n for n, _ in k.options)) for k in optional]
        self._owners = [k.module for k in optional]
        self._values = [_values(k.options) for k in optional]
        self._parameters = [part.get_submodule(w.owner)._parameters for w in weights]
        self._leaves = [w.leaf for w in weights]
        self._tensors = [w.tensor for w in weights]
        self._shapes = [w.shape for w in weights]
        self._biasless = [part.get_submodule(path)._parameters for path in self._without_bias]
        self._pairs = []
        for group in self._ties:
            places = [name.rpartition(".") for name in group]
            found = [(part.get_submodule(owner)._parameters, leaf) for owner, _, leaf in places]
            self._pairs += [(*found[0], *other) for other in found[1:]]

    # ---- The look at every call ----

    def check(self) -> None:
        """Follow what changed.

        Raises:
            ChangedModelError: it cannot be followed; nothing has changed here.
        """
        if self._eager is not None:
            self._pass_on(self._eager)
        if not self._is_as_noted():
            self._follow()

    def _pass_on(self, root: nn.Module) -> None:
        """Children that the model was given go to the module whose forward is run."""
        table, theirs = self._part._modules, root._modules
        for name, module in table.items():
            if name != "swat" and theirs.get(name) is not module:
                theirs[name] = module
        if len(theirs) >= len(table):
            for name in [name for name in theirs if name not in table]:
                del theirs[name]

    def _is_as_noted(self) -> bool:
        """Whether nothing changed; a microsecond for every few modules."""
        here, get = operator.is_, dict.get
        return (
            all(map(here, map(get, self._tables, self._names), self._modules))
            and all(map(here, map(type, self._modules), self._kinds))
            and all(map(here, map(get, self._dicts, repeat("forward")), self._forwards))
            and not any(map(any, map(hooks_of, self._called)))
            and all(map(operator.eq, map(get, self._coded, repeat("_code")), self._codes))
            and all(map(operator.eq, map(len, self._children), self._sizes))
            and all(map(operator.eq, map(operator.call, self._getters, self._owners), self._values))
            and all(map(here, map(get, self._parameters, self._leaves), self._tensors))
            and all(map(operator.eq, map(_shape_of, self._tensors), self._shapes))
            and not any(table.get("bias") is not None for table in self._biasless)
            and all(one.get(a) is other.get(b) for one, a, other, b in self._pairs)
            and (self._size is None or len(self._part._modules) == self._size)
        )

    def _is_sharded(self) -> bool:
        return "_is_fsdp_managed_module" in self._part.__dict__

    # ---- What to do ----

    def _follow(self) -> None:
        part = self._part
        if self._is_sharded():
            whole = {at for at, known, now in self._tensors_now() if now is known.tensor}
            for at, known_weight in enumerate(self._weights):
                if at not in whole:
                    raise sharded(known_weight.layer)
        if self._size is not None and len(part._modules) != self._size:
            raise children_differ(len(part._modules))
        known = [
            known_now(k, find_module(part, k.path), join(self._prefix, k.path)) for k in self._known
        ]
        moves: dict[nn.Module, set[nn.Module]] = {}
        for before, now in zip(self._known, known, strict=True):
            moves.setdefault(before.module, set()).add(now.module)
        for module, places in moves.items():
            if len(places) > 1:
                raise torn(" and ".join(k.path for k in self._known if k.module is module))
        weights = [weight_now(w, find_module(part, w.owner)) for w in self._weights]
        for path in self._without_bias:
            check_bias(find_module(part, path), join(self._prefix, path))
        for at, (one, leaf, other, other_leaf) in enumerate(self._pairs):
            if one.get(leaf) is not other.get(other_leaf):
                raise torn(" and ".join(join(self._prefix, n) for n in self._ties_of(at)))
        pairs = zip(weights, self._weights, strict=True)
        replaced = [(now, before) for now, before in pairs if now is not before]
        changed = [now for now, _ in replaced]
        for weight in changed:
            self._threshold(weight).check(weight.tensor.detach())
        for at, before in enumerate(self._known):
            if isinstance(before.forward, SwatModule) and known[at].module is not before.module:
                _move_part(before.forward, known[at].module)
        for weight, former_weight in replaced:
            tensor, former = weight.tensor.detach(), former_weight.tensor.detach()
            same = tensor.device == former.device and torch.equal(tensor, former)
            self._threshold(weight).renew(tensor, zeroed=weight.is_zeroed, same=same)
        for weight in changed:
            self._write_shape(weight)
        attachment = self._gm.__dict__.pop("attachment", None) if changed else None
        if attachment is not None:
            attachment.dissolve()
            self._gm.swat.clock.lose(changed[0].layer)
        self._known, self._weights = known, weights
        self.look_up()

    def _ties_of(self, pair: int) -> list[str]:
        groups = [group for group in self._ties for _ in group[1:]]
        return groups[pair]

    def _threshold(self, weight: Weight) -> WeightThreshold:
        threshold = self._gm.swat.get_submodule(f"{weight.state}.weight_threshold")
        assert isinstance(threshold, WeightThreshold)
        return threshold

    def _write_shape(self, weight: Weight) -> None:
        for node in layer_nodes(self._gm):
            if node.plan.name == weight.layer:
                node.replan(weight_shape=weight.shape)

    def _tensors_now(self) -> Iterator[tuple[int, Weight, nn.Parameter]]:
        """(position, what is known, what is there) of each weight that is a parameter."""
        for at, weight in enumerate(self._weights):
            owner = find_module(self._part, weight.owner)
            tensor = None if owner is None else owner._parameters.get(weight.leaf)
            if tensor is not None:
                yield at, weight, tensor

    def mend_copies(self) -> None:
        """Put right what loops over the entries of a copy have done to its state."""
        for _, weight, tensor in () if self._is_sharded() else self._tensors_now():
            self._threshold(weight).mend(tensor)

    def note_copies(self) -> None:
        """The state of a copy belongs to the weights as they are now."""
        for _, weight, tensor in () if self._is_sharded() else self._tensors_now():
            self._threshold(weight).note(tensor, zeroed=weight.is_zeroed)

    def make_room(self) -> None:
        """Give state the shape that it has for the weights as they are; its values come later."""
        for _, weight, tensor in self._tensors_now():
            if tensor.shape != weight.shape:
                self._threshold(weight).make_room(tensor.detach())

    def accept_weights(self, has_values: bool = False) -> None:
        """Take the weights as they are for those that the layers' state belongs to.

        It belongs to none that came from the meta device: those have no values yet, unless they and
        the state were loaded (`has_values`).
        """
        if self._is_sharded():
            return
        for at, weight, tensor in self._tensors_now():
            known = has_values or tensor.is_meta >= weight.tensor.is_meta
            if tensor.shape == weight.shape and known:
                self._weights[at] = replace(weight, tensor=tensor)
        self.look_up()


def _values(options: tuple[tuple[str, Any], ...]) -> Any:
    """As `operator.attrgetter` of their names gives them."""
    values = tuple(value for _, value in options)
    return values if len(values) > 1 else values[0]


def _move_part(part: SwatModule, module: nn.Module) -> None:
    """Let `part` stand for the forward of `module` instead of that of the one before."""
    part.__dict__["swat_owner"].__dict__.pop("forward", None)
    further = () if part.ways is None else part.ways.graphs
    for graph in (part, *(graph for _, graph in further)):
        for table in TABLES:
            graph.__dict__[table] = module.__dict__[table]
        graph.__dict__["swat_owner"] = module
        if isinstance(graph.watch, Watch):
            graph.watch.look_up()
    module.__dict__["forward"] = part
