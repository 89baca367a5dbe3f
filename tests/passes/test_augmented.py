"""`x += y` writes into x: who has it under another name sees that, as in eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
        self.same = nn.Identity()
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


def narrow(net: Net, h: Tensor) -> Any:
    y = net.norm(h).to(torch.bfloat16)
    y += h.detach()
    return net.second(h), y.detach()


def narrow_residual(net: Net, h: Tensor) -> Any:
    y = h.detach().bfloat16()
    y += net.norm(h)
    return net.second(torch.relu(y).float()), y * 1


def wide_residual(net: Net, h: Tensor) -> Any:
    y = h.detach().double()
    y += net.norm(h)
    z = net.relu(y)
    return net.second(z.float()), z


def wider_than_the_norm(net: Net, h: Tensor) -> Any:
    y = net.norm(h)
    y += h.detach().double()
    return net.second(net.relu(y)), y.detach()


def residual_known_otherwise(net: Net, h: Tensor) -> Any:
    y = h * 2.0
    k = y[:, 1:]
    y += net.norm(h)
    return net.second(net.relu(y)), k * 1


def flag_of_one(net: Net, h: Tensor) -> Any:
    y, z = h * 1.0, h * 1.0
    F.relu(y, inplace=1)  # type: ignore[arg-type]
    F.leaky_relu(z, 0.1, 1)  # type: ignore[arg-type]
    F.dropout(h, 0.0, True, True)
    return net.second(y), z * 1


def joined(net: Net, h: Tensor) -> Any:
    y = net.norm(h)
    parts = (y.detach() * 1.0).chunk(2, 1) + y.detach().chunk(2, 1)
    parts[2].mul_(2.0)
    return net.second(y), parts[3] * 1


def joined_in_place(net: Net, h: Tensor) -> Any:
    y, z = net.norm(h), net.second(h)
    parts = z.detach().chunk(2, 1)
    parts += y.detach().split(8, 1)
    parts[3].mul_(2.0)
    return net.second(y), z


def another_name(net: Net, h: Tensor) -> Any:
    v = net.same(h)
    z = h.flatten(1)
    z += 0.25
    return net.second(net.second(v)), v * 1


BODIES = [
    alias, view, flat, in_list, identity, divided, of_a_part, of_a_part_flat, number,
    in_place_relu_by_name, relu_of_flat_by_name, strided_write, strided_view, stride_of_view,
    complex_by_name, narrow, narrow_residual, wide_residual, wider_than_the_norm,
    residual_known_otherwise, flag_of_one, joined, joined_in_place, another_name,
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
        # A bfloat16 may round to either side.
        few = (
            {"atol": 0.02, "rtol": 0.02}
            if b.dtype is torch.bfloat16
            else {"atol": 1e-3, "rtol": 1e-4}
        )
        torch.testing.assert_close(a, b, **few)
    if training:
        for found in (want, got):
            sum(y.sin().sum() for y in found if y.requires_grad).backward()
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


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_norms_are_one_with_the_addition_behind(name: str) -> None:
    """There `out += identity` is the addition that norms and ReLUs are one with."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    gm = swatfx.compile(model, "swat-u:0.9")
    assert not [node for node in gm.graph.nodes if node.target in PLAIN]


def test_what_does_not_broadcast_is_refused() -> None:
    def body(net: Net, h: Tensor) -> Any:
        y = net.norm(h).mean(0, keepdim=True)
        y += h
        return net.second(y)

    gm = swatfx.compile(Net(body), ALL)
    with pytest.raises(RuntimeError, match="broadcast"):
        gm(torch.randn(16, 16, 8, 8))


def test_dtypes_under_autocast() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.q(x)
            h += x
            y = self.o(h)
            y += self.norm(h)
            return y

    net = Sums()
    gm = swatfx.compile(copy.deepcopy(net), ALL)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (m(torch.ones(4, 16)) for m in (net, gm))
    assert got.dtype is want.dtype is torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_holds_what_is_written_later(when: str) -> None:
    def body(net: Net, h: Tensor) -> Any:
        y = net.norm(h)
        y += 1.0
        net.relu(y)
        return net.second(y)

    net = Net(body)
    held: list[Tensor] = []
    if when == "before":
        net.norm.register_forward_hook(lambda m, args, y: held.append(y))
    gm = swatfx.compile(copy.deepcopy(net), ALL)
    if when == "after":
        for model in (net, gm):
            model.get_submodule("norm").register_forward_hook(lambda m, args, y: held.append(y))
    x = torch.randn(16, 16, 8, 8)
    net(x), gm(x)
    torch.testing.assert_close(*held, atol=1e-3, rtol=1e-4)


def test_dead_code_does_not_hold_writes() -> None:
    gm = swatfx.compile(Net(alias), ALL)
    x = torch.randn(16, 16, 8, 8)
    want = gm.eval()(x)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    torch.testing.assert_close(gm(x), want)


class Idle(nn.Module):
    """Owns a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Assigns(nn.Module):
    """Cannot be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.second = nn.Conv2d(16, 16, 1), Idle(), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.idle(self.first(x))
        y[:, 0] += 1
        return self.second(y)


def test_an_eager_root_may_own_layers_that_nobody_calls() -> None:
    net = Assigns()
    gm = swatfx.compile(copy.deepcopy(net), ALL)
    assert list(gm.eager) == [""]
    x = torch.randn(16, 16, 8, 8)
    torch.testing.assert_close(gm(x), net(x), atol=1e-4, rtol=1e-4)


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


class Shifts(nn.Module):
    """Writes into what it gets, and gives it back; tracing cannot follow it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x * 2
        x += 0.5
        return x


class Holds(nn.Module):
    """At each call writes into what it was given at the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        for tensor in self.held:
            tensor.mul_(0.5)
        self.held = [x]
        return x * 1.0 if x.sum() < 1e9 else x * 2


def eager_other_name(net: Around, h: Tensor) -> Any:
    v = h[:]
    r = net.outside(h)
    r *= 0.5
    return net.second(v), r * 1


def eager_view_before(net: Around, h: Tensor) -> Any:
    h = h.add_(1.0)
    v = h[:]
    net.outside(h)
    h.mul_(0.25)
    return net.second(v), h * 1


def eager_residual(net: Around, h: Tensor) -> Any:
    return net.second(net.outside(h) + h), h * 1


def eager_twice(net: Around, h: Tensor) -> Any:
    y = net.outside(h)
    z = net.outside(net.second(y))
    return net.second(h), y * 1, z


def eager_identity(net: Around, h: Tensor) -> Any:
    v = net.same(h)
    net.outside(v)
    return net.second(net.second(h)), v * 1


class Around(Net):
    """With a part that is left to Python."""

    def __init__(self, body: Callable[[Any, Tensor], Any], outside: nn.Module) -> None:
        super().__init__(body)
        self.outside = outside


@pytest.mark.parametrize("batch", [1, 15, 16, 17])
@pytest.mark.parametrize("eager", [Shifts, Holds])
@pytest.mark.parametrize(
    "body",
    [eager_other_name, eager_view_before, eager_residual, eager_twice, eager_identity],
)
def test_what_eager_code_writes(
    body: Callable[[Any, Tensor], Any], eager: type[nn.Module], batch: int
) -> None:
    torch.manual_seed(0)
    net = Around(body, eager())
    gm = swatfx.compile(copy.deepcopy(net), ALL, kernels="sparse")
    assert list(gm.eager) == ["outside"]
    x = torch.randn(batch, 16, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            for a, b in zip(gm(x), net(x), strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
