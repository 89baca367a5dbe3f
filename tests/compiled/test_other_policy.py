"""States of another policy are refused, and nothing changes; masks from ties keep their density."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import selectors
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.density import Density
from swatfx.errors import CheckpointError
from swatfx.selectors import Axes, Held
from swatfx.selectors.topk import exact_top
from tests.nets.small_nets import EagerMiddle, assert_same, plain, snapshot

PAIRS = [
    ("swat-u:0.9", "swat-u:0.5", "sparsity 0.9 saved, 0.5 here"),
    ("swat-u:0.9", "swat-u:0.9,period=100", "period 1 saved, 100 here"),
    ("swat-u:0.9", "swat-u:0.9,weight_selector=channel", "weight_selector 'nchw' saved"),
    ("swat-u:0.9", "swat-u:0.9,activation_selector=chw", "activation_selector"),
    ("swat-u:0.9", "swat-erk:0.9", "'swat-u:0.9'.*'swat-erk:0.9'.*distribution"),
    ("rigl:0.9", "set:0.9", "'rigl:0.9'.*'set:0.9'"),
    ("swat-u:0.9", "saw:0.9", "forward_weight"),
]
Load = Callable[[SwatModule, dict[str, Any]], Any]
LOADS: dict[str, Load] = {
    "strict": lambda gm, state: gm.load_state_dict(state),
    "not strict": lambda gm, state: gm.load_state_dict(state, strict=False),
    "assign": lambda gm, state: gm.load_state_dict(state, assign=True),
    "parent": lambda gm, state: nn.Sequential(gm).load_state_dict(
        {f"0.{name}": value for name, value in state.items()}
    ),
    "swat alone": lambda gm, state: gm.swat.load_state_dict(
        {n.removeprefix("swat."): v for n, v in state.items() if n.startswith("swat.")}
    ),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))
@pytest.mark.parametrize(("saved", "here", "message"), PAIRS)
@pytest.mark.parametrize("build", [plain, EagerMiddle])
def test_the_state_of_another_policy_is_refused_and_nothing_changes(
    build: Callable[[], nn.Module], saved: str, here: str, message: str, load: Load
) -> None:
    torch.manual_seed(1)
    state = swatfx.compile(build(), saved).state_dict()
    gm = swatfx.compile(build(), here)
    before = snapshot(gm)
    with pytest.raises(CheckpointError, match=message):
        load(gm, state)
    assert_same(snapshot(gm), before)
    dense = {name: value for name, value in state.items() if not name.startswith("swat.")}
    gm.load_state_dict(dense)  # the remedy
    twin = swatfx.compile(build(), here)
    twin.load_state_dict(gm.state_dict())
    assert_same(dict(twin.state_dict()), dict(gm.state_dict()))


def test_a_state_of_an_earlier_version_names_the_density() -> None:
    def old(policy: str) -> dict[str, Tensor]:
        state = swatfx.compile(plain(), policy).state_dict()
        return {name: value for name, value in state.items() if "_extra_state" not in name}

    gm = swatfx.compile(plain(), "swat-u:0.5")
    before = snapshot(gm)
    with pytest.raises(CheckpointError, match="density 0.1 saved, 0.5 here"):
        gm.load_state_dict(old("swat-u:0.9"))
    assert_same(snapshot(gm), before)
    state = old("swat-u:0.5")
    gm.load_state_dict(state, strict=True)
    assert_same({name: gm.state_dict()[name] for name in state}, state)
    momentum = swatfx.compile(plain(), "swat-m:0.9")  # there, densities move: any may come back
    for layer in sparse_layers(momentum):
        layer.set_density(Density(0.3))
    moved = {n: v for n, v in momentum.state_dict().items() if "_extra_state" not in n}
    swatfx.compile(plain(), "swat-m:0.9").load_state_dict(moved)


def test_save_and_load_read_states_without_the_policy(tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(plain(), "swat-u:0.8,period=3")
    path = tmp_path / "new.ckpt"
    swatfx.save(gm, path)
    assert_same(dict(swatfx.load(path, plain()).state_dict()), dict(gm.state_dict()))


def test_a_policy_that_cannot_be_read() -> None:
    gm = swatfx.compile(plain(), "swat-u:0.8")
    for bad in (torch.tensor([1, 2, 3], dtype=torch.uint8), "swat-u:0.8", torch.zeros(0)):
        with pytest.raises(CheckpointError, match="policy in the state cannot be read"):
            gm.load_state_dict({**gm.state_dict(), "swat._extra_state": bad})


# ---- Masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["nchw", "chw", "hw", "channel", "channel-per-filter"])
@pytest.mark.parametrize("fill", ["zeros", "ones", "pruned", "steps", "distinct"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_a_held_mask_has_its_density_whatever_the_weights(
    selector: str, fill: str, sparsity: float
) -> None:
    torch.manual_seed(0)
    weight = {
        "zeros": lambda: torch.zeros(6, 8, 3, 3),
        "ones": lambda: -torch.ones(6, 8, 3, 3),
        "pruned": lambda: torch.randn(6, 8, 3, 3).masked_fill_(torch.rand(6, 8, 3, 3) < 0.95, 0),
        "steps": lambda: torch.randint(-2, 3, (6, 8, 3, 3)).float(),
        "distinct": lambda: torch.randn(6, 8, 3, 3),
    }[fill]()
    density = Density.from_sparsity(sparsity)
    base, axes = selectors.get(selector), Axes(0, 1)
    held = selectors.get(f"held:{selector}")
    assert isinstance(held, Held)
    keep = held.keep(weight, held.state(weight, density, axes, 0), axes)
    scores = base.score(weight, axes)
    chosen = keep if scores.shape == weight.shape else keep[:, :, :1, :1]
    assert torch.equal(chosen.expand_as(weight), keep)
    groups = base.state_shape(tuple(weight.shape), axes)
    split = [d for d, n in enumerate(groups) if n > 1]
    scored = scores.flatten(len(split)) if split else scores.reshape(-1)
    rows = chosen.flatten(len(split)) if split else chosen.reshape(-1)
    for score, row in zip(
        scored.reshape(-1, scored.shape[-1]), rows.reshape(-1, rows.shape[-1]), strict=True
    ):
        order = score.sort(descending=True, stable=True).indices
        expected = torch.zeros_like(row)
        expected[order[: density.count(row.numel())]] = True
        assert torch.equal(row, expected)  # of equal ones, the first


def test_exact_top_of_a_large_tensor() -> None:
    scores = torch.randint(0, 4, (300, 300)).float()
    keep = exact_top(scores, Density.from_sparsity(0.9), ())
    assert int(keep.sum()) == 9000
    order = scores.flatten().sort(descending=True, stable=True).indices[:9000]
    assert torch.equal(keep.flatten().nonzero().squeeze(1), order.sort().values)


def test_of_equal_weights_2_to_4_keeps_the_first() -> None:
    chosen = selectors.get("2:4")
    weight = torch.ones(3, 8)
    state = chosen.state(weight, Density.from_sparsity(0.5), Axes(0, 1), 0)
    keep = chosen.keep(weight, state, Axes(0, 1))
    assert torch.equal(keep, torch.tensor([True, True, False, False] * 2).expand(3, 8))


def test_the_mask_that_is_frozen_of_a_model_that_was_pruned_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
    with torch.no_grad():
        model[2].weight.masked_fill_(torch.rand(32, 32) < 0.97, 0)
    gm = swatfx.compile(model, "swat-frozen:0.9,hold_from_epoch=1")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.0)
    swatfx.attach(gm, optimizer, steps_per_epoch=1)
    gm(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    (layer,) = sparse_layers(gm)
    assert layer.weight_threshold.is_held
    assert int(layer.keep().sum()) == layer.weight_density.count(1024) == 103
