"""SWAT-M: what `swatfx.attach` hangs on an optimizer, and that it stays there."""

from __future__ import annotations

import copy
import gc
import pathlib
from typing import Any

import pytest
import torch

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.distributions import momentum_budgets
from swatfx.errors import AttachError
from tests.nets.small_nets import (
    Residual,
    assert_same,
    batches,
    loss_of,
    plain,
    sgd,
    snapshot,
    train,
)

DENSITY = 0.2


def _model(**options: Any) -> SwatModule:
    torch.manual_seed(0)
    return swatfx.compile(Residual(), swatfx.swat_m(1 - DENSITY, **options))


def _counts(gm: SwatModule) -> list[int]:
    return [x.weight_density.count(x.weight.numel()) for x in sparse_layers(gm)]


def _kept(gm: SwatModule) -> list[int]:
    return [int(x.keep().sum()) for x in sparse_layers(gm)]


def _budget(gm: SwatModule) -> float:
    return DENSITY * sum(x.weight.numel() for x in sparse_layers(gm))


def test_global_budget_is_met_at_every_step() -> None:
    gm = _model()
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    layers = len(list(sparse_layers(gm)))
    seen = set()
    for x in batches(8):
        with swatfx.observe(gm) as observed:
            train(gm, optimizer, [x])
        sizes = {x.plan.name: x.weight.numel() for x in sparse_layers(gm)}
        active = sum(observed.weight_density[name] * size for name, size in sizes.items())
        assert abs(active - _budget(gm)) <= layers  # rounding up, once a layer
        assert abs(sum(_counts(gm)) - _budget(gm)) <= layers
        assert all(0 < x.weight_density.value <= 1 for x in sparse_layers(gm))
        seen.add(tuple(_counts(gm)))
    assert len(seen) == 8  # they do move


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "rmsprop"])
def test_densities_follow_the_mean_momentum(kind: str) -> None:
    gm = _model()
    make = {"sgd": sgd, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if kind == "rmsprop":
        optimizer: torch.optim.Optimizer = torch.optim.RMSprop(gm.parameters(), momentum=0.5)
    else:
        optimizer = make[kind](gm.parameters() if kind != "sgd" else gm)
    swatfx.attach(gm, optimizer)
    x = batches(1)[0]
    loss_of(gm(x)).backward()
    masks = [layer.keep() for layer in sparse_layers(gm)]
    optimizer.step()
    means, sizes = [], []
    for layer, keep in zip(sparse_layers(gm), masks, strict=True):
        state = optimizer.state[layer.weight]
        if "adam" in kind:
            moment = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        else:
            moment = state["momentum_buffer"]
        means.append(moment.abs()[keep].double().mean().item())
        sizes.append(layer.weight.numel())
    expected = momentum_budgets(means, sizes, DENSITY)
    for count, want in zip(_counts(gm), expected, strict=True):
        assert abs(count - want) <= 1


def test_densities_take_effect_at_the_next_refresh() -> None:
    gm = _model(period=3)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    thresholds = []
    for x in batches(7):
        train(gm, optimizer, [x])
        thresholds.append([layer.weight_threshold.threshold.item() for layer in sparse_layers(gm)])
    for t in range(1, 7):
        assert (thresholds[t] == thresholds[t - 1]) == (t % 3 != 0)
    counts = _counts(gm)
    assert _kept(gm) != counts
    swatfx.refresh(gm)
    assert _kept(gm) == counts


def test_redistribution_every_few_steps() -> None:
    gm = _model(redistribute_every=3)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    counts = [_counts(gm)]
    for x in batches(6):
        train(gm, optimizer, [x])
        counts.append(_counts(gm))
    changed = [a != b for a, b in zip(counts, counts[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]


def test_training_without_an_optimizer_says_what_to_do() -> None:
    gm = _model()
    before = snapshot(gm)
    with pytest.raises(AttachError, match=r"swat-m.*swatfx\.attach\(gm, optimizer\)"):
        gm(batches(1)[0])
    assert_same(snapshot(gm), before)
    gm.eval()(batches(1)[0])  # evaluation needs none


def test_detach_and_attach_again() -> None:
    gm = _model()
    optimizer = sgd(gm)
    handle = swatfx.attach(gm, optimizer)
    train(gm, optimizer, batches(1))
    counts = _counts(gm)
    handle.detach()
    with pytest.raises(AttachError):
        gm(batches(1)[0])
    optimizer.step()
    assert _counts(gm) == counts
    swatfx.attach(gm, optimizer)
    train(gm, optimizer, batches(1, seed=4))
    assert _counts(gm) != counts


def test_optimizers_without_momentum_are_refused_by_name() -> None:
    for make in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Rprop):
        gm = _model()
        optimizer = make(gm.parameters(), lr=0.1)
        with pytest.raises(AttachError, match=rf"{make.__name__}.*SGD with momentum"):
            swatfx.attach(gm, optimizer)
        assert not optimizer._optimizer_step_post_hooks
    gm = _model()
    optimizer = torch.optim.Adamax(gm.parameters())  # has betas, but not Adam's two moments
    with pytest.raises(AttachError, match="Adamax"):
        swatfx.attach(gm, optimizer)
        train(gm, optimizer, batches(1))


def test_an_optimizer_of_another_model_is_refused() -> None:
    gm = _model()
    with pytest.raises(AttachError, match="none of the model's parameters"):
        swatfx.attach(gm, sgd(Residual()))


def test_policies_that_need_nothing_take_any_optimizer() -> None:
    gm = swatfx.compile(plain(), "swat-u:0.8")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    swatfx.attach(gm, optimizer)
    train(gm, optimizer, batches(2))
    assert int(gm.swat.clock.updates) == 2


def test_frozen_layers_keep_their_density() -> None:
    gm = _model()
    gm.get_parameter("block1.conv1.weight").requires_grad_(False)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    train(gm, optimizer, batches(3))
    densities = {x.plan.name: x.weight_density.value for x in sparse_layers(gm)}
    assert densities["block1.conv1"] == pytest.approx(DENSITY)
    assert abs(sum(_counts(gm)) - _budget(gm)) <= len(densities)


def test_gradient_accumulation_redistributes_once_a_step() -> None:
    gm = _model()
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    counts = [_counts(gm)]
    for x in batches(6):
        loss_of(gm(x)).backward()
        counts.append(_counts(gm))
        if len(counts) % 3 == 1:
            optimizer.step()
            optimizer.zero_grad()
            counts[-1] = _counts(gm)
    assert [a != b for a, b in zip(counts, counts[1:], strict=False)] == [0, 0, 1, 0, 0, 1]
    assert int(gm.swat.clock.iteration) == 6
    assert int(gm.swat.clock.updates) == 2


def test_grad_scaler_skips_what_overflowed() -> None:
    gm = _model()
    optimizer = sgd(gm, lr=0.01)
    swatfx.attach(gm, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    counts = [_counts(gm)]
    for step, x in enumerate(batches(4)):
        optimizer.zero_grad()
        loss = loss_of(gm(x)) * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append(_counts(gm))
    assert [a != b for a, b in zip(counts, counts[1:], strict=False)] == [1, 0, 1, 1]
    assert int(gm.swat.clock.updates) == 3


def test_attachment_survives_load_state_dict_and_resume(tmp_path: pathlib.Path) -> None:
    gm = _model(period=2)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    train(gm, optimizer, batches(3))
    swatfx.save(gm, tmp_path / "a.ckpt", optimizer=optimizer)
    state, moments = copy.deepcopy((gm.state_dict(), optimizer.state_dict()))
    expected = train(gm, optimizer, batches(4, seed=1))
    final = snapshot(gm)
    gm.load_state_dict(state)  # the same handle goes on
    optimizer.load_state_dict(moments)
    assert train(gm, optimizer, batches(4, seed=1)) == expected
    now = {k: v for k, v in gm.state_dict().items() if k in final}  # all but what is no tensor
    assert_same(now, {k: final[k] for k in now})
    model = Residual()
    other = sgd(model)
    twin = swatfx.load(tmp_path / "a.ckpt", model, optimizer=other)
    with pytest.raises(AttachError):
        twin(batches(1)[0])  # an attachment is of this process; the file has none
    swatfx.attach(twin, other)
    assert train(twin, other, batches(4, seed=1)) == expected


def test_copies_are_not_attached() -> None:
    gm = _model()
    swatfx.attach(gm, sgd(gm))
    with pytest.raises(AttachError):
        copy.deepcopy(gm)(batches(1)[0])
    gm(batches(1)[0])


def test_handle_need_not_be_kept() -> None:
    gm = _model()
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    gc.collect()
    counts = _counts(gm)
    train(gm, optimizer, batches(1))
    assert _counts(gm) != counts


def test_per_layer_rules_share_each_its_own_budget() -> None:
    torch.manual_seed(0)
    rules = {"block1.*": swatfx.swat_m(0.8), "block2.*": swatfx.swat_m(0.8)}
    gm = swatfx.compile(Residual(), swatfx.per_layer(rules))
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    train(gm, optimizer, batches(3))
    for prefix in ("block1", "block2"):
        layers = [x for x in sparse_layers(gm) if x.plan.name.startswith(prefix)]
        active = sum(x.weight_density.count(x.weight.numel()) for x in layers)
        assert abs(active - 0.2 * sum(x.weight.numel() for x in layers)) <= len(layers)
        assert len({x.weight_density.value for x in layers}) == len(layers)


def test_no_recompile_when_densities_move() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gm = _model(period=2)
    reference = copy.deepcopy(gm)
    optimizer, other = sgd(gm), sgd(reference)
    swatfx.attach(gm, optimizer)
    swatfx.attach(reference, other)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    losses = train(compiled, optimizer, batches(6))
    assert losses == train(reference, other, batches(6))
    assert_same(snapshot(gm), snapshot(reference))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
