"""SWAT-M's shares of momentum, against a plain reimplementation of training and of the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from tests.nets.any_optimizer import FORMS

DENSITY = 0.1


class Shortcut(nn.Module):
    """(N, 16, 6, 6) -> (N, 10), with a shortcut of 512 weights beside layers of thousands."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.down = nn.Conv2d(16, 32, 1, bias=False)
        self.fc = nn.Linear(32, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.relu(self.conv1(x))) + self.down(x)
        out: Tensor = self.fc(torch.relu(y).mean((2, 3)))
        return out


def _momentum(state: dict[str, Any]) -> Tensor:
    if "exp_avg" in state:
        ratio: Tensor = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        return ratio
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def _top(w: Tensor, count: int) -> Tensor:
    return w.abs() >= w.abs().flatten().sort(descending=True).values[count - 1]


def _budgets(means: list[float], sizes: list[int]) -> list[int]:
    """By the book: shares of the total, what passes 0.99 of a layer shared out equally."""
    total = DENSITY * sum(sizes)
    counts = [-(-m * total // sum(means)) for m in means]
    full: set[int] = set()
    while True:
        over = [i for i, c in enumerate(counts) if i not in full and c > 0.99 * sizes[i]]
        if not over:
            return [min(s, int(c)) for s, c in zip(sizes, counts, strict=True)]
        excess = sum(counts[i] - sizes[i] for i in over)
        full |= set(over)
        rest = [i for i in range(len(sizes)) if i not in full]
        for i in over:
            counts[i] = sizes[i]
        for i in rest:
            counts[i] += excess / len(rest)


@pytest.mark.parametrize("form", ["SGD", "SGD fused", "SGD nesterov", "Adam", "AdamW fused"])
def test_shares_are_those_of_the_weights_that_forward_saw(form: str) -> None:
    """To five digits in every step: not of what is active once the optimizer has moved them."""
    torch.manual_seed(0)
    model = Shortcut().double()
    gm = swatfx.compile(model, swatfx.swat_m(1 - DENSITY))
    optimizer = FORMS[form](gm.parameters())
    optimizer.param_groups[0]["lr"] = 0.5 if form.startswith("SGD") else 0.05
    swatfx.attach(gm, optimizer)
    layers = list(sparse_layers(gm))
    sizes = [layer.weight.numel() for layer in layers]
    counts = [layer.weight_density.count(n) for layer, n in zip(layers, sizes, strict=True)]
    moved = False
    for step in range(8):
        x = torch.randn(8, 16, 6, 6, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        nn.functional.cross_entropy(gm(x), torch.arange(8)).backward()
        active = [_top(x.weight.detach(), n) for x, n in zip(layers, counts, strict=True)]
        optimizer.step()
        states = [_momentum(optimizer.state[layer.weight]).abs() for layer in layers]
        means = [m[mask].mean().item() for m, mask in zip(states, active, strict=True)]
        after = [_top(x.weight.detach(), n) for x, n in zip(layers, counts, strict=True)]
        moved = moved or any(not torch.equal(a, b) for a, b in zip(active, after, strict=True))
        counts = _budgets(means, sizes)
        for layer, size, count in zip(layers, sizes, counts, strict=True):
            assert layer.weight_density.value == pytest.approx(count / size, abs=1e-5), step
    assert moved  # else the test could not tell


def test_a_small_layer_whose_weights_all_turn_over() -> None:
    """After a large step, other weights are the largest: theirs is the momentum that moved them."""
    torch.manual_seed(0)
    gm = swatfx.compile(Shortcut(), swatfx.swat_m(1 - DENSITY))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.0, momentum=0.9)
    swatfx.attach(gm, optimizer)
    layers = {layer.plan.name: layer for layer in sparse_layers(gm)}
    gm(torch.randn(2, 16, 6, 6)).sum().backward()
    for layer in layers.values():
        layer.weight.grad = torch.full_like(layer.weight, 0.01)
    active = layers["down"].keep()
    gradient = torch.where(active, 0.0002, 1.0)
    layers["down"].weight.grad = gradient
    optimizer.param_groups[0]["lr"] = 10.0
    optimizer.step()
    sizes = [layer.weight.numel() for layer in layers.values()]
    means = [0.0002 if name == "down" else 0.01 for name in layers]
    expected = _budgets(means, sizes)
    after = layers["down"].weight.abs().flatten().sort(descending=True).values[51]
    assert not (layers["down"].weight.abs() >= after)[active].any()  # all others by now
    for layer, count in zip(layers.values(), expected, strict=True):
        assert abs(layer.weight_density.count(layer.weight.numel()) - count) <= 1


def test_averages_over_rounds_of_two_optimizers() -> None:
    """A layer whose optimizer rests keeps its last share, and the budget is met all the same."""
    torch.manual_seed(0)
    gm = swatfx.compile(Shortcut(), swatfx.swat_m(1 - DENSITY))
    layers = list(sparse_layers(gm))
    optimizers = [
        torch.optim.SGD([x.weight for x in part], lr=0.1, momentum=0.9)
        for part in (layers[:2], layers[2:])
    ]
    swatfx.attach(gm, optimizers)
    total = DENSITY * sum(layer.weight.numel() for layer in layers)
    for step in range(9):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = gm(torch.randn(8, 16, 6, 6)).square().mean()
        loss.backward()
        optimizers[0].step()
        if step % 3 == 0:
            optimizers[1].step()
        active = sum(x.weight_density.count(x.weight.numel()) for x in layers)
        assert abs(active - total) <= 2 * len(layers), step
