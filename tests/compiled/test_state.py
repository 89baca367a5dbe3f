"""What a compiled model remembers: copies, state dicts, checkpoints in the middle of a period."""

from __future__ import annotations

import copy
import pathlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.errors import CheckpointError
from tests.nets.small_nets import (
    EagerMiddle,
    EagerRoot,
    Residual,
    Tied,
    assert_same,
    batches,
    loss_of,
    plain,
    sgd,
    snapshot,
    train,
)

# At iteration 5 of period 3, the thresholds in use are two iterations old.
BEFORE, AFTER, PERIOD = 5, 4, 3
POLICIES = [
    swatfx.swat_u(0.8, period=PERIOD),
    swatfx.swat_erk(0.8, period=PERIOD),
    swatfx.swat_m(0.8, period=PERIOD),
    swatfx.saw(0.8, period=PERIOD),
    swatfx.meprop(0.8),
    swatfx.swat_u(0.5, period=PERIOD, weight_selector="2:4", activation_selector="chw"),
    swatfx.swat_u(0.8, period=PERIOD, weight_selector="random", activation_selector="random"),
    swatfx.swat_u(0.8, period=PERIOD, weight_selector="channel", update="active"),
]
NAMES = [f"{p.name}-{p.weight_selector}" for p in POLICIES]


def _trained(policy: swatfx.Policy) -> tuple[SwatModule, torch.optim.Optimizer]:
    torch.manual_seed(0)
    gm = swatfx.compile(Residual(dropout=0.2), policy)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    train(gm, optimizer, batches(BEFORE))
    return gm, optimizer


