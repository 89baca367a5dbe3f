"""swatfx.tune: budgets are kept, policies are ordinary, models stay as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import all_plans
from swatfx.errors import InputError, PolicyError, SwatError
from swatfx.policy import Policy
from swatfx.tuning.costs import planned_inputs
from swatfx.tuning.search import cost, densities_of, tune
from tests.nets.small_nets import (
    EagerMiddle,
    EagerRoot,
    Residual,
    Tied,
    assert_same,
    pads,
    plain,
    snapshot,
)
from tests.nets.tuning_nets import META, Batch, compiled, images


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("objective", ["macs", "saved_bytes", "cycles:tensordash", "cycles:ideal"])
def test_the_budget_is_kept_and_used(objective: str, separate: bool) -> None:
    model, gm = compiled()
    for sparsity in (0.8, 0.5):
        other = swatfx.compile(model, f"swat-u:{sparsity},first_dense=False")
        allowed = cost(other, META, objective)
        policy = tune(gm, images(), objective, budget=other, separate=separate)
        found = cost(swatfx.compile(model, policy), META, objective)
        assert found.total <= allowed.total
        assert found.fraction > allowed.fraction - 0.05


@pytest.mark.parametrize("net", [plain, Residual, EagerMiddle, pads])
def test_the_budget_is_that_of_another_policy(net: Callable[[], nn.Module]) -> None:
    model, gm = compiled(net=net)
    other = swatfx.compile(model, "swat-u:0.8")
    loss_fn = None if net is not pads else (lambda y, labels: y.square().mean())
    allowed = cost(other, (images()[0][0],))
    found = tune(gm, images(), budget=other, loss_fn=loss_fn)
    assert tune(gm, images(), budget=allowed, loss_fn=loss_fn) == found
    assert cost(swatfx.compile(model, found), (images()[0][0],)).total <= allowed.total


def test_models_that_look_at_values_are_measured_on_real_inputs() -> None:
    model, gm = compiled(net=EagerRoot)
    rows = [torch.randn(6, 12, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert planned_inputs(gm, (rows[0],))[0] is rows[0]
    policy = tune(gm, rows, budget=0.4, loss_fn=lambda y: y.square().mean())
    assert cost(swatfx.compile(model, policy), (rows[0],)).fraction <= 0.4


def test_a_shared_weight_is_one_layer() -> None:
    model, gm = compiled(net=Tied)
    rows = [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    policy = tune(gm, rows, budget=0.5, loss_fn=lambda y: y.square().mean())
    assert set(densities_of(policy)) == {"first", "again"}
    assert cost(swatfx.compile(model, policy), (rows[0],)).fraction <= 0.5


def test_layers_that_store_one_activation_stay_together_where_bytes_count() -> None:
    _, gm = compiled()
    found = densities_of(tune(gm, images(), "saved_bytes", budget=0.6))
    assert found["block1.conv1"] == found["block1.down"]
    assert found["block2.conv1"] == found["block2.down"]
    apart = densities_of(tune(gm, images(), "macs", budget=0.1))
    assert apart["block2.conv1"] != apart["block2.down"]


def test_the_policy_is_the_models_own_but_for_densities(tmp_path: Any) -> None:
    text = "swat-u:0.9,period=7,weight_selector=channel,activation_selector=chw,last_dense=true"
    model, gm = compiled(text)
    policy = tune(gm, images(), budget=0.5)
    assert policy.name == "tuned(swat-u)"
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy.to_json()))
    assert Policy.from_json(json.loads(path.read_text())) == policy
    plans = all_plans(swatfx.compile(model, policy))
    skipped = {name for name, plan in plans.items() if not plan.takes_part}
    assert skipped == {"stem", "fc"}
    for name, plan in plans.items():
        if name in skipped:
            continue
        assert (plan.rule.period, plan.weight_selector, plan.rule.activation_selector) == (
            7,
            "channel",
            "chw",
        )
        assert plan.weight_density == plan.activation_density
        assert plan.weight_density.exact is not None
        assert plan.weight_density.value == densities_of(policy)[name][0]
    assert len({plan.weight_density for plan in plans.values()}) > 2


def test_a_given_activation_sparsity_stays() -> None:
    _, gm = compiled("swat-u:0.9,first_dense=False,activation_sparsity=0.75")
    found = densities_of(tune(gm, images(), budget=0.4))
    assert {activation for _, activation in found.values()} == {0.25}
    assert len({weight for weight, _ in found.values()}) > 2
    free = densities_of(tune(gm, images(), budget=0.4, separate=True))
    assert len({activation for _, activation in free.values()}) > 2


def test_every_filter_keeps_weights() -> None:
    _, gm = compiled()
    least = cost(compiled("swat-u:0.99,first_dense=False")[1], META).fraction
    with pytest.raises(InputError, match="least possible") as caught:
        tune(gm, images(), budget=least)
    reachable = float(str(caught.value).split("least possible is ")[1].split()[0])
    found = tune(gm, images(), budget=reachable)
    plans = all_plans(gm)
    for name, (weight, _) in densities_of(found).items():
        assert weight * math.prod(plans[name].weight_shape[1:]) >= 2 - 1e-9
    with pytest.raises(InputError, match="least possible"):
        tune(gm, images(), budget=reachable - 2e-4)


def test_the_whole_budget_keeps_everything() -> None:
    _, gm = compiled()
    assert set(densities_of(tune(gm, images(), budget=1.0)).values()) == {(1.0, 1.0)}


def test_layers_of_one_density_keep_it() -> None:
    rules = {"block1.*": "swat-u:0.5,weight_selector=2:4", "block2.*": "swat-erk:0.9"}
    torch.manual_seed(0)
    model = Residual()
    gm = swatfx.compile(model, swatfx.per_layer(rules))
    policy = tune(gm, images(), budget=0.75)
    found = densities_of(policy)
    names = ["block1.conv1", "block1.conv2", "block1.down"]
    assert [found[name][0] for name in names] == [0.5] * 3
    assert dict(policy.rules)["block1.down"].weight_selector == "2:4"
    assert len({found[f"block2.{n}"][0] for n in ("conv1", "conv2", "down")}) > 1
    assert cost(swatfx.compile(model, policy), META).fraction <= 0.75


def test_names_are_no_patterns() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a[0]", nn.Linear(6, 6))
            self.add_module("a0", nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("a0")(self.get_submodule("a[0]")(x).relu())

    model, gm = compiled(net=Odd)
    rows = [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    policy = tune(gm, rows, budget=0.6, loss_fn=lambda y: y.square().mean())
    plans = all_plans(swatfx.compile(model, policy))
    found = list(densities_of(policy).values())
    assert [plans[name].weight_density.value for name in ("a[0]", "a0")] == [w for w, _ in found]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    _, gm = compiled(net=lambda: Residual(dropout=0.5))
    gm.train(training)
    gm(images()[0][0]).sum().backward()
    before, state = snapshot(gm), torch.get_rng_state()
    gradients = {name: p.grad.clone() for name, p in gm.named_parameters()}
    first = tune(gm, images(), budget=0.3)
    assert torch.equal(torch.get_rng_state(), state) and gm.training is training
    assert_same(before, snapshot(gm))
    for name, parameter in gm.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    assert tune(gm, images(), budget=0.3) == first


def test_only_so_many_batches_are_read() -> None:
    _, gm = compiled()
    read = []

    def data() -> Iterator[Batch]:
        for batch in images(9):
            read.append(None)
            yield batch

    tune(gm, data(), budget=0.3, batches=2)
    assert len(read) == 2


def test_several_inputs_and_a_loss_of_ones_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.b(self.a(x).relu() * scale)

    _, gm = compiled(net=Two)
    called = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        called.append(target)
        return F.mse_loss(output, target)

    batch = ((torch.randn(5, 6), torch.ones(8)), torch.zeros(5, 8))
    assert set(densities_of(tune(gm, [batch], budget=0.5, loss_fn=loss_fn))) == {"a", "b"}
    assert called == [batch[1]]


# Errors


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, True, "swat-u:0.9", None])
def test_budgets_that_are_none(budget: Any) -> None:
    _, gm = compiled()
    with pytest.raises(InputError, match="fraction in"):
        tune(gm, images(), budget=budget)


def test_a_budget_of_another_objective() -> None:
    _, gm = compiled()
    with pytest.raises(InputError, match="counts saved_bytes, not macs"):
        tune(gm, images(), budget=cost(gm, META, "saved_bytes"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        ([{"x": 1}], "a batch is"),
        ([torch.randn(2, 3, 8, 8)], "loss function"),
        ([(torch.full((2, 3, 8, 8), math.nan), torch.zeros(2).long())], "not a finite number"),
    ],
)
def test_data_that_do_not_do(data: list[Any], message: str) -> None:
    _, gm = compiled(net=plain)
    with pytest.raises(SwatError, match=message):
        tune(gm, data, budget=0.5)


def test_a_loss_that_is_no_number() -> None:
    _, gm = compiled()
    with pytest.raises(SwatError, match="not a finite number"):
        tune(gm, images(), budget=0.5, loss_fn=lambda y, labels: y)


def test_a_model_without_gradients() -> None:
    _, gm = compiled()
    with pytest.raises(InputError, match="no layer has a gradient"):
        tune(gm, images(), budget=0.5, loss_fn=lambda y, labels: (y * 0).sum())


def test_no_batches() -> None:
    _, gm = compiled()
    with pytest.raises(InputError, match="batches has to be a whole number, at least 1"):
        tune(gm, images(), budget=0.5, batches=0)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("swat-m:0.9", "move by themselves"),
        ("set:0.9", "masks are held"),
        ("static:0.9", "masks are held"),
        ("gradual-magnitude:0.9", "move by themselves"),
        ("meprop:0.9", "no density to choose"),
        ("swat-u:0.5,weight_selector=2:4,activation_sparsity=0.5", "no density to choose"),
    ],
)
def test_policies_that_cannot_be_tuned(policy: str, message: str) -> None:
    _, gm = compiled(policy)
    with pytest.raises(PolicyError, match=message):
        tune(gm, images(), budget=0.5)


def test_what_is_not_compiled() -> None:
    with pytest.raises(InputError, match="swatfx.compile"):
        tune(plain(), images(), budget=0.5)
