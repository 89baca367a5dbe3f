"""`swatfx.observe_training`: what it tells is what training keeps, and training does not notice."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.errors import InputError, SwatWarning
from swatfx.training.telling import dead
from tests.nets.kernel_nets import residual

POLICY = "swat-u:0.8,period=2"
# Of the small layers here some lose all of a filter's weights.
pytestmark = pytest.mark.filterwarnings("ignore:layer .* filters have no active weight")


def train(gm: SwatModule, steps: int, seed: int = 0) -> list[Tensor]:
    """Losses of some steps."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = gm(torch.randn(16, 3, 8, 8)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def compiled(policy: str = POLICY, **options: Any) -> SwatModule:
    torch.manual_seed(0)
    return swatfx.compile(residual(), policy, **options)


@pytest.mark.parametrize("chosen", ["sparse", "dense"])
def test_training_does_not_notice(chosen: str) -> None:
    gm = compiled(kernels=chosen)
    twin = copy.deepcopy(gm)
    with swatfx.observe_training(gm, lambda scalars, step: None):
        found = train(gm, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, train(twin, 5), strict=True))
    for (name, one), other in zip(gm.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_what_is_told_is_what_is_kept() -> None:
    gm = compiled()
    told: list[dict[str, float]] = []
    masks: list[dict[str, Tensor]] = []

    def tell(scalars: dict[str, float], step: int) -> None:
        told.append(scalars)
        masks.append({layer.plan.name: layer.keep().clone() for layer in sparse_layers(gm)})

    with swatfx.observe_training(gm, tell), swatfx.observe(gm) as seen:
        train(gm, 3)
    last = told[-1]
    for layer in sparse_layers(gm):
        name = layer.plan.name
        mask, before = masks[-1][name], masks[-2][name]
        assert last[f"weight_density/{name}"] == seen.weight_density[name]
        if name in seen.activation_density:  # else it shares another's input
            assert last[f"activation_density/{name}"] == seen.activation_density[name]
            assert last[f"planned_activation_density/{name}"] == pytest.approx(0.2)
        assert last[f"planned_weight_density/{name}"] == pytest.approx(0.2)
        assert last[f"threshold/{name}"] == pytest.approx(
            float(layer.weight_threshold.threshold), abs=1e-7
        )
        assert last[f"churn/{name}"] == pytest.approx(
            float((mask & ~before).sum()) / float(mask.sum())
        )
        assert last[f"dead_filters/{name}"] == float((~mask.flatten(1).any(1)).sum())
    sizes = {layer.plan.name: layer.weight.numel() for layer in sparse_layers(gm)}
    mean = sum(last[f"weight_density/{n}"] * k for n, k in sizes.items()) / sum(sizes.values())
    assert last["weight_density/mean"] == pytest.approx(mean)
    assert seen.activation_density
    assert "churn/mean" not in told[0] and "churn/mean" in told[1]


def test_steps_evaluation_and_resuming(tmp_path: Path) -> None:
    gm = compiled()
    steps: list[int] = []
    observer = swatfx.observe_training(gm, lambda scalars, step: steps.append(step), every=2)
    train(gm, 3)
    with torch.no_grad():
        gm(torch.randn(2, 3, 8, 8))  # statistics of norms, say
    gm.eval()(torch.randn(2, 3, 8, 8))
    swatfx.save(gm.train(), tmp_path / "a.ckpt")
    observer.remove()
    train(gm, 2)
    assert steps == [0, 2]
    later = swatfx.load(tmp_path / "a.ckpt", residual())
    with swatfx.observe_training(later, lambda scalars, step: steps.append(step), every=2):
        train(later, 3)
    assert steps[2:] == [4, 6] and not later._forward_hooks and not later._forward_pre_hooks
    assert not any(m._forward_hooks for m in later.swat.modules())


def test_targets(tmp_path: Path) -> None:
    class Board:
        def __init__(self) -> None:
            self.found: dict[tuple[str, int], float] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.found[tag, global_step] = scalar_value

    gm, board, file = compiled(), Board(), tmp_path / "a.jsonl"
    with swatfx.observe_training(gm, [board, file, lambda scalars, step: None]):
        train(gm, 2)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert {tag for tag, step in board.found if step == 1} == set(lines[1]) - {"step"}
    for target in ("", tmp_path, tmp_path / "no" / "a.jsonl", 3):
        with pytest.raises(InputError):
            swatfx.observe_training(gm, target)
    assert not gm._forward_hooks


def test_a_forward_that_fails_leaves_nothing() -> None:
    gm = compiled()
    with swatfx.observe_training(gm, lambda scalars, step: None):
        with pytest.raises(RuntimeError):
            gm(torch.randn(2, 5, 8, 8))
        train(gm, 1)
    assert not any(m._forward_hooks for m in gm.swat.modules())


def test_dead_filters_are_warned_of_once() -> None:
    gm = compiled("swat-u:0.8,period=1000")
    weight = gm.get_parameter("1.conv1.weight")
    with torch.no_grad():
        weight[3] = 0
        weight[:, 5] = 0
    told: list[dict[str, float]] = []
    with swatfx.observe_training(gm, lambda scalars, step: told.append(scalars)):
        with pytest.warns(SwatWarning, match="1.conv1.*1 of 16 filters"):
            gm(torch.randn(16, 3, 8, 8)).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gm(torch.randn(16, 3, 8, 8)).sum().backward()
    assert told[0]["dead_filters/1.conv1"] == 1 and told[0]["dead_channels/1.conv1"] == 1


def test_dead_of_groups_and_matrices() -> None:
    mask = torch.ones(6, 2, 3, 3, dtype=torch.bool)
    mask[4:] = False  # a group of two filters: both, and both of its channels
    assert dead(mask, 3) == (2, 2)
    mask[0, 1] = mask[1, 1] = False
    assert dead(mask, 3) == (2, 3)
    assert dead(torch.eye(4, dtype=torch.bool)[:3]) == (0, 1)


def test_rigl_and_wrappers() -> None:
    gm = compiled("rigl:0.8,update_every=2")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    swatfx.attach(gm, optimizer, total_steps=100)
    told: list[dict[str, float]] = []
    wrapped = nn.Sequential(gm)
    with swatfx.observe_training(gm, lambda scalars, step: told.append(scalars)):
        for _ in range(6):
            optimizer.zero_grad()
            wrapped(torch.randn(16, 3, 8, 8)).square().mean().backward()
            optimizer.step()
    assert any(one.get("churn/mean", 0) > 0 for one in told)
    assert len({one["weight_density/1.conv1"] for one in told}) == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_forwards_are_not_seen() -> None:
    gm = compiled()
    told: list[int] = []
    with swatfx.observe_training(gm, lambda scalars, step: told.append(step)):
        fast = torch.compile(gm, backend="aot_eager")
        fast(torch.randn(16, 3, 8, 8)).sum().backward()
        assert not told
        gm(torch.randn(16, 3, 8, 8)).sum().backward()
    assert told == [1]
