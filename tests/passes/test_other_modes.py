"""Modes and seeds that a forward sets, contexts that change nothing, and what compiling leaves."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import swatfx
from tests.passes.test_modes import HALF, Base, Island, X


class Doubling(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.mul.Tensor else result


class Dispatched(Base):
    def between(self, x: Tensor) -> Tensor:
        with Doubling():
            return x * x


class Seeds(Base):
    def between(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return F.dropout(x, 0.5, True)


class SeedsPython(Base):
    def between(self, x: Tensor) -> Tensor:
        random.seed(5)
        return x


class SeedsNumpy(Base):
    def between(self, x: Tensor) -> Tensor:
        np.random.seed(5)
        return x


class Forks(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return x * torch.rand_like(x)


class ForksUnseeded(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            return F.dropout(x, 0.5, True)


class Precision(Base):
    def between(self, x: Tensor) -> Tensor:
        torch.set_float32_matmul_precision("highest")
        return x


class Deterministic(Base):
    def between(self, x: Tensor) -> Tensor:
        torch.use_deterministic_algorithms(False)
        return x


class DefaultDtype(Base):
    def between(self, x: Tensor) -> Tensor:
        return x.to(torch.get_default_dtype())


def drawn(model: nn.Module) -> tuple[Any, ...]:
    """The output, and what the three generators draw next."""
    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    return model(X).tolist(), torch.rand(2).tolist(), random.random(), np.random.rand()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Dispatched, "no_grad, autocast or saved-tensor hooks in forward"),
        (Seeds, "forward calls torch.manual_seed"),
        (SeedsPython, "forward calls random.seed"),
        (SeedsNumpy, "forward calls numpy.random.seed"),
        (Forks, "forward calls torch.random.fork_rng"),
        (ForksUnseeded, "forward calls torch.random.fork_rng"),
        (Precision, "forward calls torch.set_float32_matmul_precision"),
        (Deterministic, "forward calls torch.use_deterministic_algorithms"),
        (DefaultDtype, "control flow on torch.get_default_dtype"),
    ],
)
def test_other_modes_stay_eager(kind: type[Base], reason: str) -> None:
    """A seed is one even where the generators are in that state already."""
    torch.manual_seed(0)
    net = nn.Sequential(kind())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    gm = swatfx.compile(copy.deepcopy(net), "dense")
    assert gm.eager == {"0": f"untraceable: {reason}"}
    assert drawn(net) == drawn(gm)


class NoNodes(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            scale = torch.arange(4.0) * 2
        return x * scale


class Profiled(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.profiler.record_function("b"), torch.autograd.set_detect_anomaly(False):
            return self.b(x)


class ChoosesKernel(Base):
    def between(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


@pytest.mark.parametrize("kind", [NoNodes, Profiled, ChoosesKernel])
def test_harmless_contexts_are_one_graph(kind: type[Base]) -> None:
    net = kind()
    gm = swatfx.compile(copy.deepcopy(net), "dense")
    assert not gm.eager
    torch.testing.assert_close(gm(X), net(X))


class NotLeft(Base):
    def __init__(self, make: Callable[[], Any], fails: bool) -> None:
        super().__init__()
        self.make, self.fails = make, fails

    def between(self, x: Tensor) -> Tensor:
        self.make().__enter__()
        return self.b(x) if self.fails else x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", HALF),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ],
)
def test_compiling_leaves_no_mode_behind(make: Callable[[], Any], fails: bool) -> None:
    gm = swatfx.compile(nn.Sequential(NotLeft(make, fails)), "dense")
    assert list(gm.eager) == ["0"]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_compiling_puts_torch_back() -> None:
    owners = (torch, torch.random, random, np.random, torch.autocast, torch.no_grad)
    before = [dict(vars(owner)) for owner in owners]
    swatfx.compile(nn.Sequential(Island(), Seeds()), "dense")
    for owner, names in zip(owners, before, strict=True):
        assert all(vars(owner)[name] is value for name, value in names.items())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.logsumexp(self.fc(x.float() * 100), 1)


def test_a_float32_island_with_masks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), Head())
    gm = swatfx.compile(net, "swat-u:0.5")
    assert list(gm.eager) == ["3"] and "3.fc" in gm.parts
    for model in (net, gm):
        with torch.autocast("cpu", HALF):
            y = model(torch.randn(3, 64))
        assert y.dtype == torch.float32 and not torch.equal(y, y.to(HALF).float())
