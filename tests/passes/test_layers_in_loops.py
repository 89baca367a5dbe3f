"""Layers that a loop calls again and again, several of them on one tensor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from tests.nets import formulas

S = 0.75


class Gated(nn.Module):
    """Two layers read one tensor, in every turn or in the first only."""

    def __init__(self, turns: int, always: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.turns, self.always = turns, always

    def forward(self, x: Tensor) -> Tensor:
        for turn in range(self.turns):
            y = self.a(x)
            other = self.b(x) if turn == 0 or self.always else self.b(y)
            x = torch.tanh(y) * torch.sigmoid(other)
        return x


def kept(x: Tensor) -> Tensor:
    """The quarter of the largest."""
    flat = x.detach().abs().flatten()
    return flat.sort(descending=True).values[flat.numel() - int(S * flat.numel()) - 1]


class Formula(nn.Module):
    """A linear layer as the paper has it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.layer.weight, self.layer.bias
        seen = F.linear(x, formulas.masked(w.detach(), float(kept(w))), b)
        through = F.linear(formulas.masked(x.detach(), float(kept(x))), w)
        return seen + through - through.detach()


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("below_eager", [False, True])
def test_gradients_are_those_of_the_formula(turns: int, always: bool, below_eager: bool) -> None:
    torch.manual_seed(0)
    model = Gated(turns, always).double()
    exact = copy.deepcopy(model)
    exact.a, exact.b = Formula(exact.a), Formula(exact.b)  # type: ignore[assignment]
    whole: nn.Module = Below(model) if below_eager else model
    gm = swatfx.compile(whole, f"swat-u:{S},first_dense=False")
    x = torch.randn(16, 12, dtype=torch.float64)
    for m in (gm, exact):
        m(x).square().sum().backward()
    for mine, right in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=1e-12, atol=1e-12)


class Below(nn.Module):
    """Control flow that tracing leaves to Python."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool(torch.isfinite(x).all()) else x  # type: ignore[no-any-return]
