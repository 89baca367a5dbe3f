"""However many threads: those that torch is told to use, and those of Python that call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_kernels_conv import threads
from test_kernels_formula import Conv, random_conv
from torch import Tensor, nn

import swatfx
from swatfx import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_more_threads_than_work(count: int) -> None:
    with threads(count):
        for batch in (1, 16, 17):
            Conv((batch, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1)).check()
            Conv((batch, 2, 3), (3, 2, 2), (2,), (1,), (1,)).check()
        for seed in range(10):
            random_conv(seed).check(seed)


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


@pytest.mark.parametrize("count", [1, 3])
def test_several_python_threads(count: int) -> None:
    """Each its own compiled model, of all kinds of layers, at once."""
    torch.manual_seed(0)

    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 24),
        )

    models = [swatfx.compile(net(), "swat-u:0.8", kernels="sparse") for _ in range(6)]
    inputs = [torch.randn(16 + i, 3, 11, 12) for i in range(6)]
    wanted = [step(m, x) for m, x in zip(models, inputs, strict=True)]

    def run(i: int) -> list[Tensor]:
        torch.set_num_threads(count)
        return [t for _ in range(5) for t in step(models[i], inputs[i])]

    with threads(count), ThreadPoolExecutor(6) as pool:
        found = list(pool.map(run, range(6)))
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(one, other * 5, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
