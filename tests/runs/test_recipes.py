"""Recipes against the appendix's tables 5 to 7."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from swatfx.errors import InputError, UnknownNameError
from swatfx.runs.recipes import RECIPES, learning_rate, make_optimizer, recipe_for, recipe_named

# (recipe, epochs, batch, {epoch counted from 1: rate at its start and end}, nesterov, decay)
TABLES = [
    ("cifar-resnet", 150, 128, {1: 0.1, 50: 0.1, 51: 0.01, 100: 0.01, 101: 0.001, 150: 0.001}),
    ("cifar-vgg", 150, 128, {1: 0.1, 50: 0.1, 51: 0.01, 100: 0.01, 101: 0.001, 150: 0.001}),
    ("cifar-densenet", 150, 64, {1: 0.1, 50: 0.1, 51: 0.01, 100: 0.01, 101: 0.001, 150: 0.001}),
    (
        "cifar-wrn",
        200,
        128,
        {1: 0.1, 60: 0.1, 61: 0.02, 120: 0.02, 121: 0.004, 160: 0.004, 161: 8e-4, 200: 8e-4},
    ),
    (
        "imagenet",
        90,
        256,
        {6: 0.1, 30: 0.1, 31: 0.01, 60: 0.01, 61: 1e-3, 80: 1e-3, 81: 1e-4, 90: 1e-4},
    ),
    (
        "imagenet-structured",
        90,
        256,
        {6: 0.1, 30: 0.1, 31: 0.01, 60: 0.01, 61: 1e-3, 80: 1e-3, 81: 1e-4, 90: 1e-4},
    ),
]


@pytest.mark.parametrize(("name", "epochs", "batch_size", "rates"), TABLES)
def test_schedules_are_those_of_the_tables(
    name: str, epochs: int, batch_size: int, rates: dict[int, float]
) -> None:
    recipe = recipe_named(name)
    assert (recipe.epochs, recipe.batch_size, recipe.momentum) == (epochs, batch_size, 0.9)
    for epoch, rate in rates.items():
        assert learning_rate(recipe, epoch - 1, 0.0, epochs) == pytest.approx(rate)
        assert learning_rate(recipe, epoch - 1, 0.999, epochs) == pytest.approx(rate)


def test_what_else_the_tables_say() -> None:
    said = {
        name: (r.nesterov, r.weight_decay, r.norm_weight_decay, r.label_smoothing, r.period)
        for name, r in RECIPES.items()
    }
    for name in ("cifar-resnet", "cifar-vgg", "cifar-densenet"):
        assert said[name] == (False, 5e-4, True, 0.0, 1)
    assert said["cifar-wrn"] == (True, 5e-4, True, 0.0, 1)
    for name in ("imagenet", "imagenet-structured"):
        assert said[name] == (True, 1e-4, False, 0.1, 1000)
        assert RECIPES[name].warmup_epochs == 5


def test_warm_up_is_linear_from_zero() -> None:
    recipe = recipe_named("imagenet")
    assert learning_rate(recipe, 0, 0.0, 90) == 0.0
    assert learning_rate(recipe, 0, 0.5, 90) == pytest.approx(0.01)
    assert learning_rate(recipe, 2, 0.5, 90) == pytest.approx(0.05)
    assert learning_rate(recipe, 5, 0.0, 90) == 0.1


@pytest.mark.parametrize("total", [3, 15, 30, 300, 450])
def test_a_run_of_another_length_scales_the_schedule(total: int) -> None:
    recipe = recipe_named("cifar-resnet")
    rates = [learning_rate(recipe, epoch, 0.0, total) for epoch in range(total)]
    third = total // 3
    assert rates == [0.1] * third + [0.01] * third + [0.001] * third


def test_a_run_of_one_epoch_passes_all_rates_within_it() -> None:
    recipe = recipe_named("cifar-resnet")
    assert [learning_rate(recipe, 0, p, 1) for p in (0.0, 0.34, 0.67, 0.99)] == [
        0.1,
        0.01,
        0.001,
        0.001,
    ]
    with pytest.raises(InputError, match="epoch"):
        learning_rate(recipe, 0, 0.0, 0)


def test_a_base_rate_scales_all_rates() -> None:
    recipe = recipe_named("cifar-wrn").with_base_rate(0.05)
    assert [rate for _, rate in recipe.learning_rates] == pytest.approx([0.05, 0.01, 0.002, 4e-4])
    same = recipe_named("imagenet").with_base_rate(0.1)
    assert same == recipe_named("imagenet")
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="learning rate"):
            recipe.with_base_rate(wrong)


@pytest.mark.parametrize("rates", [(), ((100, 0.1),), ((50, 0.1), (40, 0.2), (150, 0.1))])
def test_rates_that_do_not_cover_the_epochs_are_refused(
    rates: tuple[tuple[int, float], ...],
) -> None:
    with pytest.raises(InputError, match="cover"):
        dataclasses.replace(recipe_named("cifar-resnet"), learning_rates=rates)


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("cifar/resnet18", "cifar10", "cifar-resnet"),
        ("cifar/vgg16", "cifar100", "cifar-vgg"),
        ("cifar/densenet121", "cifar10", "cifar-densenet"),
        ("cifar/wrn-28-10", "cifar10", "cifar-wrn"),
        ("wide_resnet50_2", "imagenet", "imagenet"),
        ("digits/cnn", "digits", "digits"),
        ("my_package.nets:tiny", "fake/1x8x8/4", "cifar-resnet"),
    ],
)
def test_the_recipe_follows_from_network_and_data(model: str, data: str, name: str) -> None:
    assert recipe_for(model, data).name == name


def test_an_unknown_recipe_names_a_near_one() -> None:
    with pytest.raises(UnknownNameError, match="cifar-resnet"):
        recipe_named("resnet")


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2)
    )


def test_norms_do_not_decay_where_the_recipe_says_so() -> None:
    network = _network()
    optimizer = make_optimizer(recipe_named("imagenet"), network)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-4, 0.0)
    norms = [*network[1].parameters(), *network[2].parameters()]
    assert [id(p) for p in spared["params"]] == [id(p) for p in norms]
    others = [*network[0].parameters(), *network[4].parameters()]
    assert [id(p) for p in decayed["params"]] == [id(p) for p in others]
    assert decayed["nesterov"] and decayed["momentum"] == 0.9 and decayed["lr"] == 0.1


def test_one_group_where_everything_decays() -> None:
    network = _network()
    optimizer = make_optimizer(recipe_named("cifar-resnet"), network)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(network.parameters()))
    network(torch.zeros(2, 3, 4, 4)).sum().backward()
    optimizer.step()
