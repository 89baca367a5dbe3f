"""EMA and SWA copies of compiled models, with their buffers averaged or not, and nested."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.training.attaching import compiled_models
from tests.nets.any_optimizer import Outer, net, rows
from tests.nets.held_masks import POLICIES, TIMES, TOTAL
from tests.nets.small_nets import assert_same, loss_of, snapshot


class Ema(nn.Module):
    """A copy whose whole state dict follows, integers too unless `floats`.

    By hand: swatfx watches wrappers that take a copy in as their `module`, and not this one.
    """

    def __init__(self, model: nn.Module, floats: bool = False, decay: float = 0.9) -> None:
        super().__init__()
        self.average = copy.deepcopy(model).eval()
        self.floats, self.decay = floats, decay

    @property
    def module(self) -> nn.Module:
        return self.average

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for mine, theirs in zip(
            self.module.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if self.floats and not mine.is_floating_point():
                mine.copy_(theirs)
            else:
                mine.copy_(self.decay * mine + (1 - self.decay) * theirs)

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "swa": AveragedModel,
    "swa with buffers": lambda m: AveragedModel(m, use_buffers=True),
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema with buffers": lambda m: AveragedModel(
        m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    ),
    "state dict": Ema,
    "state dict, slow": lambda m: Ema(m, decay=0.9998),
    "floats of the state dict": lambda m: Ema(m, floats=True),
}
NAMES = ["static", "set", "rigl", "snfs", "dsr", "gradual-magnitude", "ssc"]
# Their masks are those of the model.
EXACT = tuple(kind for kind in KINDS if not kind.startswith("state dict"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_average_turned_dense_is_that_average(name: str, kind: str, nested: bool) -> None:
    """It holds no more weights than planned, and computes what the compiled copy computes."""
    torch.manual_seed(0)
    policy = swatfx.ssc(2, 4) if name == "ssc" else POLICIES[name]
    gm = swatfx.compile(net(), replace(policy, first_dense=False, last_dense=False))
    model: nn.Module = Outer(gm) if nested else gm
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    swatfx.attach(model, optimizer, **TIMES)
    average = KINDS[kind](model)
    for x in rows(TOTAL):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
        before = snapshot(gm)
        average.update_parameters(model)
        assert_same(snapshot(gm), before)
    inner = net()
    plain: nn.Module = Outer(inner) if nested else inner
    plain.load_state_dict(swatfx.dense_state_dict(average), strict=True)
    average.eval()
    x = rows(1, seed=5)[0]
    torch.testing.assert_close(plain(x), average(x))
    twin = next(root for _, root in compiled_models(average))
    for layer, own in zip(sparse_layers(twin), sparse_layers(gm), strict=True):
        dense = inner.get_parameter(layer.plan.weight)
        assert torch.equal(dense != 0, layer.keep() & (layer.weight != 0))
        assert bool((dense != 0).any())
        if kind in EXACT or name in ("static", "ssc"):
            assert torch.equal(layer.keep(), own.keep())
        planned = own.weight_density.count(dense.numel())
        if name in ("static", "set", "rigl", "ssc"):
            assert int((dense != 0).sum()) <= planned
            # An average that lost its mask would lose weights that matter with it.
            if kind not in (*EXACT, "state dict, slow"):
                assert int((dense != 0).sum()) >= 0.9 * planned - 2


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_selected_anew_stay_dense(kind: str) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(net(), "swat-u:0.8")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    average = KINDS[kind](gm)
    for x in rows(3):
        optimizer.zero_grad()
        loss_of(gm(x)).backward()
        optimizer.step()
        average.update_parameters(gm)
    plain = net()
    plain.load_state_dict(swatfx.dense_state_dict(average), strict=True)
    assert all(p.all() for p in plain.parameters())
    # The copy selects of its own weights at the planned density, whatever became of its buffers.
    with torch.no_grad():
        for index in (2, 4):
            weight = plain.get_parameter(f"{index}.weight")
            count = swatfx.Density.from_sparsity(0.8).count(weight.numel())
            weight[weight.abs() < weight.abs().flatten().topk(count).values[-1]] = 0
    average.eval()
    x = rows(1, seed=5)[0]
    torch.testing.assert_close(plain(x), average(x))


@pytest.mark.parametrize("name", [*POLICIES, "dst"])
def test_a_copy_that_nothing_averaged_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    policy = swatfx.dst(0.01) if name == "dst" else POLICIES[name]
    gm = swatfx.compile(net(), policy)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
    swatfx.attach(gm, optimizer, **TIMES)
    for x in rows(TOTAL):
        optimizer.zero_grad()
        loss_of(gm(x)).backward()
        optimizer.step()
    twin = copy.deepcopy(gm).eval()
    before = snapshot(twin)
    x = rows(1, seed=5)[0]
    assert torch.equal(twin(x), gm.eval()(x))
    assert_same(dict(swatfx.dense_state_dict(twin)), swatfx.dense_state_dict(gm))
    assert_same(snapshot(twin), before)
