"""What symbolic tracing cannot follow stays eager, with a reason; what lies below is compiled."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import swatfx
from swatfx.compiled.module import SwatModule
from tests.nets.compare import (
    DENSITY_1,
    HALF,
    assert_matches_at_density_1,
    loss_of,
    skipped,
    train_step,
)

torch.set_num_threads(1)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 100  # not what tracing through forward would give


class Base(nn.Module):
    """A block of two layers; subclasses put something untraceable between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.calls: Any = 0
        self.kept: list[Any] = []
        self.register_buffer("cache", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class OnTensor(Base):
    def between(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x


class OnShape(Base):
    def between(self, x: Tensor) -> Tensor:
        return x.relu() if x.shape[0] > 1 else x


class OnType(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if isinstance(x, Tensor) else x


class OnTypeAsked(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if torch.is_tensor(x) else x


class OnTraining(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class OnTrainingEqual(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if self.training == True else x  # noqa: E712


class OnGradMode(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if torch.is_grad_enabled() else x


class NoGrad(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean()
        return x / scale


class Autocast(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ x.t() @ x).float()


class SavedHooks(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
            return x * x


class OwnFunction(Base):
    def between(self, x: Tensor) -> Tensor:
        return Double.apply(x)


class Draws(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * torch.rand(4)


class DrawsInPython(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * random.random()


class DrawsInNumpy(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand())


class Counts(Base):
    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Keeps(Base):
    def between(self, x: Tensor) -> Tensor:
        self.kept.append(x.detach())
        return x


class SetsBuffer(Base):
    def between(self, x: Tensor) -> Tensor:
        self.cache = self.cache + 1
        return x * self.cache


class Iterates(Base):
    def between(self, x: Tensor) -> Tensor:
        return torch.stack([row * i for i, row in enumerate(x)])


REASONS = {
    OnTensor: "untraceable: control flow on a tensor",
    OnShape: "untraceable: control flow on a tensor",
    OnType: "untraceable: isinstance on an input of the graph",
    OnTypeAsked: "untraceable: isinstance on an input of the graph",
    OnTraining: "untraceable: control flow on self.training",
    OnTrainingEqual: "untraceable: control flow on self.training",
    OnGradMode: "untraceable: control flow on torch.is_grad_enabled",
    NoGrad: "untraceable: no_grad, autocast or saved-tensor hooks in forward",
    Autocast: "untraceable: no_grad, autocast or saved-tensor hooks in forward",
    SavedHooks: "untraceable: no_grad, autocast or saved-tensor hooks in forward",
    OwnFunction: "untraceable: custom autograd function Double",
    Draws: "untraceable: random numbers drawn in forward",
    DrawsInPython: "untraceable: random numbers drawn in forward",
    DrawsInNumpy: "untraceable: random numbers drawn in forward",
    Counts: "untraceable: forward sets calls",
    Keeps: "untraceable: forward sets kept",
    SetsBuffer: "untraceable: forward sets _buffers",
    Iterates: "untraceable: loop over a tensor or argument list",
}
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("as_root", [False, True])
@pytest.mark.parametrize("kind", REASONS)
def test_an_untraceable_block(kind: type[Base], as_root: bool) -> None:
    def seed(*_: Any) -> None:
        random.seed(0)
        np.random.seed(0)

    model: nn.Module = kind() if as_root else nn.Sequential(nn.Linear(4, 4), kind(), nn.Tanh())
    path = "" if as_root else "1"
    gm = swatfx.compile(model, DENSITY_1)
    assert gm.eager == {path: REASONS[kind]}
    below = [f"{path}.{name}".lstrip(".") for name in ("first", "second")]
    assert set(gm.parts) == set(below)
    report = swatfx.report(gm, [X])
    products = {path or "the root module": "matrix product of activations"}
    told = dict.fromkeys(below if as_root else ["0", *below])
    told |= products if kind is Autocast else {}
    assert {layer.name: layer.skipped for layer in report.layers} == told
    assert f"eager: {path or 'the root module'}: {REASONS[kind]}" in str(report)

    for training in (True, False, True):
        ref = copy.deepcopy(model)
        gm = swatfx.compile(model, DENSITY_1)
        ref.train(training)
        gm.train(training)
        seed()
        torch.manual_seed(0)
        expected = ref(X)
        seed()
        torch.manual_seed(0)
        assert torch.equal(gm(X), expected)
        loss_of(expected).backward()
        model.zero_grad()
        seed()
        torch.manual_seed(0)
        loss_of(gm(X)).backward()
        if kind in (Counts, SetsBuffer):
            continue  # the second forward of gm multiplies by more
        for p, q in zip(model.parameters(), ref.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    train_step(swatfx.compile(model, HALF), X)


def test_what_forward_sets_stays_with_the_compiled_model() -> None:
    model = nn.Sequential(Counts(), Keeps())
    gm = swatfx.compile(model, DENSITY_1)
    gm(X)
    gm(X)
    assert (model[0].calls, model[1].kept) == (0, [])
    assert (gm.get_submodule("0").calls, len(gm.get_submodule("1").kept)) == (2, 2)  # type: ignore[arg-type]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        self.chain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.reentrant: bool | None = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.reentrant is None:
            return self.chain(self.block(x))
        x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return checkpoint_sequential(self.chain, 2, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_keeps_its_checkpoints(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(reentrant))
    gm = assert_matches_at_density_1(model, X)
    assert gm.eager == {"1": "untraceable: activation checkpointing"}
    assert {"1.stem", "1.block", "1.chain", "1.chain.0", "1.chain.2"} <= set(gm.parts)

    plain = copy.deepcopy(model)
    plain[1].reentrant = None
    one, seen = _three_steps(model)
    other, seen_plainly = _three_steps(plain)
    assert (seen, seen_plainly) == (6, 0)  # twice a step; a plain model is one graph
    assert int(one.swat.clock.iteration) == 3
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for (name, b), c in zip(one.swat.named_buffers(), other.swat.buffers(), strict=True):
        if not name.endswith("stamp"):
            torch.testing.assert_close(b, c, msg=name)


def _three_steps(model: nn.Module) -> tuple[SwatModule, int]:
    """(compiled and trained, calls of its block); thresholds are refreshed once a step."""
    gm = swatfx.compile(model, HALF)
    gm.train()
    calls: list[int] = []
    if gm.eager:  # else the graph stands for the call of the block
        gm.get_submodule("1.block").register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        gm.zero_grad()
        loss_of(gm(X)).backward()
        with torch.no_grad():
            for p in gm.parameters():
                p -= 0.1 * p.grad
    return gm, len(calls)


@pytest.mark.parametrize("where", ["", "conv", "body"])
def test_hooks_run_and_their_modules_stay(where: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.conv(x))

    model, seen = Net(), []
    model.get_submodule(where).register_forward_hook(lambda m, a, out: seen.append(1) or out * 2)
    model.get_submodule(where).register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    x = torch.randn(2, 3, 8, 8)
    gm = assert_matches_at_density_1(model, x)
    reasons = skipped(gm, x)
    assert reasons.pop("conv") == ("hook on the module" if where == "conv" else None)
    assert reasons == {"body.0": None, "body.2": None}
    assert gm.eager == ({where: "hook on the module"} if where else {})
    assert ("body" in gm.parts) == (where == "body")
    seen.clear()
    gm(x)
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*_jit_internal")
def test_torchscript_child() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), scripted)
    gm = swatfx.compile(model, DENSITY_1)
    torch.testing.assert_close(gm(X), model(X), rtol=0, atol=0)
    assert skipped(gm, X) == {
        "0": None,
        "1.0": "called below eager 1 (untraceable: TorchScript module)",
    }
