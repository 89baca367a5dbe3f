"""Compiling in threads, beside inference, training and other compiles."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swatfx
from swatfx.compiled.module import SwatModule
from swatfx.ops.memory import Memory
from tests.nets.small_nets import EagerMiddle, loss_of, plain

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Asks(nn.Module):
    """Does what tracing would refuse: questions about modes, checkpoints, custom functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if torch.is_grad_enabled() and torch.is_tensor(y):
            y = checkpoint(self.b, y, use_reentrant=False)
            y = checkpoint(torch.relu, y, use_reentrant=True)
        else:
            y = torch.relu(self.b(y))
        y = nn.functional.dropout(y, 0.5, training=False)
        return y.mean((2, 3))


class Draws(nn.Module):
    """Draws random numbers in forward."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x)) + float(self.draw())
        return y


@contextmanager
def _beside(*works: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Run each work over and over in a thread of its own; yields what they raised."""
    stop, errors = threading.Event(), list[BaseException]()
    rounds = [0] * len(works)

    def run(at: int) -> None:
        while not stop.is_set():
            try:
                works[at]()
            except BaseException as error:
                errors.append(error)
                return
            rounds[at] += 1

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(works))]
    for thread in threads:
        thread.start()
    try:
        yield errors
        while not errors and not all(rounds):
            stop.wait(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors
    assert all(rounds)


def _make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return (plain, EagerMiddle, Asks)[seed % 3]()


def _training(gm: nn.Module) -> Callable[[], list[Tensor]]:
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        loss_of(gm(X)).backward()
        optimizer.step()
        return [p.detach().clone() for p in gm.parameters()]

    return step


def test_compiles_beside_inference_and_training() -> None:
    """16 compiles in 4 threads while 2 others run inference and one trains: all is exact."""
    models = [_make(seed) for seed in range(16)]
    alone = [swatfx.compile(copy.deepcopy(m), "swat-u:0.8") for m in models]
    eager, asked = _make(0).eval(), _make(2)
    served = swatfx.compile(_make(1), "swat-u:0.8").eval()
    with torch.no_grad():
        wanted = eager(X), served(X)
    asked_for = asked(X).detach()
    torch.manual_seed(5)
    one, two = (swatfx.compile(_make(3), "swat-u:0.8,period=3") for _ in range(2))
    train, steps = _training(one), 0

    def infer() -> None:
        with torch.no_grad():
            assert torch.equal(eager(X), wanted[0]) and torch.equal(served(X), wanted[1])

    def ask() -> None:
        y = asked(X)
        assert type(y) is Tensor and torch.equal(y, asked_for)
        loss_of(y).backward()

    def learn() -> None:
        nonlocal steps
        train()
        torch.rand(3)  # another thread's draws are no model's
        steps += 1

    with _beside(infer, ask, learn), ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda m: swatfx.compile(m, "swat-u:0.8"), models))
    for gm, other in zip(together, alone, strict=True):
        assert gm.code == other.code and gm.eager == other.eager
        assert [p for p in gm.parts] == [p for p in other.parts]
        results = [(loss_of(m(X)), m.state_dict()) for m in (gm, other)]
        for name, value in results[0][1].items():
            assert torch.equal(value, results[1][1][name]), name
        assert torch.equal(results[0][0], results[1][0])
    again = _training(two)
    for _ in range(steps):
        again()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_very_model_may_run_meanwhile() -> None:
    """Its tensors are those that the tracer stands for, in the thread that traces."""
    model = plain().eval()
    with torch.no_grad():
        want = model(X)

    def infer() -> None:
        with torch.no_grad():
            y = model(X)
        assert type(y) is Tensor and torch.equal(y, want)

    with _beside(infer):
        for _ in range(8):
            assert not swatfx.compile(model, "swat-u:0.8").eager


def test_one_compiled_model_in_several_threads() -> None:
    """First uses included: what evaluation remembers, libraries, caches."""
    gm = swatfx.compile(plain(), "swat-u:0.8", kernels="sparse").eval()
    xs = [torch.randn(16 + n, 3, 8, 8) for n in range(8)]

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = gm(x)
            return y

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(infer, xs * 4))
    for at, y in enumerate(got):
        assert torch.equal(y, infer(xs[at % 8]))


def test_several_models_train_in_threads() -> None:
    def losses(seed: int) -> list[float]:
        gm = swatfx.compile(_made[seed], "swat-u:0.8,period=2")
        step = _training(gm)
        return [float(p.sum()) for _ in range(4) for p in step()]

    _made = {seed: _make(seed) for seed in range(6)}
    alone = [losses(seed) for seed in _made]
    _made = {seed: _make(seed) for seed in range(6)}
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(losses, _made)) == alone


# As functions: a bound method would be copied with a generator of its own.
@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), lambda: random.random(), lambda: numpy.random.rand()]
)
def test_draws_of_a_forward_are_seen_beside_other_threads(draw: Callable[[], Any]) -> None:
    with _beside(lambda: threading.Event().wait(0.001)):
        gm = swatfx.compile(Draws(draw), "swat-u:0.5")
    assert gm.eager == {"": "untraceable: random numbers drawn in forward"}


def test_draws_of_other_threads_are_not_the_models() -> None:
    def draw() -> None:
        torch.rand(100)

    def once() -> None:
        random.random(), numpy.random.rand()
        threading.Event().wait(0.5)

    with _beside(draw, once):
        for _ in range(4):
            gm: SwatModule = swatfx.compile(plain(), "swat-u:0.8")
            assert not gm.eager


def test_a_fresh_process(tmp_path: Any) -> None:
    """Nothing was used before: libraries are found and caches filled by threads that meet."""
    code = """
        import torch, swatfx
        from concurrent.futures import ThreadPoolExecutor
        net = lambda: torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
        def work(i):
            gm = swatfx.compile(net(), "swat-u:0.8", kernels="sparse")
            gm(torch.randn(16, 3, 8, 8)).sum().backward()
            swatfx.export(gm, f"{PATH!r}/{i}.pt2", (torch.randn(2, 3, 8, 8),))
            return gm
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(3)))
        net()(torch.randn(1, 3, 8, 8))
        assert torch.nn.Module.__call__.__name__ == "_wrapped_call_impl"
    """
    text = textwrap.dedent(code).replace('f"{PATH!r}/{i}.pt2"', f'f"{tmp_path}/{{i}}.pt2"')
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.pt2"))) == 3


def test_what_is_alive_can_be_listed_while_other_threads_make_more() -> None:
    class Kind(Memory):
        def forget(self) -> None:
            """Nothing."""

    kept = [Kind() for _ in range(200)]

    def make() -> None:
        for _ in range(50):
            kept.append(Kind())
        del kept[200:]

    with _beside(make):
        for _ in range(2000):
            assert len(Kind.alive()) >= 200
