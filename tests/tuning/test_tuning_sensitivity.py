"""The first-order estimate behind swatfx.tune, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx.tuning.search import densities_of, tune
from swatfx.tuning.sensitivity import batches_of, sensitivity
from tests.nets.small_nets import plain
from tests.nets.tuning_nets import compiled, images, layers_of

GRID = (0.05, 0.1, 0.2, 0.5, 1.0)


def test_importance_is_the_mean_square_of_first_order_changes() -> None:
    model, gm = compiled("swat-u:0.9,first_dense=False,period=100", plain)
    data = images()
    for x, _ in data:  # thresholds of later iterations are old ones
        gm(x)
    found = sensitivity(gm, batches_of(data, 9), None, GRID, quiet=True)
    weight = model[2].weight
    wanted = []
    for x, y in data:
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), weight)
        wanted.append(float((gradient * weight.detach()).square().sum()))
    assert found.importance["2"] == pytest.approx(sum(wanted) / 3, rel=1e-4)


def test_energies_are_shares_of_the_sum_of_squares() -> None:
    model, gm = compiled(net=plain)
    data = images(2)
    found = sensitivity(gm, batches_of(data, 2), None, GRID, quiet=True)
    squares = model[2].weight.detach().square().flatten().sort(descending=True).values
    for density, share in zip(GRID, found.weight_energy["2"], strict=True):
        kept = squares[: math.ceil(density * squares.numel() - 1e-6)].sum() / squares.sum()
        assert share == pytest.approx(float(kept), rel=1e-5)
    shares = []
    for x, _ in data:
        inner = torch.relu(model[0](x)).detach().square().flatten().sort(descending=True).values
        shares.append(float(inner[: math.ceil(0.1 * inner.numel())].sum() / inner.sum()))
    assert found.activation_energy["2"][1] == pytest.approx(sum(shares) / 2, rel=1e-4)
    losses = found.weight_loss("2")
    noise = 1 / found.weight_energy["2"] - 1
    assert losses == pytest.approx(found.importance["2"] * noise, rel=1e-6, abs=1e-12)
    assert (np.diff(losses) <= 0).all() and losses[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("selector", ["channel", "hw", "random", "input-channel"])
def test_energies_are_of_what_the_selector_keeps(selector: str) -> None:
    _, gm = compiled(f"swat-u:0.8,first_dense=False,weight_selector={selector}", plain)
    found = sensitivity(gm, batches_of(images(1), 1), None, (0.2, 1.0), quiet=True)
    squares = layers_of(gm)["2"].weight.detach().square()
    kept = (squares * layers_of(gm)["2"].keep()).sum() / squares.sum()
    tolerance = 0.1 if selector == "random" else 1e-5
    assert found.weight_energy["2"][0] == pytest.approx(float(kept), abs=tolerance)
    assert found.weight_energy["2"][1] == pytest.approx(1)


class Branches(nn.Module):
    """Two branches of the same shape, of which one hardly reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Conv2d(3, 8, 3, padding=1)
        self.quiet = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.loud(x) + 0.01 * self.quiet(x)).relu().mean((2, 3)))


def test_layers_that_matter_more_keep_more() -> None:
    _, gm = compiled(net=Branches)
    found = densities_of(tune(gm, images(), budget=0.3))
    assert found["loud"][0] > 2 * found["quiet"][0]


def test_weights_that_are_computed_or_frozen_count_too() -> None:
    def net() -> nn.Module:
        model = plain()
        nn.utils.parametrizations.weight_norm(model[2])
        model[0].weight.requires_grad_(False)
        return model

    model, gm = compiled(net=net)
    found = sensitivity(gm, batches_of(images(1), 1), None, GRID, quiet=True)
    assert found.importance["0"] > 0
    bare = plain()
    bare[2].weight.data.copy_(model[2].weight.detach())
    for index in (0, 5):
        bare[index].load_state_dict(model[index].state_dict())
    bare[2].bias.data.copy_(model[2].bias.detach())
    wanted = sensitivity(
        swatfx.compile(bare, "swat-u:0.9"), batches_of(images(1), 1), None, GRID, quiet=True
    )
    assert found.importance["2"] == pytest.approx(wanted.importance["2"], rel=1e-4)
