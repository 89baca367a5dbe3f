"""`x += y` writes into x: who has it under another name sees that, as in eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import swatfx
from passes.tracing.augmented import PLAIN
from swatfx import kernels

ALL = (
    "swat-u:0.0,first_dense=False"  # every mask keeps all: the graph has to compute what eager does
)


class Net(nn.Module):
    """Layers around what `body` does with the result of the first."""

    def __init__(self, body: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.first(x))


def alias(net: Net, h: Tensor) -> Any:
    w = h
    w += 1.0
    return net.second(h)


def view(net: Net, h: Tensor) -> Any:
    w = h[:, :4]
    w *= 2.0
    return net.second(h)


def flat(net: Net, h: Tensor) -> Any:
    w = h.reshape(-1)
    w -= 0.5
    return net.second(h)


def in_list(net: Net, h: Tensor) -> Any:
    seen, y = [h], h
    y += net.norm(h).detach()
    return net.second(seen[0])


def identity(net: Net, h: Tensor) -> Any:
    y = net.norm(h)
    kept = y
    y += h
    return net.second(y) + kept


def divided(net: Net, h: Tensor) -> Any:
    z = h[:, 4:8]
    z /= 3.0
    return net.second(net.norm(h)) + h


def of_a_part(net: Net, h: Tensor) -> Any:
    y = net.norm(h)[:, 1:]
    y += 1.0
    v = y.contiguous()
    v *= 2.0
    return y * 1, v


def of_a_part_flat(net: Net, h: Tensor) -> Any:
    y = net.norm(h)[:, :8]
    y += 1.0
    v = y.reshape(h.shape[0], -1)
    v -= 3.0
    return y * y.stride(0), v, net.second(h)


def number(net: Net, h: Tensor) -> Any:
    n = h.shape[1]
    m = n
    m += 1
    return net.second(h) * n + m


def in_place_relu_by_name(net: Net, h: Tensor) -> Any:
    n = net.norm(h)
    k = n * 2
    net.relu(input=n)
    return net.second(n), k


def relu_of_flat_by_name(net: Net, h: Tensor) -> Any:
    v = h.reshape(-1)
    torch.relu_(input=v)
    return net.second(h)


def strided_write(net: Net, h: Tensor) -> Any:
    h.as_strided((h.shape[0], 1024), (1024, 1)).mul_(0.5)
    return net.second(h)


def strided_view(net: Net, h: Tensor) -> Any:
    return net.second(h[:, :8].as_strided((h.shape[0], 1024), (1024, 1)).reshape(h.shape))


def stride_of_view(net: Net, h: Tensor) -> Any:
    return net.second(h) * h.transpose(1, 2).stride(1) + h[1:].storage_offset()


def complex_by_name(net: Net, h: Tensor) -> Any:
    return net.second(h * torch.view_as_complex(input=h[..., :2]).real.unsqueeze(-1))


BODIES = [
    alias, view, flat, in_list, identity, divided, of_a_part, of_a_part_flat, number,
    in_place_relu_by_name, relu_of_flat_by_name, strided_write, strided_view, stride_of_view,
    complex_by_name,
]  # fmt: skip


def outputs(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chosen", ["sparse", "dense"])
@pytest.mark.parametrize("body", BODIES)
def test_as_in_eager(body: Callable[[Net, Tensor], Any], chosen: str, training: bool) -> None:
    if chosen == "sparse" and not kernels.available():
        pytest.skip("no compiled kernels")
    torch.manual_seed(0)
    net = Net(body)
    gm = swatfx.compile(copy.deepcopy(net), ALL, kernels=chosen)
    assert not gm.eager
    x = torch.randn(16, 16, 8, 8)
    net.train(training), gm.train(training)
    with torch.set_grad_enabled(training):
        want, got = outputs(net(x.clone())), outputs(gm(x.clone()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
    if training:
        for found in (want, got):
            sum(y.sin().sum() for y in found).backward()
        for (name, p), q in zip(net.named_parameters(), gm.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, atol=2e-2, rtol=1e-2, msg=name)


def test_the_input_is_written_where_eager_writes_it() -> None:
    class Shifts(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x += 1.0
            return self[1](self[0](x))

    gm = swatfx.compile(Shifts(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), ALL)
    x = torch.zeros(4, 8, 6, 6)
    gm(x)
    assert bool((x == 1).all())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "resnext50_32x4d"])
def test_nobody_can_tell_in_residual_networks(name: str) -> None:
    """There `out += identity` stays the plain addition that norms and ReLUs are one with."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    gm = swatfx.compile(model, "swat-u:0.9")
    assert not [node for node in gm.graph.nodes if node.target in PLAIN]


class Remembers(nn.Module):
    """Gives away what it keeps; tracing cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.ones(4, 8, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.memory


def test_what_eager_code_keeps_is_written() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.keeper = Remembers()

        def forward(self, x: Tensor) -> Tensor:
            m = self.keeper(self.first(x))
            m *= 1.5
            return self.second(m)

    gm = swatfx.compile(Asks(), ALL)
    assert list(gm.eager) == ["keeper"]
    gm(torch.randn(4, 8, 6, 6))
    assert bool((gm.get_buffer("keeper.memory") == 1.5).all())
