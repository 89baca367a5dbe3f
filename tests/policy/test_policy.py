"""Policies are values: strings, JSON, equality, rules."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import Tensor

import swatfx
from swatfx import policy
from swatfx.compiled.layers import all_plans, sparse_layers
from swatfx.density import Density
from swatfx.errors import PolicyError
from swatfx.policy import Policy, as_policy, parse
from tests.nets.small_nets import Residual, plain, sgd, train

STRINGS = {
    "dense": swatfx.dense(),
    "swat-u:0.9": swatfx.swat_u(0.9),
    " swat_u:0.9 ": swatfx.swat_u(0.9),
    "swat-u:0.9,period=1000": swatfx.swat_u(0.9, period=1000),
    "swat-u:.9,first-dense=false,last_dense=True": swatfx.swat_u(
        0.9, first_dense=False, last_dense=True
    ),
    "swat-u:0.5, weight_selector=2:4": swatfx.swat_u(0.5, weight_selector="2:4"),
    "swat-u:0.9,activation_sparsity=0.5": swatfx.swat_u(0.9, activation_sparsity=0.5),
    "swat-u:0.9,activation_sparsity=None": swatfx.swat_u(0.9),
    "swat-erk:0.95": swatfx.swat_erk(0.95),
    "swat-er:0.95,seed=3": swatfx.swat_er(0.95, seed=3),
    "swat-m:0.9,redistribute_every=10": swatfx.swat_m(0.9, redistribute_every=10),
    "saw:0.8": swatfx.saw(0.8),
    "saw:0.8,forward_weight=true": swatfx.saw(0.8, forward_weight=True),
    "meprop:0.9,gradient_selector=chw": swatfx.meprop(0.9, gradient_selector="chw"),
    "swat-u:0": swatfx.swat_u(0.0),
    "swat-u:0.9,update=active,global_threshold=true": swatfx.swat_u(
        0.9, update="active", global_threshold=True
    ),
}
RULES = swatfx.per_layer(
    {"block1.*": "swat-erk:0.8", "block2.conv?": swatfx.swat_u(0.5, weight_selector="2:4")},
    default="swat-m:0.9",
)


@pytest.mark.parametrize("text", STRINGS)
def test_strings(text: str) -> None:
    assert parse(text) == STRINGS[text] == as_policy(text)
    assert as_policy(STRINGS[text]) is STRINGS[text]


@pytest.mark.parametrize("value", [*STRINGS.values(), RULES], ids=lambda p: p.name)
def test_json_round_trip(value: Policy) -> None:
    text = json.dumps(value.to_json())
    back = Policy.from_json(json.loads(text))
    assert back == value and hash(back) == hash(value)
    assert back.to_json() == value.to_json()


def test_policies_are_frozen_values() -> None:
    one, other = swatfx.swat_u(0.9), swatfx.swat_u(0.9)
    assert one == other and len({one, other, RULES, RULES}) == 2
    with pytest.raises(FrozenInstanceError):
        one.sparsity = 0.5  # type: ignore[misc]
    assert replace(one, period=5) == swatfx.swat_u(0.9, period=5) != one
    with pytest.raises(PolicyError):
        replace(one, sparsity=1.0)


def test_every_method_is_its_fields_alone() -> None:
    """A policy spelled out field by field compiles to the same graph as the constructor's."""
    spelled = Policy(
        "mine",
        sparsity=0.8,
        distribution="uniform",
        forward_weight=True,
        backward_weight=True,
        backward_activation=True,
        first_dense=True,
    )
    ours = swatfx.compile(Residual(), spelled)
    theirs = swatfx.compile(Residual(), swatfx.swat_u(0.8))
    assert ours.code == theirs.code
    plans = zip(all_plans(ours).values(), all_plans(theirs).values(), strict=True)
    for a, b in plans:
        assert dataclasses.replace(a, rule=b.rule) == b
        assert dataclasses.replace(a.rule, name=b.rule.name) == b.rule


def test_table_of_variants() -> None:
    """What is sparse where, as the table of the paper's variants says."""
    table = {
        swatfx.swat_u(0.9): ("w", "", "w", "a", 0.0),
        swatfx.saw(0.9): ("", "", "w", "a", 0.0),
        swatfx.meprop(0.9): ("", "", "", "", 0.9),
        swatfx.dense(): ("", "", "", "", 0.0),
    }
    for value, expected in table.items():
        have = (
            "w" * value.forward_weight,
            "a" * value.forward_activation,
            "w" * value.backward_weight,
            "a" * value.backward_activation,
            value.gradient_sparsity,
        )
        assert have == expected, value.name


