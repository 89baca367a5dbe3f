"""Modes of torch that a forward enters, sets or asks for: what it does is what eager code does.

Whatever the mode was when the model was compiled, and whatever it is when it is called.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import is_grad_enabled as under_another_name

import swatfx

torch.set_num_threads(1)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
HALF = torch.bfloat16
AUTOCAST = torch.autocast("cpu", enabled=False)
OUTSIDE: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", HALF),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


class Base(nn.Module):
    """Layers; a subclass enters, sets or asks for a mode between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.between(self.a(x)))

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Island(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.b(x.float())


class LastIsland(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            return torch.logsumexp(self.b(x.float() * 10), 1)


class WithoutLayers(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return (x.float() @ x.float().t() @ x.float()) * 1.001


class Named(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.amp.autocast_mode.autocast("cpu", enabled=False):
            return self.b(x.float())


class OfTheCpu(Base):
    def between(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings(action="ignore"), torch.cpu.amp.autocast(enabled=False):
            return self.b(x.float())


class MadeBefore(Base):
    def between(self, x: Tensor) -> Tensor:
        with AUTOCAST, AUTOCAST:
            return self.b(x.float())


class Decorated(Base):
    @torch.autocast("cpu", enabled=False)
    def between(self, x: Tensor) -> Tensor:
        return self.b(x.float())


class InStack(Base):
    def between(self, x: Tensor) -> Tensor:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast("cpu", enabled=False))
            return self.b(x.float())


class ByHand(Base):
    def between(self, x: Tensor) -> Tensor:
        context = torch.autocast("cpu", enabled=False)
        context.__enter__()
        try:
            return self.b(x.float())
        finally:
            context.__exit__(None, None, None)


class Island16(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", HALF):
            return self.b(x).float()


class Swallowed(Base):
    def between(self, x: Tensor) -> Tensor:
        try:
            with torch.autocast("cpu", enabled=False):
                return self.b(x.float())
        except Exception:
            return x


class WithGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.b(self.a(x))


class WithoutGrad(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.b(x)


class DecoratedGrad(Base):
    @torch.no_grad()
    def between(self, x: Tensor) -> Tensor:
        return self.b(x)


class Generated(Base):
    @torch.no_grad()
    def steps(self, x: Tensor) -> Iterator[Tensor]:
        yield self.b(x)

    def between(self, x: Tensor) -> Tensor:
        return next(self.steps(x))


class SetsGrad(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            return self.b(x)


class SetsGradByCall(Base):
    def between(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        x = self.b(x)
        torch.set_grad_enabled(before)
        return x


class InferenceOff(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return self.b(torch.ones(3, 4)) + x.detach().clone()


class AsksCpu(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if torch.is_autocast_cpu_enabled() else x


class AsksDtype(Base):
    def between(self, x: Tensor) -> Tensor:
        return x.to(torch.get_autocast_dtype("cpu")).float()


class AsksCpuDtype(Base):
    def between(self, x: Tensor) -> Tensor:
        on = torch.is_autocast_cpu_enabled()
        return x.to(torch.get_autocast_cpu_dtype() if on else torch.float32)


class AsksInference(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if torch.is_inference_mode_enabled() else x


class AsksByAnotherName(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if under_another_name() else x


ISLANDS = [
    Island, LastIsland, WithoutLayers, Named, OfTheCpu, MadeBefore, Decorated, InStack, ByHand,
    Island16, Swallowed, WithGrad, WithoutGrad, DecoratedGrad, Generated,
]  # fmt: skip
ASKING = [SetsGrad, SetsGradByCall, AsksCpu, AsksDtype, AsksCpuDtype, AsksInference]


def result(model: nn.Module, outside: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and gradients by name; under one of OUTSIDE."""
    model.zero_grad()
    with OUTSIDE[outside]():
        y = model(X)
    if y.requires_grad:
        y.float().square().sum().backward()
    return y, {n: p.grad for n, p in model.named_parameters()}


def assert_like_eager(net: nn.Module) -> None:
    """The same bits, dtypes and gradients in every mode, compiled in every mode."""
    for compiled in OUTSIDE:
        gm_net = copy.deepcopy(net)
        with OUTSIDE[compiled]():
            gm = swatfx.compile(gm_net, "dense")
        for called in OUTSIDE:
            (y, grads), (z, ours) = result(net, called), result(gm, called)
            assert z.dtype == y.dtype and z.requires_grad == y.requires_grad, (compiled, called)
            assert z.is_inference() == y.is_inference() and torch.equal(y, z), (compiled, called)
            for name, grad in grads.items():
                other = ours[name]
                assert (grad is None) == (other is None), (compiled, called, name)
                assert grad is None or other is None or torch.equal(grad, other), name


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("as_root", [False, True])
@pytest.mark.parametrize(
    "kind", [*ISLANDS, *ASKING, InferenceOff, AsksByAnotherName], ids=lambda kind: kind.__name__
)
def test_like_eager_in_every_mode(kind: type[Base], as_root: bool) -> None:
    torch.manual_seed(0)
    inner = kind()
    net = inner if as_root else nn.Sequential(inner, nn.Flatten(0), nn.Flatten(0))
    assert_like_eager(net)
