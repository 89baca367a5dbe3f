"""Tensors that come from outside a graph may be one; norms have a state that others read and write.

Under policies that keep everything a compiled model computes what eager does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swatfx

# The second packs activations, all of them: only then norms, ReLUs and pools are rewritten.
POLICIES = ("swat-u:0.0,first_dense=False", "swat-u:0.0000001,first_dense=False")


class Net(nn.Module):
    """Layers, and buffers that share memory, around a body."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.n = nn.BatchNorm2d(16)
        memory = torch.ones(32, 1, 1)
        self.register_buffer("u", memory[:16])
        self.register_buffer("v", memory[8:24])
        self.python = Python()
        self.body = body

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.body(self, x, *more)


class Python(nn.Module):
    """Cannot be traced; gives what it was given first."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            return x * 2
        self.held.append(x)
        return self.held[0]


def statistics_read(net: Net, x: Tensor) -> Any:
    y = net.n(net.a(x))
    mean = net.n.running_mean.clone()
    return net.c(F.relu(y)), mean


def count_read(net: Net, x: Tensor) -> Any:
    y = net.n(net.a(x))
    count = net.n.num_batches_tracked * 1
    return net.c(F.relu(y)), count


def statistics_of_a_function(net: Net, x: Tensor) -> Any:
    h = net.a(x)
    y = F.batch_norm(h, net.n.running_mean, net.n.running_var, training=True, momentum=0.3)
    mean = net.n.running_mean * 1
    y += h
    return net.c(F.relu(y)), mean


def a_function_and_a_module(net: Net, x: Tensor) -> Any:
    y = F.batch_norm(net.a(x), net.n.running_mean, net.n.running_var, training=True)
    z = net.n(net.b(x))
    return net.c(F.relu(y + z * 1)), z


def bias_written(net: Net, x: Tensor) -> Any:
    h = net.a(x)
    y = net.n(h)
    z = net.n.bias.detach()
    z += 1
    return net.c(F.relu(y + h))


def factor_written(net: Net, x: Tensor) -> Any:
    b = net.n.bias * 1
    y = F.batch_norm(net.a(x), None, None, net.n.weight, b, True)
    b += 1
    return net.c(F.relu(y))


def opaque_between(net: Net, x: Tensor) -> Any:
    y = net.n(net.a(x))
    z = net.python(x)
    return net.c(F.relu(y)) + z


def buffers_that_share(net: Net, x: Tensor) -> Any:
    t = net.n(net.a(x)) + net.u
    net.v.mul_(2)
    return net.c(F.relu(t)) + net.u


def held_by_python(net: Net, x: Tensor) -> Any:
    first = net.python(x * 1.0)
    second = net.python(net.b(x))  # the first again
    h = net.a(second)
    first += 1
    return h + net.b(second)


BODIES = [
    statistics_read, count_read, statistics_of_a_function, a_function_and_a_module, bias_written,
    factor_written, opaque_between, buffers_that_share, held_by_python,
]  # fmt: skip


def same(got: Any, want: Any) -> None:
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def assert_as_in_eager(net: nn.Module, inputs: Callable[[], tuple[Tensor, ...]], chosen: str,
                       policy: str, training: bool) -> None:  # fmt: skip
    gm = swatfx.compile(copy.deepcopy(net), policy, kernels=chosen)
    net.train(training), gm.train(training)
    with torch.no_grad():  # the gradient of what is written is another question
        for _ in range(2):
            same(gm(*inputs()), net(*inputs()))
    for (name, buffer), other in zip(net.named_buffers(), gm.buffers(), strict=False):
        torch.testing.assert_close(other, buffer, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chosen", ["sparse", "dense"])
@pytest.mark.parametrize("body", BODIES)
def test_state_and_memory(body: Any, chosen: str, policy: str, training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 16, 8, 8)
    assert_as_in_eager(Net(body), lambda: (x.clone(),), chosen, policy, training)


def written_input(net: Net, p: Tensor, q: Tensor) -> Any:
    h = net.a(p)
    q += 1
    return h + net.b(p)


def norm_of_an_input(net: Net, p: Tensor, q: Tensor) -> Any:
    y = net.n(p)
    q.mul_(2)
    return net.c(F.relu(y))


def residual_input(net: Net, p: Tensor, q: Tensor) -> Any:
    t = net.n(net.b(q)) + p
    q.mul_(2)
    return net.c(F.relu(t))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chosen", ["sparse", "dense"])
@pytest.mark.parametrize("body", [written_input, norm_of_an_input, residual_input])
def test_one_tensor_given_twice(body: Any, chosen: str, policy: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 16, 8, 8)

    def inputs() -> tuple[Tensor, ...]:
        given = x.clone()
        return given, given.view(x.shape)

    for training in (True, False):
        assert_as_in_eager(Net(body), inputs, chosen, policy, training)


class Halves(nn.Module):
    """A part that gives two names of one memory."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(16, 16, 3, padding=1), other

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        return h, self.other(h)


class Writes(nn.Module):
    """Python that writes into the second."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.conv = Halves(other), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, v = self.part(x)
        if v.sum() > 1e30:
            return h
        v += 1
        return self.conv(h)


@pytest.mark.parametrize(
    "other", [lambda h: h[:, :8], lambda h: h.flatten(1), lambda h: h.transpose(2, 3)]
)
@pytest.mark.parametrize("batch", [1, 16, 17])
def test_two_names_given_to_python(other: Callable[[Tensor], Tensor], batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 16, 8, 8)
    for policy in POLICIES:
        assert_as_in_eager(Writes(other), lambda: (x.clone(),), "sparse", policy, True)


class Block(nn.Module):
    """A norm that is one with what follows, last of what is recomputed."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


class Recomputed(nn.Module):
    def __init__(self, momentum: float | None, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(16, 16, 3, padding=1), Block(momentum)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        return y


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", [*POLICIES, "swat-u:0.8"])
def test_statistics_move_as_often_as_in_eager(
    policy: str, reentrant: bool, momentum: float | None
) -> None:
    torch.manual_seed(0)
    net = Recomputed(momentum, reentrant)
    if policy == "swat-u:0.8":
        policy += ",activation_sparsity=0.5"
        with torch.no_grad():  # so that statistics are those of eager
            for conv in (net.first, net.block.conv):
                kept = conv.weight.numel() - conv.weight.numel() * 8 // 10
                conv.weight.mul_(
                    conv.weight.abs() >= conv.weight.abs().flatten().topk(kept).values[-1]
                )
    gm = swatfx.compile(copy.deepcopy(net), policy)
    x = torch.randn(16, 16, 8, 8)
    for _ in range(2):
        for model in (net, gm):
            model(x).sum().backward()
    found, norm = gm.get_submodule("block.norm"), net.block.norm
    assert int(found.num_batches_tracked) == int(norm.num_batches_tracked) == 4
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(found, name), getattr(norm, name), atol=1e-5, rtol=1e-4)


def test_a_batch_of_one_may_be_written_by_its_views() -> None:
    def body(net: Net, x: Tensor) -> Any:
        h = net.a(x)
        v = h[0][None]
        v += h
        w = h.squeeze(0).unsqueeze(0)
        w += h
        return v * 1

    x = torch.randn(1, 16, 8, 8)
    assert_as_in_eager(Net(body), lambda: (x.clone(),), "sparse", POLICIES[0], True)
    gm = swatfx.compile(nn.Sequential(nn.Conv2d(16, 16, 1)), POLICIES[0], kernels="sparse")
    with torch.no_grad():
        y = gm(x)
        v = y.view(1, -1).view(y.shape)
        v += y
