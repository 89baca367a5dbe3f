"""torch.compile(gm), as people call it: one graph forward, one backward, for a whole training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import swatfx
from swatfx.policy import CONSTRUCTORS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
_QUICK = ["swat-u:0.9,period=7", "rigl:0.9"]  # thresholds grow stale, and sizes move far; masks
_REST = sorted(f"{n}:0.9" for n in CONSTRUCTORS if n not in ("dense", "ssc", "swat-u", "rigl"))


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.GELU()),
        nn.Linear(16, 4),
    )


def _counted(policy: str, steps: int, **options: str) -> tuple[int, int, dict[str, int]]:
    """(graphs forward, compilations, breaks) of a training under torch.compile's default options.

    Activations grow from step to step, so that no two packs are of one size.
    """
    gm = swatfx.compile(_net(), policy, **options)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
    if gm.swat.policy.needs_optimizer:
        swatfx.attach(gm, optimizer, steps_per_epoch=8, total_steps=steps)
    compiled = torch.compile(gm, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for step in range(steps):
        x = torch.randn(16, 3, 6, 6) * (1 + step)
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    return (
        counters["stats"]["unique_graphs"],
        counters["frames"]["total"],
        dict(counters["graph_break"]),
    )


@pytest.mark.parametrize(
    "policy", [*_QUICK, *(pytest.param(p, marks=pytest.mark.slow) for p in _REST)]
)
def test_of_every_policy(policy: str) -> None:
    """A pack's size depends on data: no graph breaks there, and none is compiled anew."""
    assert _counted(policy, 12) == (1, 1, {})


@pytest.mark.slow
@pytest.mark.parametrize("norm_saves", ["exact", "int4"])
def test_over_a_hundred_steps(norm_saves: str) -> None:
    """Sizes move from step to step, over refreshes, and nothing is compiled again."""
    assert _counted("swat-u:0.8,period=9", 100, norm_saves=norm_saves) == (1, 1, {})


def test_a_graph_without_symbols_is_told() -> None:
    """Fake tensors whose mode has no symbols cannot tell the size, as of any such op."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    gm = swatfx.compile(_net(), "swat-u:0.9")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(Exception) as raised:
        gm(mode.from_tensor(torch.randn(2, 3, 6, 6)))
    assert isinstance(raised.value, DynamicOutputShapeException)
