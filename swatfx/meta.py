"""What a compiled graph knows of its layers: frozen records, kept on nodes as JSON-able dicts.

The records live under `node.meta["custom"]["swatfx"]`, a key that survives deepcopy,
fx.Transformer, torch.export and its save and load. This file is the only one that spells it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, TypeVar

from torch import fx

from swatfx.density import DENSE, Density
from swatfx.policy import Policy
from swatfx.policy.fields import HELD

# What `compile(..., value_dtype=...)` takes, by the name that a model keeps.

_DENSE = Policy("dense", distribution="dense")  # of a layer that no rule was asked for

_KEY = "swatfx"
_CACHE = "_swatfx_record"


@dataclass(frozen=True)
class LayerPlan:
    """One conv or linear layer: what it is, and what the policy decided for it.

    Attributes:
        name: module path (or the weight's path, for a functional call).
        kind: "conv1d", "conv2d", "conv3d", "linear", or "conv_transpose1d" and so on.
        weight: path of the weight (parameter or computed), from the graph's root.
        weight_shape: (F, C/groups, *kernel), or (out, in).
        is_first: no other layer stands between this one and a graph input.
        is_last: likewise for the outputs.
        skipped: why the layer stays dense, or None.
        rule: the policy that rules it: one of those of `swatfx.per_layer`, or the only one.
        budget: position of that rule; layers that have it in common share a budget.
        weight_density: what Top-K keeps of the weight.
        activation_density: what Top-K keeps of the input activation.
        gradient_density: what Top-K keeps of the output gradient.
        state: name of the layer's module under `swat.`, if it takes part.
        counted_activation_density: what the paper's accounting takes for the input of a layer that
            is itself dense (SWAT-U's first); None: the activation density.
        kernels: "sparse", or "dense: " and why; "" where nothing was chosen. A matter of the
            machine, not of the method: the values are the same.
    """

    name: str
    kind: str
    weight: str
    weight_shape: tuple[int, ...]
    is_first: bool = False
    is_last: bool = False
    skipped: str | None = None
    rule: Policy = _DENSE
    budget: int = -1
    weight_density: Density = DENSE
    activation_density: Density = DENSE
    gradient_density: Density = DENSE
    state: str = ""
    counted_activation_density: Density | None = None
    kernels: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights, bias not counted."""
        count = 1
        for extent in self.weight_shape:
            count *= extent
        return count

    @property
    def takes_part(self) -> bool:
        """Whether the layer was rewritten."""
        return self.skipped is None

    @property
    def weight_selector(self) -> str:
        """Name in `swatfx.selectors`."""
        return self.rule.selector_in_use

    @property
    def first_densities(self) -> tuple[Density, Density]:
        """(weight, activation) densities that training begins with: 1 where a ramp leads down."""
        if self.rule.ramp != "none":
            return DENSE, DENSE
        return self.weight_density, self.activation_density

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {f.name: _encode(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> LayerPlan:
        """Inverse of `to_json`; also reads what versions wrote that copied the rule's fields."""
        values = dict(data) if "rule" in data else _of_copied_fields(data)
        values["rule"] = _rule(values["rule"])
        values["weight_shape"] = tuple(values["weight_shape"])
        for key, value in values.items():
            if value is not None and key.endswith("_density"):
                values[key] = _density(*value)
        return LayerPlan(**values)


def _of_copied_fields(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan as it was before it held its rule (until 2026-11).

    What the rule said of sparsity is not in it; densities are.
    """
    own = {f.name for f in fields(LayerPlan)} - {"rule"}
    copied = {f.name for f in fields(Policy)} & set(data) - {"name"}
    rule = {name: data[name] for name in copied} | {"name": data["policy"]}
    if rule["weight_selector"].startswith(HELD):
        rule["weight_selector"] = rule["weight_selector"].removeprefix(HELD)
        rule["hold_from_epoch"] = 0 if data["held"] else 1
    if data["starts_dense"]:
        rule["ramp"] = "cubic"
    if data["zeroed"]:
        rule["zero_inactive"] = "always"
    assumed = data["assumed_activation_density"]
    rule["assumed_activation_density"] = None if assumed is None else assumed[0]
    values = {name: value for name, value in data.items() if name in own}
    return values | {"rule": json.dumps(Policy(**rule).to_json())}


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in a graph: the arguments a kernel needs beside the tensors.

    Attributes:
        layer: the LayerPlan's name.
        stride: per spatial dimension; empty for linear layers, as are the two below.
        padding: symmetric zero padding that the kernel itself applies.
        dilation: per spatial dimension.
        groups: of a convolution.
        pad: padding applied before the kernel, in `F.pad` order; empty if none.
        pad_mode: "constant", "reflect", "replicate" or "circular".
    """

    layer: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"


@dataclass(frozen=True)
class LayerCost:
    """What one call of a layer costs: MACs of the three passes and bytes kept for backward.

    `dense_` is the layer as it was, `sparse_` under its plan. `forward`, `input_gradient` and
    `weight_gradient` are MACs (one multiplication and one addition). `inference_macs` are those of
    a forward with the trained weights: what is zero then may have been dense in training.
    """

    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    dense_forward_macs: int = 0
    sparse_forward_macs: int = 0
    dense_input_gradient_macs: int = 0
    sparse_input_gradient_macs: int = 0
    dense_weight_gradient_macs: int = 0
    sparse_weight_gradient_macs: int = 0
    inference_macs: int = 0
    dense_saved_bytes: int = 0
    sparse_saved_bytes: int = 0


@dataclass(frozen=True)
class NodeRecord:
    """All that a node carries of ours."""

    plan: LayerPlan | None = None
    call: LayerCall | None = None
    cost: LayerCost | None = None
    role: str = ""
    cycles: dict[str, Any] = field(default_factory=dict)


_EMPTY = NodeRecord()
_Record = TypeVar("_Record", LayerCall, LayerCost)


@lru_cache(maxsize=4096)
def _density(value: float, exact: str | None) -> Density:
    """A decoded density; every pass reads every plan, and all layers share a few densities."""
    return Density.from_json([value, exact])


@lru_cache(maxsize=4096)
def _rule(text: str) -> Policy:
    """A decoded policy: all layers of a rule share one."""
    return Policy.from_json(json.loads(text))


@lru_cache(maxsize=4096)
def _text(rule: Policy) -> str:
    return json.dumps(rule.to_json())


def _encode(value: Any) -> Any:
    if isinstance(value, Policy):
        return _text(value)
    if isinstance(value, Density):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value


def _decode(kind: type[_Record], data: dict[str, Any] | None) -> _Record | None:
    if data is None:
        return None
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return kind(**values)


def read(node: fx.Node) -> NodeRecord:
    """The record of `node`; an empty one if it has none."""
    data = node.meta.get("custom", {}).get(_KEY)
    if data is None:
        return _EMPTY
    # Every pass reads every record: the decoded one stays beside the dict that it was read from.
    cached: tuple[Any, NodeRecord] = node.meta.get(_CACHE, (None, _EMPTY))
    source, record = cached
    if source is not data:
        record = _read(data)
        node.meta[_CACHE] = (data, record)
    return record


def _read(data: dict[str, Any]) -> NodeRecord:
    plan = data.get("plan")
    return NodeRecord(
        plan=None if plan is None else LayerPlan.from_json(plan),
        call=_decode(LayerCall, data.get("call")),
        cost=_decode(LayerCost, data.get("cost")),
        role=data.get("role", ""),
        cycles=data.get("cycles", {}),
    )


def write(node: fx.Node, record: NodeRecord) -> None:
    """Replace the record of `node`."""
    data: dict[str, Any] = {"role": record.role}
    if record.plan is not None:
        data["plan"] = record.plan.to_json()
    if record.cycles:
        data["cycles"] = record.cycles
    for key in ("call", "cost"):
        value = getattr(record, key)
        if value is not None:
            data[key] = {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    node.meta["custom"] = {**node.meta.get("custom", {}), _KEY: data}
    node.meta[_CACHE] = (data, record)


def update(node: fx.Node, **changes: Any) -> NodeRecord:
    """Replace some fields of the record of `node` and return the new record."""
    record = replace(read(node), **changes)
    write(node, record)
    return record


def erase(node: fx.Node) -> None:
    """Remove our record from `node`, if there is one."""
    custom = node.meta.get("custom")
    if custom and _KEY in custom:
        node.meta["custom"] = {k: v for k, v in custom.items() if k != _KEY}
