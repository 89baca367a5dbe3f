"""Several optimizers on one compiled model: together, in turns, left out; and who owns what."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.learned import learned_thresholds
from swatfx.compiled.module import SwatModule
from swatfx.errors import AttachError
from tests.nets.any_optimizer import FORMS, net, rows
from tests.nets.held_masks import POLICIES, TIMES, TOTAL, masks_of, same
from tests.nets.small_nets import assert_same, loss_of, snapshot

METHODS = {
    name: replace(POLICIES[name], first_dense=False)
    for name in (
        "static",
        "set",
        "rigl",
        "snfs",
        "dsr",
        "gradual-magnitude",
        "soft-filter",
        "swat-frozen",
        "swat-m",
    )
} | {"dst": swatfx.dst(0.01), "rigl-shares": replace(POLICIES["rigl"], grow_share="survivors")}


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def _parts(gm: SwatModule) -> list[list[nn.Parameter]]:
    """Parameters of the backbone and of the head, learned thresholds apart."""
    parameters = list(gm.named_parameters())
    head = [p for name, p in parameters if name.startswith("4.")]
    return [[p for n, p in parameters if not n.startswith(("4.", "swat."))], head]


def _pair(
    policy: swatfx.Policy, split: bool, one_by_one: bool = False
) -> tuple[SwatModule, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    gm = swatfx.compile(net(bias=True), policy)
    parts = _parts(gm)
    if split:
        optimizers = [_sgd(part) for part in parts]
    else:
        optimizers = [_sgd([{"params": part} for part in parts])]
    if one_by_one:
        for optimizer in optimizers:
            swatfx.attach(gm, optimizer, **TIMES)
    else:
        swatfx.attach(gm, optimizers, **TIMES)
    return gm, optimizers


def _train(gm: Any, optimizers: Sequence[torch.optim.Optimizer], x: torch.Tensor) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(gm(x)).backward()
    for optimizer in optimizers:
        optimizer.step()


# ---- Together ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["given", "reversed", "alternating"])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_two_optimizers_do_what_one_with_two_groups_does(
    name: str, one_by_one: bool, order: str
) -> None:
    """Bit for bit, whichever comes first: masks, densities, weights, clock."""
    gm, optimizers = _pair(METHODS[name], True, one_by_one)
    reference, whole = _pair(METHODS[name], False)
    for step, x in enumerate(rows(TOTAL), 1):
        back = order == "reversed" or (order == "alternating" and step % 2)
        _train(gm, optimizers[::-1] if back else optimizers, x)
        _train(reference, whole, x)
        assert int(gm.swat.clock.updates) == step
        assert_same(snapshot(gm), snapshot(reference))


def test_three_optimizers_of_different_kinds() -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(net(), METHODS["rigl"])
    makes = [FORMS["Muon"], FORMS["Adam fused"], FORMS["SGD"]]
    optimizers = [
        make([gm.get_parameter(f"{i}.weight")]) for make, i in zip(makes, (0, 2, 4), strict=True)
    ]
    swatfx.attach(gm, {str(i): o for i, o in enumerate(optimizers)}, **TIMES)
    before = masks_of(gm)
    for x in rows(TOTAL):
        _train(gm, optimizers, x)
        for layer in sparse_layers(gm):
            assert not layer.weight[~layer.keep()].any()
    assert int(gm.swat.clock.updates) == TOTAL
    assert not any(torch.equal(mask, before[name]) for name, mask in masks_of(gm).items())


# ---- In turns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_optimizers_that_take_turns_count_once_a_round(name: str) -> None:
    """As in a GAN: a forward and a step each. A round is a training step."""
    gm, optimizers = _pair(METHODS[name], True)
    before = masks_of(gm)
    data = iter(rows(2 * TOTAL))
    for step in range(1, TOTAL + 1):
        for optimizer in optimizers:
            for p in gm.parameters():  # the other's, too: as one who does not clear those
                p.grad = None
            loss_of(gm(next(data))).backward()
            optimizer.step()
        assert int(gm.swat.clock.updates) == step
        for layer in sparse_layers(gm):
            if METHODS[name].zero_inactive == "always":
                assert not layer.weight[~layer.keep()].any()
    assert int(gm.swat.clock.iteration) == 2 * TOTAL
    if METHODS[name].updates_masks and name != "soft-filter":  # the same filters may stay smallest
        assert all(not torch.equal(m, before[n]) for n, m in masks_of(gm).items() if not m.all())


@pytest.mark.parametrize("ratio", [2, 3, 5])
@pytest.mark.parametrize("name", ["rigl", "set", "snfs", "dsr", "swat-m", "rigl-shares"])
def test_one_may_step_more_often(name: str, ratio: int) -> None:
    """As a critic does: the clock is that of the one that steps most; both move their masks."""
    policy = METHODS[name]
    if policy.updates_masks:
        policy = replace(policy, update_every=2, drop_decay="constant")
    torch.manual_seed(0)
    gm = swatfx.compile(net(), policy)
    often, seldom = (_sgd(part) for part in _parts(gm))
    swatfx.attach(gm, [often, seldom], total_steps=100)
    before = masks_of(gm)
    for step, x in enumerate(rows(6 * ratio), 1):
        often.zero_grad()
        seldom.zero_grad()
        loss_of(gm(x)).backward()
        often.step()
        if step % ratio == 0:
            seldom.step()
        assert int(gm.swat.clock.updates) == step
        for layer in sparse_layers(gm):
            if policy.zero_inactive == "always":
                assert not layer.weight[~layer.keep()].any()
    if name != "swat-m":
        after = masks_of(gm)
        assert all(not torch.equal(mask, before[n]) for n, mask in after.items())


def test_who_takes_turns_may_freeze_the_others_weights() -> None:
    """Lightning toggles requires_grad while one optimizer has its turn."""
    gm, optimizers = _pair(METHODS["rigl-shares"], True)
    before = masks_of(gm)
    parts = _parts(gm)
    for x in rows(TOTAL):
        for turn, optimizer in enumerate(optimizers):
            for p in parts[1 - turn]:
                p.requires_grad_(False)
            optimizer.zero_grad()
            loss_of(gm(x)).backward()
            optimizer.step()
            for p in parts[1 - turn]:
                p.requires_grad_(True)
    assert int(gm.swat.clock.updates) == TOTAL
    assert all(not torch.equal(mask, before[n]) for n, mask in masks_of(gm).items())


# ---- Left out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_one_of_two_is_skipped(name: str, which: int, fused: bool) -> None:
    """The other's step counts; no weight or mask of the one that is skipped changes."""
    torch.manual_seed(0)
    gm = swatfx.compile(net(bias=True), METHODS[name])
    parts = _parts(gm)
    optimizers = [
        torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=fused and i == which)
        for i, p in enumerate(parts)
    ]
    swatfx.attach(gm, optimizers, **TIMES)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    mine = ("4.",) if which else ("0.", "2.")
    for step, x in enumerate(rows(TOTAL), 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss_of(gm(x))).backward()
        before, masks = snapshot(gm), masks_of(gm)
        if step in (2, 5, 6):
            for p in parts[which]:
                assert p.grad is not None
                p.grad.fill_(float("inf"))
        for turn in (which, 1 - which):
            scaler.step(optimizers[turn])
            if turn == which and step in (2, 5, 6):
                assert_same(snapshot(gm), before)
        scaler.update()
        if step in (2, 5, 6):
            for key, value in snapshot(gm).items():
                assert not key.startswith(mine) or torch.equal(value, before[key]), key
            for key, mask in masks_of(gm).items():
                held = METHODS[name].hold_from_epoch == 0
                assert not (held and key.startswith(mine)) or torch.equal(mask, masks[key])
        assert int(gm.swat.clock.updates) == step
        for layer in sparse_layers(gm):
            if METHODS[name].zero_inactive == "always":
                assert not layer.weight[~layer.keep()].any()


