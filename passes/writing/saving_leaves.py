"""The leaves below `swat` that passes call, their names, and how they get into graphs."""

from __future__ import annotations

import functools
import keyword
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from passes.writing.naming import unused
from swatfx.compiled import (
    Attention,
    Elementwise,
    LayerNorm,
    LayerNormOf,
    Multiply,
    SwatModule,
    join,
    saves,
    scaled_dot_product_heads,
)
from swatfx.ops.coded import LAYER_NORM, MULTIPLY, RULES

SHARED: dict[str, Callable[[], nn.Module]] = {
    "relu": saves.Relu,
    "max_pool2d": saves.MaxPool2d,
    "avg_pool2d": saves.AvgPool2d,
    "dropout": saves.Dropout,
}
_FUNCTIONAL_NORM = "batch_norm"
# Leaves that keep codes, by the name of their rule; others with a name are functions of an element.
CODED: dict[str, Callable[[str], nn.Module]] = {
    LAYER_NORM: LayerNorm,
    MULTIPLY: Multiply,
}


class Leaves:
    """Makes leaves as they are asked for; the graphs of one model share them."""

    def __init__(self, gm: SwatModule) -> None:
        self.gm = gm
        found = [n for n, m in gm.swat.named_children() if isinstance(m, saves.Saves)]
        self.container = found[0] if found else unused("saves", gm.swat._modules)
        self._norm_saves = gm.swat.options.norm_saves
        self._names = {m.path: n for n, m in self._children().items() if isinstance(m, saves.Bound)}

    def shared(self, name: str) -> str:
        """Target of the one leaf of `SHARED` called `name`."""
        return self._once(name, SHARED[name])

    def functional_norm(self) -> str:
        """Target of the leaf for `F.batch_norm`."""
        return self._once(_FUNCTIONAL_NORM, lambda: saves.Norm(self._norm_saves))

    def norm(self, path: str) -> str:
        """Target of the leaf for the model's norm at `path`."""
        return self._bound(path, functools.partial(saves.NormOf, saves=self._norm_saves))

    def coded(self, rule: str) -> str:
        """Target of the leaf for what is kept by a rule of `swatfx.ops.coded`."""
        make = CODED.get(rule, functools.partial(Elementwise, rule))
        return self._once(rule, lambda: make(self._norm_saves))

    def attention(self, function: Callable[..., Any], heads: Callable[..., Any]) -> str:
        """Target of the leaf for a form of attention, of which `heads` tells the heads."""
        make = functools.partial(Attention, function, heads, self._norm_saves)
        return self._once(function.__name__, make)

    def attention_in_eager_code(self) -> Attention:
        """The leaf for torch's own attention, called by whom no graph stands for."""
        target = self.attention(F.scaled_dot_product_attention, scaled_dot_product_heads)
        leaf = self.gm.get_submodule(target)
        assert isinstance(leaf, Attention)
        return leaf

    def layer_norm(self, path: str) -> str:
        """Target of the leaf for the model's layer norm at `path`."""
        return self._bound(path, functools.partial(LayerNormOf, saves=self._norm_saves))

    def of_rule(self, rule: str, node: fx.Node, prefix: str) -> str:
        """Target of the leaf for `node`, which `rule` is of, in the graph of the part `prefix`."""
        if rule == LAYER_NORM and node.op == "call_module":
            return self.layer_norm(join(prefix, str(node.target)))
        return self.coded(rule)

    def dropout(self, path: str) -> str:
        """Target of the leaf for the model's dropout at `path`."""
        return self._bound(path, saves.DropoutOf)

    def _children(self) -> dict[str, nn.Module]:
        container = self.gm.swat._modules.get(self.container)
        return {} if container is None else dict(container.named_children())

    def _once(self, name: str, make: Callable[[], nn.Module]) -> str:
        if name not in self._children():
            self._add(name, make())
        return f"swat.{self.container}.{name}"

    def _bound(self, path: str, make: Callable[..., nn.Module]) -> str:
        if path not in self._names:
            owner, _, leaf = path.rpartition(".")
            base = path.replace(".", "_")
            if not base.isidentifier() or keyword.iskeyword(base):
                base = "of_" + base
            taken = {*self._children(), *SHARED, *RULES, _FUNCTIONAL_NORM}
            self._names[path] = unused(base, taken)
            self._add(self._names[path], make(self.gm.get_submodule(owner), leaf, path))
        return f"swat.{self.container}.{self._names[path]}"

    def _add(self, name: str, module: nn.Module) -> None:
        if self.container not in self.gm.swat._modules:
            self.gm.swat.add_module(self.container, saves.Saves())
        container = self.gm.swat.get_submodule(self.container)
        container.add_module(name, module)
        container.train(self.gm.swat.training)


def replace_by_leaf(
    node: fx.Node, target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> None:
    """Put a call of a leaf in the place, and under the name, of `node`."""
    with node.graph.inserting_before(node):
        new = node.graph.create_node("call_module", target, args, dict(kwargs or {}))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    new.name = node.name
