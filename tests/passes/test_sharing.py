"""Layers that read one tensor share one packed activation, unless it is written between them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx.compiled.module import SwatModule
from swatfx.compiled.parts import all_parts

torch.set_num_threads(1)
S = 0.75


class Net(nn.Module):
    """Two convolutions that read what `between` makes of one tensor."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.a = nn.Conv2d(8, 6, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 1)
        self.between = between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        first = self.a(x)
        y: Tensor = first + self.b(self.between(x))
        return y


def top(x: Tensor) -> Tensor:
    k = x.numel() - int(S * x.numel())
    t = x.detach().abs().reshape(-1).sort(descending=True).values[k - 1]
    return x * (x.detach().abs() >= t)


class Straight(torch.autograd.Function):
    """Forward sees `dense`, backward as if it had been `seen`; (dense, seen) -> dense."""

    @staticmethod
    def forward(ctx: object, dense: Tensor, seen: Tensor) -> Tensor:
        return dense.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """SWAT convolution by autograd alone: `x` is used as it is now, so nothing can overwrite it."""
    x = x.clone()
    weight, bias = layer.weight, layer.bias
    masked = weight.detach() * (top(weight.detach()) != 0)
    padding = layer.padding
    assert isinstance(padding, tuple) and bias is not None
    # One term gives the input gradient, the other the weight gradient; the third is the value.
    by_input = F.conv2d(x, masked, None, 1, padding)
    by_weight = F.conv2d(top(x.detach()), weight, bias, 1, padding)
    value = by_input + bias[:, None, None]
    result: Tensor = Straight.apply(value.detach(), by_input + by_weight)
    return result


def reference(net: Net, x: Tensor) -> Tensor:
    x = net.norm(net.stem(x))
    first = conv(x, net.a)
    return first + conv(net.between(x), net.b)


def packs(gm: SwatModule) -> list[str]:
    nodes = (n for _, part in all_parts(gm) for n in part.graph.nodes)
    return [str(n.target) for n in nodes if str(n.target).endswith(".pack")]


def same(x: Tensor) -> Tensor:
    return x


def add_(x: Tensor) -> Tensor:
    return x.add_(1)


def relu_(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def through_a_view(x: Tensor) -> Tensor:
    x.view(-1)[::3].mul_(3)
    return x


def by_index(x: Tensor) -> Tensor:
    x[:, 0] = 0  # which fx cannot trace
    return x


def augmented(x: Tensor) -> Tensor:
    x *= 2
    return x


def fresh(x: Tensor) -> Tensor:
    return F.relu(x)


@pytest.mark.parametrize(
    ("between", "count"),
    [
        (same, 1),
        (add_, 2),
        (relu_, 2),
        (nn.ReLU(inplace=True), 2),
        (through_a_view, 2),
        (by_index, 2),
        (augmented, 2),
        (fresh, 2),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_shared_or_not_both_gradients_are_right(
    between: Callable[[Tensor], Tensor], count: int
) -> None:
    net = Net(between)
    twin = copy.deepcopy(net)
    gm = swatfx.compile(net, swatfx.swat_u(S))
    assert len(packs(gm)) == count
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    y, expected = gm(x), reference(twin, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    for (name, p), q in zip(gm.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-11, msg=name)


class Attention(nn.Module):
    """Query, key and value read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x)
        return y


def test_three_readers_share_one_pack() -> None:
    gm = swatfx.compile(Attention(), swatfx.swat_u(S, first_dense=False))
    assert len(packs(gm)) == 1
    kept = {n.args[4] for n in gm.graph.nodes if "swatfx.linear" in str(n.target)}
    assert len(kept) == 1
    gm(torch.randn(2, 5, 8)).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())


def test_different_densities_do_not_share() -> None:
    rules = {"q": swatfx.swat_u(0.5, first_dense=False), "*": swatfx.swat_u(S, first_dense=False)}
    gm = swatfx.compile(Attention(), swatfx.per_layer(rules))
    assert len(packs(gm)) == 2


def test_a_shared_pack_serves_whichever_reader_trains() -> None:
    gm = swatfx.compile(Attention(), swatfx.swat_u(S, first_dense=False))
    whole = copy.deepcopy(gm)
    x = torch.randn(2, 5, 8)
    whole(x).pow(2).sum().backward()
    for trained in ("q", "k", "v"):
        gm.zero_grad()
        for name, p in gm.named_parameters():
            p.requires_grad_(name.startswith(trained))
        gm(x).pow(2).sum().backward()
        for name, p in gm.named_parameters():
            if name.startswith(trained):
                assert p.grad is not None
                assert torch.equal(p.grad, whole.get_parameter(name).grad)