def test_docstring_tells_every_field() -> None:
    assert Policy.__doc__ is not None
    for field in fields(Policy):
        assert f"        {field.name}: " in Policy.__doc__, field.name
    for name, build in policy.CONSTRUCTORS.items():
        assert build.__doc__, name


def test_own_constructor_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(sparsity: float, **options: object) -> Policy:
        """Mine."""
        return swatfx.swat_u(sparsity, last_dense=True, **options)  # type: ignore[arg-type]

    monkeypatch.setitem(policy.CONSTRUCTORS, "mine", mine)
    assert parse("mine:0.7,period=3") == swatfx.swat_u(0.7, last_dense=True, period=3)


def test_first_matching_rule_wins() -> None:
    rules = {
        "block1.conv1": "swat-u:0.5,first_dense=false",
        "block1.*": "swat-u:0.8,first_dense=false",
        "*": "dense",
    }
    gm = swatfx.compile(Residual(), swatfx.per_layer(rules))
    plans = all_plans(gm)
    assert plans["block1.conv1"].weight_density == Density.from_sparsity(0.5)
    assert plans["block1.conv2"].weight_density == Density.from_sparsity(0.8)
    assert plans["block2.conv1"].skipped == "policy 'dense'"
    assert plans["block1.conv1"].rule.name == "swat-u"


def test_default_of_per_layer() -> None:
    policy = swatfx.per_layer({"fc": "dense"}, default="swat-u:0.9,first_dense=false")
    plans = all_plans(swatfx.compile(Residual(), policy))
    assert [name for name, plan in plans.items() if not plan.takes_part] == ["fc"]
    assert {p.weight_density for p in plans.values() if p.takes_part} == {
        Density.from_sparsity(0.9)
    }


def _active(gm: object, prefix: str) -> tuple[float, int]:
    layers = [x for x in sparse_layers(gm) if x.plan.name.startswith(prefix)]  # type: ignore[arg-type]
    active = sum(x.weight_density.value * x.weight.numel() for x in layers)
    return active, sum(x.weight.numel() for x in layers)


def test_each_rule_shares_its_own_budget_even_if_equal() -> None:
    rules = {"block1.*": "swat-erk:0.7", "block2.*": "swat-erk:0.7"}
    gm = swatfx.compile(Residual(), swatfx.per_layer(rules))
    for prefix in ("block1.", "block2."):
        active, total = _active(gm, prefix)
        assert active / total == pytest.approx(0.3, abs=1e-6), prefix
    alone = swatfx.compile(Residual(), swatfx.per_layer({"block2.*": "swat-erk:0.7"}))
    for a, b in zip(sparse_layers(alone), list(sparse_layers(gm))[3:], strict=True):
        assert a.plan.name == b.plan.name and a.weight_density == b.weight_density


def test_rules_with_their_own_period_and_selectors_train() -> None:
    gm = swatfx.compile(Residual(), RULES)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    data: list[Tensor] = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    train(gm, optimizer, data)
    for prefix, density in (("block1.", 0.2), ("block2.conv", 0.5)):
        active, total = _active(gm, prefix)
        assert active / total == pytest.approx(density, abs=1e-6)


def test_per_layer_rules_are_checked() -> None:
    nested = swatfx.per_layer({"0": "dense"}, default="swat-u:0.9")
    with pytest.raises(PolicyError, match="do not nest"):
        swatfx.per_layer({"0": nested})
    with pytest.raises(PolicyError, match="default is itself per_layer"):
        swatfx.per_layer({"0": "dense"}, default=nested)
    with pytest.raises(PolicyError, match=r"matches no layer.*'9'"):
        swatfx.compile(plain(), swatfx.per_layer({"9": "swat-u:0.5"}, default="swat-u:0.9"))


def test_first_and_last_dense() -> None:
    gm = swatfx.compile(plain(), swatfx.swat_u(0.9, last_dense=True))
    skipped = {name: plan.skipped for name, plan in all_plans(gm).items()}
    assert skipped == {"0": "first layer", "2": None, "5": "last layer"}
    gm = swatfx.compile(plain(), swatfx.swat_erk(0.9))
    assert not any(plan.skipped for plan in all_plans(gm).values())


@pytest.mark.parametrize("item", ["weight_selector", "weight_selector=", "period", "period= "])
def test_a_field_without_a_value_says_so(item: str) -> None:
    field = item.partition("=")[0]
    with pytest.raises(PolicyError, match=f"'{field}' is given no value.*{field}=") as said:
        parse(f"swat-u:0.8,{item}")
    assert "did you mean" not in str(said.value)
