"""Records on nodes: what is written is read back, by later versions too."""

from __future__ import annotations

import json

import pytest
import torch
from torch import fx, nn

import swatfx
from swatfx import meta
from swatfx.compiled.layers import all_plans
from swatfx.density import Density
from swatfx.meta import LayerPlan, NodeRecord
from swatfx.policy import CONSTRUCTORS

NET = [nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)]
# As versions wrote it until 2026-11, with the rule's fields copied into every plan.
BEFORE: dict[str, object] = {
    "name": "1", "kind": "linear", "weight": "1.weight", "weight_shape": [4, 16],
    "is_first": False, "is_last": True, "skipped": None, "policy": "gradual-magnitude",
    "weight_density": [0.25, "1/4"], "activation_density": [1.0, "1"],
    "gradient_density": [1.0, "1"], "weight_selector": "held:filter",
    "activation_selector": "nchw", "gradient_selector": "nchw", "forward_weight": True,
    "forward_activation": False, "backward_weight": True, "backward_activation": False,
    "update": "active", "period": 3, "global_threshold": False, "seed": 5, "state": "layer_1",
    "counted_activation_density": None, "held": True, "starts_dense": True, "zeroed": True,
    "assumed_activation_density": [0.5, None], "kernels": "dense: asked for",
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_plans_are_read_as_they_were_written(name: str) -> None:
    policy = {"dense": "dense", "ssc": "ssc,g=2,p=2"}.get(name, f"{name}:0.5")
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
    plans = all_plans(swatfx.compile(model, policy))
    assert plans
    for plan in plans.values():
        assert LayerPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_layers_of_a_rule_share_it() -> None:
    rules = {"0": "swat-u:0.5,first_dense=False", "*": "rigl:0.9"}
    gm = swatfx.compile(nn.Sequential(*NET), swatfx.per_layer(rules))
    plans = all_plans(gm)
    assert [(p.rule.name, p.budget) for p in plans.values()] == [
        ("swat-u", 0),
        ("rigl", 1),
        ("rigl", 1),
    ]
    again = [LayerPlan.from_json(plan.to_json()) for plan in plans.values()]
    assert again[1].rule is again[2].rule


def test_a_plan_of_an_earlier_version_is_read() -> None:
    plan = LayerPlan.from_json(BEFORE)
    assert plan.weight_selector == "held:filter" and plan.rule.name == "gradual-magnitude"
    assert (
        plan.rule.hold_from_epoch == 0 and plan.rule.ramp == "cubic" and plan.rule.zeroes_inactive
    )
    assert (plan.rule.period, plan.rule.seed, plan.rule.update) == (3, 5, "active")
    assert plan.rule.assumed_activation_density == 0.5
    assert not plan.rule.backward_activation
    assert plan.weight_density == Density(0.25, Density.from_sparsity(0.75).exact)
    assert (plan.state, plan.kernels, plan.is_last) == ("layer_1", "dense: asked for", True)
    assert LayerPlan.from_json(plan.to_json()) == plan


def test_records_survive_on_nodes() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    record = NodeRecord(plan=LayerPlan.from_json(BEFORE), role="op")
    meta.write(node, record)
    node.meta["custom"] = json.loads(json.dumps(node.meta["custom"]))
    assert meta.read(node) == record
    assert torch.Size(record.plan.weight_shape).numel() == record.plan.parameters  # type: ignore[union-attr]