@pytest.mark.parametrize("name", ["rigl", "snfs", "rigl-shares"])
def test_both_still_update_after_a_skip(name: str) -> None:
    """One that was skipped at the very first step, by a scaler, is not out of step for good."""
    torch.manual_seed(0)
    policy = replace(METHODS[name], update_every=2, drop_decay="constant")
    gm = swatfx.compile(net(), policy)
    optimizers = [_sgd(part) for part in _parts(gm)]
    swatfx.attach(gm, optimizers, total_steps=100)
    for step, x in enumerate(rows(12), 1):
        before = masks_of(gm)
        _train(gm, optimizers[step == 1 :], x)  # the first one is not even called
        changed = {n for n, mask in masks_of(gm).items() if not torch.equal(mask, before[n])}
        assert int(gm.swat.clock.updates) == step
        if step > 4:
            assert ({"2", "4"} <= changed) if step % 2 == 0 else not changed, step


# ---- Who owns what -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_weight_that_no_attached_optimizer_holds_is_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(net(), METHODS[name])
    backbone, head = (_sgd(part) for part in _parts(gm))
    swatfx.attach(gm, backbone, **TIMES)
    loss_of(gm(rows(1)[0])).backward()
    before = snapshot(gm)
    with pytest.raises(AttachError, match=r"layer '4'.*attach\(gm, \[first, second\]\)"):
        backbone.step()
    assert_same(snapshot(gm), before)
    swatfx.attach(gm, head, **TIMES)  # the remedy
    backbone.step()
    head.step()
    assert int(gm.swat.clock.updates) == 1


