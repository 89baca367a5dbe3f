"""Between refreshes a threshold does not ask its op, where nothing would come of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import swatfx
from swatfx import ops
from swatfx.compiled.module import SwatModule
from swatfx.ops import state

torch.set_num_threads(1)
PERIOD = 4


class Watching(TorchDispatchMode):
    """Lets every op through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _net(policy: Any = None) -> SwatModule:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    chosen = policy or swatfx.swat_u(0.75, period=PERIOD, first_dense=False)
    return swatfx.compile(nn.Sequential(*layers), chosen)


def _x(seed: int) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def _train(gm: SwatModule, steps: int, watched: bool = False, start: int = 0) -> list[Tensor]:
    found = []
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for i in range(start, start + steps):
        optimizer.zero_grad()
        if watched:
            with Watching():
                y = gm(_x(i))
        else:
            y = gm(_x(i))
        y.square().sum().backward()
        found += [y.detach(), *(p.grad.clone() for p in gm.parameters() if p.grad is not None)]
        optimizer.step()
    return found


@pytest.fixture
def refreshes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose op is called."""
    called: list[str] = []
    real = ops.refresh

    def note(*args: Any) -> Any:
        called.append(args[8])
        return real(*args)

    monkeypatch.setattr(ops, "refresh", note)
    return called


def test_the_op_is_asked_where_a_refresh_is_due(refreshes: list[str]) -> None:
    gm = _net()
    counts = []
    for i in range(2 * PERIOD + 1):
        _train(gm, 1, start=i)
        counts.append(len(refreshes))
        refreshes.clear()
    each = 6  # three layers, weight and activation
    assert counts == [each if i % PERIOD == 0 else 0 for i in range(2 * PERIOD + 1)]


def test_what_is_watched_asks_the_op_and_gives_the_same(refreshes: list[str]) -> None:
    plain, watched = _net(), _net()
    ours = _train(plain, 2 * PERIOD + 1)
    refreshes.clear()
    theirs = _train(watched, 2 * PERIOD + 1, watched=True)
    assert len(refreshes) == 6 * (2 * PERIOD + 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    state = plain.state_dict(), watched.state_dict()
    assert all(torch.equal(value, state[1][key]) for key, value in state[0].items())


def test_loaded_weights_ask_at_once(refreshes: list[str]) -> None:
    gm, other = _net(), _net()
    _train(gm, 2)
    _train(other, 2, start=7)
    refreshes.clear()
    gm.load_state_dict(other.state_dict())
    _train(gm, 1)
    assert set(refreshes) == {"0", "2", "4"}


def test_a_weight_in_another_storage_asks_at_once(refreshes: list[str]) -> None:
    gm = _net()
    _train(gm, 2)
    refreshes.clear()
    weight = gm.get_parameter("0.weight")
    weight.data = weight.detach().clone()
    _train(gm, 1)
    assert refreshes == ["0"]


def test_a_checkpoint_asks_where_it_runs_again(refreshes: list[str]) -> None:
    gm = _net()
    _train(gm, 2)
    again = copy.deepcopy(gm)
    refreshes.clear()
    gm(_x(9)).square().sum().backward()
    assert not refreshes
    _train(again, 1)  # a copy remembers nothing of what calls used
    assert refreshes
    refreshes.clear()
    again.zero_grad()
    gm.zero_grad()
    checkpoint(again, _x(9), use_reentrant=False).square().sum().backward()
    assert refreshes


def test_a_later_refresh_leaves_what_backward_waits_for(refreshes: list[str]) -> None:
    gm = _net()
    _train(gm, PERIOD - 1)
    pending = gm(_x(0))
    gm(_x(1))  # refreshes, before the backward of the one before
    (expected,) = torch.autograd.grad(pending.sum(), [gm.get_parameter("0.weight")])
    again = _net()
    _train(again, PERIOD - 1)
    (found,) = torch.autograd.grad(again(_x(0)).sum(), [again.get_parameter("0.weight")])
    assert torch.equal(found, expected)


def test_inputs_of_a_subclass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is made from them, and is of it too: thresholds are those that the op gives."""
    from torch.testing._internal.two_tensor import TwoTensor

    found = []
    for always in (False, True):
        monkeypatch.setattr(state, "_is_watched", lambda always=always: always)
        gm = _net()
        found.append([gm(TwoTensor(_x(i), _x(i))).a for i in range(PERIOD + 2)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore")  # of torch.jit, which is deprecated
@pytest.mark.parametrize("training", [True, False])
def test_a_trace_holds_the_op(training: bool) -> None:
    """Not the threshold of the moment, whoever asked for it before."""
    gm = _net().train(training)
    for i in range(2):
        gm(_x(i))
    traced = torch.jit.trace(gm, (_x(2),), check_trace=False)
    assert ("swatfx::refresh" if training else "swatfx::current") in str(traced.inlined_graph)
