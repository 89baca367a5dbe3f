"""Layers watched within a step: whose time is whose."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled import Pack, sparse_layers
from swatfx.timing.layer_times import layer_seconds
from swatfx.timing.steps import Step
from tests.nets.small_nets import plain

NAP = 0.02


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(NAP)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(2 * NAP)
        return grad


class Sleepy(nn.Module):
    """What lies between its layers sleeps, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(_Slow.apply(self.one(x)))


def _step(model: nn.Module, x: Tensor) -> Step:
    return Step(model, ((x,), {}), lambda output: output.square().mean())


def test_what_lies_between_layers_is_no_layers() -> None:
    step = _step(Sleepy(), torch.randn(4, 8))
    step.step()
    found = layer_seconds(step, {"one": "one.weight", "two": "two.weight", "x": "no.such"})
    layers = {f"{phase} {name}" for phase in ("forward", "backward") for name in ("one", "two")}
    assert set(found) == layers | {"forward", "backward", "optimizer"}
    assert all(0 < found[name] < NAP for name in layers)
    assert found["forward"] > NAP and found["backward"] > 2 * NAP


def test_thresholds_and_packs_are_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = swatfx.compile(plain(), "swat-u:0.9")
    first = next(sparse_layers(gm))
    original = Pack.forward

    def nap(self: Pack, *args: Any) -> Any:
        time.sleep(NAP)
        return original(self, *args)

    monkeypatch.setattr(Pack, "forward", nap)
    weights = {name: f"{name}.weight" for name in ("0", "2", "5")}
    found = layer_seconds(_step(gm, torch.randn(4, 3, 8, 8)), weights, steps=2)
    assert found["forward 0"] < NAP < min(found["forward 2"], found["forward 5"])
    assert set(found) >= {f"backward {name}" for name in weights}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in first.state.children())