def test_frozen_weights_want_no_optimizer_until_they_train() -> None:
    gm, _ = _pair(METHODS["rigl"], True)
    gm = copy.deepcopy(gm)
    frozen = gm.get_parameter("0.weight").requires_grad_(False)
    kept = frozen.clone()
    trained = [p for p in gm.parameters() if p is not frozen]
    optimizer = _sgd(trained)
    swatfx.attach(gm, optimizer, **TIMES)
    for x in rows(3):
        _train(gm, [optimizer], x)
    assert torch.equal(frozen, kept)
    frozen.requires_grad_(True)
    with pytest.raises(AttachError, match="layer '0'"):
        _train(gm, [optimizer], rows(1)[0])
    optimizer.add_param_group({"params": [frozen], "lr": 0.1})
    mask = masks_of(gm)["0"]
    for x in rows(TOTAL - 3):
        _train(gm, [optimizer], x)
        assert not frozen[~masks_of(gm)["0"]].any()
    assert not torch.equal(frozen, kept) and not torch.equal(mask, masks_of(gm)["0"])


def test_methods_that_need_nothing_leave_weights_without_an_optimizer() -> None:
    gm = swatfx.compile(net(), "swat-u:0.8")
    backbone, _ = (_sgd(part) for part in _parts(gm))
    swatfx.attach(gm, backbone)
    _train(gm, [backbone], rows(1)[0])


def test_learned_thresholds_go_to_the_optimizer_of_their_weight() -> None:
    for one_by_one in (False, True):
        gm, optimizers = _pair(METHODS["dst"], True, one_by_one)
        thresholds = [id(m.threshold) for m in learned_thresholds(gm)]
        added = [[id(p) for p in o.param_groups[-1]["params"]] for o in optimizers]
        assert added == [thresholds[:2], thresholds[2:]]
        assert [len(o.param_groups) for o in optimizers] == [2, 2]


def test_a_weight_of_two_optimizers() -> None:
    """Both may hold it when they are attached together; one after the other replaces."""
    torch.manual_seed(0)
    gm = swatfx.compile(net(), METHODS["rigl"])
    backbone, head = _parts(gm)
    first, second = _sgd(backbone), FORMS["Adam"]([*backbone[1:], *head])
    swatfx.attach(gm, [first, second], **TIMES)
    for x in rows(TOTAL):
        _train(gm, [first, second], x)
        for layer in sparse_layers(gm):
            assert not layer.weight[~layer.keep()].any()
    swatfx.attach(gm, first, **TIMES)
    assert not second._optimizer_step_post_hooks
    with pytest.raises(AttachError, match="layer '4'"):
        _train(gm, [first], rows(1)[0])


def test_the_clock_goes_on_after_a_resume() -> None:
    gm, optimizers = _pair(METHODS["snfs"], True)
    whole, whole_optimizers = _pair(METHODS["snfs"], True)
    for x in rows(4):
        _train(gm, optimizers, x)
        _train(whole, whole_optimizers, x)
    twin, others = _pair(METHODS["snfs"], True)
    twin.load_state_dict(copy.deepcopy(gm.state_dict()))
    for one, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(one.state_dict()))
    for x in rows(TOTAL - 4, seed=1):
        _train(twin, others, x)
        _train(whole, whole_optimizers, x)
    assert_same(snapshot(twin), snapshot(whole))
    assert same(masks_of(twin), masks_of(whole))


@pytest.mark.parametrize("bad", [[], None, 3, [None], nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_refused(bad: Any) -> None:
    gm = swatfx.compile(net(), METHODS["rigl"])
    refusal: Callable[[], Any] = lambda: swatfx.attach(gm, bad, **TIMES)  # noqa: E731
    with pytest.raises(AttachError, match="optimizer"):
        refusal()
    assert not gm.swat.clock.attached