def _go_on(gm: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    torch.manual_seed(7)  # of dropout
    losses = train(gm, optimizer, batches(AFTER, seed=1))
    return snapshot(gm) | {"losses": torch.tensor(losses)}


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_deepcopy_goes_on_bit_for_bit(policy: swatfx.Policy) -> None:
    gm, optimizer = _trained(policy)
    twin = copy.deepcopy(gm)
    twin_optimizer = sgd(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    swatfx.attach(twin, twin_optimizer)
    before = snapshot(twin)
    assert_same(before, snapshot(gm))
    expected = _go_on(gm, optimizer)
    assert_same(before, snapshot(twin))  # nothing is shared
    assert_same(_go_on(twin, twin_optimizer), expected)


def test_deepcopy_of_a_hooked_layer_in_training() -> None:
    """Eager's own deepcopy refuses the computed weight that such hooks leave behind."""
    net = plain()
    nn.utils.spectral_norm(net[2])
    gm = swatfx.compile(net, "swat-u:0.8,period=2")
    train(gm, sgd(gm), batches(3))
    twin = copy.deepcopy(gm)
    assert train(twin, sgd(twin), batches(2)) == train(gm, sgd(gm), batches(2))


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_state_dict_goes_on_bit_for_bit(policy: swatfx.Policy) -> None:
    gm, optimizer = _trained(policy)
    state, moments = copy.deepcopy((gm.state_dict(), optimizer.state_dict()))
    expected = _go_on(gm, optimizer)
    torch.manual_seed(99)
    twin = swatfx.compile(Residual(dropout=0.2), policy)
    twin_optimizer = sgd(twin)
    swatfx.attach(twin, twin_optimizer)
    twin.load_state_dict(state, strict=True)
    twin_optimizer.load_state_dict(moments)
    assert_same(dict(twin.state_dict()), state)
    result = _go_on(twin, twin_optimizer)
    assert_same(
        {k: result[k] for k in state if k in result} | {"losses": result["losses"]},
        {k: expected[k] for k in state if k in expected} | {"losses": expected["losses"]},
    )


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_save_and_load_go_on_bit_for_bit(policy: swatfx.Policy, tmp_path: pathlib.Path) -> None:
    gm, optimizer = _trained(policy)
    path = tmp_path / "middle.ckpt"
    swatfx.save(gm, path, optimizer=optimizer)
    saved = copy.deepcopy(dict(gm.state_dict()))
    expected = _go_on(gm, optimizer)
    torch.manual_seed(99)
    model = Residual(dropout=0.2)
    other = sgd(model)  # made before: parameters are shared
    twin = swatfx.load(path, model, optimizer=other)
    swatfx.attach(twin, other)
    assert_same(dict(twin.state_dict()), saved)
    result = _go_on(twin, other)
    assert_same(
        {k: result[k] for k in saved if k in result} | {"losses": result["losses"]},
        {k: expected[k] for k in saved if k in expected} | {"losses": expected["losses"]},
    )


@pytest.mark.parametrize("build", [plain, Residual, EagerMiddle, Tied])
def test_dense_checkpoint_loads_strictly(build: Callable[[], nn.Module]) -> None:
    dense = build().state_dict()
    gm = swatfx.compile(build(), swatfx.swat_u(0.8))
    for target in (gm, copy.deepcopy(gm)):
        keys = target.load_state_dict(dense, strict=True)
        assert not keys.missing_keys and not keys.unexpected_keys
        _assert_fresh(target)
        back = swatfx.dense_state_dict(target)
        assert_same(back, dict(dense))
        build().load_state_dict(back, strict=True)
    assert not any(key.startswith("swat.") for key in dense)  # the caller's dict is as it was


def _assert_fresh(gm: SwatModule) -> None:
    layers = list(sparse_layers(gm))
    have = [layer.weight_threshold.threshold.clone() for layer in layers]
    swatfx.refresh(gm)
    for layer, threshold in zip(layers, have, strict=True):
        assert torch.equal(layer.weight_threshold.threshold, threshold), layer.plan.name
        kept = int(layer.keep().sum())
        assert kept == layer.weight_density.count(layer.weight.numel())


@pytest.mark.parametrize("copied", [False, True])
def test_dense_checkpoint_loads_through_a_parent(copied: bool) -> None:
    dense = nn.Sequential(plain(), nn.Linear(10, 2)).state_dict()
    gm = swatfx.compile(plain(), swatfx.swat_u(0.8))
    parent = nn.Sequential(gm, nn.Linear(10, 2))
    if copied:
        parent = copy.deepcopy(parent)
    parent.load_state_dict(dense, strict=True)
    assert isinstance(parent[0], SwatModule)
    _assert_fresh(parent[0])
    assert torch.equal(parent[0].get_parameter("2.weight"), dense["0.2.weight"])


def test_dense_checkpoint_can_be_assigned() -> None:
    gm = swatfx.compile(plain(), swatfx.swat_u(0.8))
    dense = plain().state_dict()
    gm.load_state_dict(dense, strict=True, assign=True)
    _assert_fresh(gm)
    expected = plain()
    expected.load_state_dict(dense)
    zero = swatfx.compile(expected, swatfx.swat_u(0.8))
    x = batches(1)[0]
    assert torch.equal(gm.eval()(x), zero.eval()(x))


def test_compiled_checkpoint_keeps_its_thresholds() -> None:
    gm, _ = _trained(swatfx.swat_u(0.8, period=100))  # thresholds of the first iteration
    twin = swatfx.compile(Residual(), swatfx.swat_u(0.8, period=100))
    twin.load_state_dict(gm.state_dict())
    assert_same(dict(twin.state_dict()), dict(gm.state_dict()))


def test_missing_and_foreign_keys_are_still_refused() -> None:
    gm = swatfx.compile(plain(), swatfx.swat_u(0.8))
    dense = dict(plain().state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.weight"):
        gm.load_state_dict({k: v for k, v in dense.items() if k != "2.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key.*surplus"):
        gm.load_state_dict(dense | {"surplus": torch.zeros(1)})
    partial = {k: v for k, v in gm.state_dict().items() if k != "swat.clock.iteration"}
    with pytest.raises(RuntimeError, match="swat.clock.iteration"):
        gm.load_state_dict(partial)


@pytest.mark.parametrize("build", [plain, Residual, EagerMiddle, EagerRoot, Tied])
def test_parameters_are_shared_and_keep_their_names(build: Callable[[], nn.Module]) -> None:
    model = build()
    names = dict(model.named_parameters())
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    gm = swatfx.compile(model, swatfx.swat_u(0.5, first_dense=False))
    ours = dict(gm.named_parameters())
    assert list(ours) == list(names)
    assert all(ours[name] is p for name, p in names.items())
    after = torch.optim.SGD(gm.parameters(), lr=0.1)
    pairs = zip(before.param_groups[0]["params"], after.param_groups[0]["params"], strict=True)
    assert all(a is b for a, b in pairs)
    buffers = {k: v for k, v in gm.named_buffers() if not k.startswith("swat.")}
    assert all(buffers[name] is b for name, b in model.named_buffers())


def test_optimizer_made_before_or_after_trains_the_same() -> None:
    results = []
    for early in (True, False):
        torch.manual_seed(0)
        model = plain()
        optimizer = sgd(model) if early else None
        gm = swatfx.compile(model, "swat-u:0.8,period=2")
        train(gm, optimizer or sgd(gm), batches(3))
        results.append(snapshot(gm))
        assert torch.equal(model[2].weight, gm.get_parameter("2.weight"))
    assert_same(*results)


def test_mode_flags_are_not_shared() -> None:
    model = Residual()
    gm = swatfx.compile(model, "swat-u:0.8")
    gm.eval()
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in gm.modules())


@pytest.mark.parametrize("build", [Residual, EagerMiddle])
def test_evaluation_changes_nothing(build: Callable[[], nn.Module]) -> None:
    gm = swatfx.compile(build(), "swat-u:0.8,period=2")
    optimizer = sgd(gm)
    train(gm, optimizer, batches(3))
    gm.eval()
    before = snapshot(gm)
    loss_of(gm(batches(1)[0])).backward()
    assert_same(snapshot(gm), before)


def test_two_threads_in_eval() -> None:
    gm = swatfx.compile(Residual(), "swat-u:0.8,period=3")
    train(gm, sgd(gm), batches(2))
    gm.eval()
    data = batches(6, seed=3)
    with torch.no_grad():
        expected = [gm(x) for x in data]
    got: dict[tuple[int, int], Tensor] = {}

    def work(thread: int) -> None:
        with torch.no_grad():
            for index, x in enumerate(data):
                got[thread, index] = gm(x)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2 * len(data)
    assert all(torch.equal(y, expected[index]) for (_, index), y in got.items())


@pytest.mark.parametrize("selector", ["nchw", "chw", "hw", "random"])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_does_what_eager_does(selector: str, training: bool) -> None:
    model = plain()
    gm = swatfx.compile(model, swatfx.swat_u(0.8, period=2, activation_selector=selector))
    gm.train(training)
    model.train(training)
    x = torch.zeros(0, 3, 8, 8)
    ours, theirs = gm(x), model(x)
    assert ours.shape == theirs.shape == (0, 10)
    grads = []
    for y in (ours, theirs):
        model.zero_grad()
        y.sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    train(gm.train(), sgd(gm), batches(2))  # and it trains on


def test_empty_batch_in_batch_norm_fails_as_eager_does() -> None:
    model = Residual()
    gm = swatfx.compile(model, "swat-u:0.8")
    x = torch.zeros(0, 3, 8, 8)
    outcomes = []
    for module in (model, gm):
        try:
            outcomes.append(tuple(module(x).shape))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_pickling_says_what_to_do_instead(tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(plain(), "swat-u:0.8")
    with pytest.raises(CheckpointError, match=r"swatfx\.save"):
        torch.save(gm, tmp_path / "model.pt")
