"""Training forwards within a period, after something else than an optimizer wrote the weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from tests.nets.period_nets import batch, net

torch.set_num_threads(1)
PERIOD = 10


def trained(selector: str = "nchw", steps: int = 3) -> tuple[SwatModule, nn.Module, Any]:
    model = net()
    policy = swatfx.swat_u(0.75, period=PERIOD, weight_selector=selector, first_dense=False)
    gm = swatfx.compile(model, policy)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9)
    for seed in range(steps):
        step(gm, optimizer, seed)
    return gm, model, optimizer


def step(run: Callable[..., Any], optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    run(batch(seed)).pow(2).mean().backward()
    optimizer.step()


def stamps(gm: nn.Module) -> list[int]:
    assert isinstance(gm, SwatModule)
    return [int(layer.weight_threshold.stamp) for layer in sparse_layers(gm)]


def moved(module: nn.Module) -> dict[str, Any]:
    return {name: value * 2 + 0.1 for name, value in module.state_dict().items()}


def _load(gm: SwatModule, model: nn.Module) -> None:
    model.load_state_dict(moved(model))


def _load_around(gm: SwatModule, model: nn.Module) -> None:
    outer = nn.ModuleDict({"inner": model})
    outer.load_state_dict(moved(outer))


def _load_children(gm: SwatModule, model: nn.Module) -> None:
    for name, child in model.named_children():
        if name in ("0", "2", "5"):
            child.load_state_dict(moved(child))


def _load_own_children(gm: SwatModule, model: nn.Module) -> None:
    _load_children(gm, gm)


def _vector(gm: SwatModule, model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()) * 2 + 0.1, model.parameters())


def _data(gm: SwatModule, model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 2 + 0.1


def _refresh(gm: SwatModule, model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2).add_(0.1)
    swatfx.refresh(gm)


WRITES = [_load, _load_around, _load_children, _load_own_children, _vector, _data]


@pytest.mark.parametrize("selector", ["nchw", "hw", "channel"])
@pytest.mark.parametrize("write", WRITES, ids=[f.__name__ for f in WRITES])
def test_the_next_training_forward_takes_thresholds_of_the_new_weights(
    write: Callable[..., None], selector: str
) -> None:
    gm, model, optimizer = trained(selector)
    assert stamps(gm) == [0, 0, 0]
    gm.zero_grad()
    twin = copy.deepcopy(gm)
    _refresh(twin, twin)
    write(gm, model)
    x = batch(50)
    y, expected = gm(x), twin(x)
    assert torch.equal(y, expected)
    assert stamps(gm) == [3, 3, 3]
    y.sum().backward()
    expected.sum().backward()
    for a, b in zip(gm.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    for seed in range(4, PERIOD):  # and once only
        step(gm, optimizer, seed)
    assert stamps(gm) == [3, 3, 3]
    step(gm, optimizer, PERIOD)
    assert stamps(gm) == [PERIOD] * 3


def test_only_the_layer_that_was_loaded() -> None:
    gm, model, _ = trained()
    child = model.get_submodule("2")
    child.load_state_dict(moved(child))
    gm(batch(5))
    assert stamps(gm) == [0, 3, 0]


def test_before_any_training_forward_of_this_process() -> None:
    source, _, _ = trained()
    gm, model, _ = trained(steps=0)
    gm.load_state_dict(source.state_dict())
    child = model.get_submodule("2")
    child.load_state_dict(moved(child))
    gm(batch(5))
    assert stamps(gm) == [0, 3, 0]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_resume_in_the_middle_of_a_period_goes_on_bit_for_bit(nested: bool, assign: bool) -> None:
    gm, _, optimizer = trained()
    outer = nn.ModuleDict({"inner": gm}) if nested else gm
    state, moments = copy.deepcopy((outer.state_dict(), optimizer.state_dict()))
    other, model, _ = trained(steps=2)
    model.load_state_dict(moved(model))
    target = nn.ModuleDict({"inner": other}) if nested else other
    target.load_state_dict(state, assign=assign)
    resumed = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    resumed.load_state_dict(moments)
    for seed in range(3, 6):
        step(gm, optimizer, seed)
        step(other, resumed, seed)
    assert stamps(other) == [0, 0, 0]
    for (key, a), b in zip(gm.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw capturable": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=1),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimizer_writes_no_other_weights(name: str) -> None:
    gm, _, _ = trained(steps=0)
    optimizer = OPTIMIZERS[name](list(gm.parameters()))
    for seed in range(4):

        def closure(seed: int = seed) -> torch.Tensor:
            optimizer.zero_grad()
            loss = gm(batch(seed)).pow(2).mean()
            loss.backward()
            return loss

        closure() if name != "lbfgs" else None
        optimizer.step(closure if name == "lbfgs" else None)  # type: ignore[arg-type]
    assert stamps(gm) == [0, 0, 0]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_computed_weights_wait_for_their_period(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16)).double()
    getattr(parametrizations, kind)(model[2])
    gm = swatfx.compile(model, "swat-u:0.75,period=10")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        gm(torch.randn(4, 12, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert stamps(gm) == [0]


def test_moved_to_another_dtype_the_thresholds_are_moved_too() -> None:
    gm, _, _ = trained()
    gm.float()
    gm(batch(5).float())
    assert stamps(gm) == [0, 0, 0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_as_it_was_run(use_reentrant: bool) -> None:
    gm, model, _ = trained()
    gm.zero_grad()
    twin = copy.deepcopy(gm)
    _refresh(twin, twin)
    _load(gm, model)
    x, other = (batch(50).requires_grad_() for _ in range(2))
    y = torch.utils.checkpoint.checkpoint(gm, x, use_reentrant=use_reentrant)
    expected = twin(other)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for a, b in zip(gm.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_one_graph_under_dynamo() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    gm, model, optimizer = trained(steps=0)
    fast = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        step(fast, optimizer, seed)
    assert stamps(gm) == [0, 0, 0]
    for at, write in enumerate([_load, _vector]):
        write(gm, model)
        step(fast, optimizer, 3)
        step(fast, optimizer, 4)
        assert stamps(gm) == [3 + 2 * at] * 3
    assert counters["stats"]["unique_graphs"] == 1


def test_the_model_can_be_compiled_again_and_pickled() -> None:
    gm, model, _ = trained()
    again = swatfx.compile(model, f"swat-u:0.5,period={PERIOD}")
    assert len(list(sparse_layers(again))) == 2
    assert all(len(m._load_state_dict_post_hooks) <= 1 for m in model.modules())
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(batch(3)), model(batch(3)))
