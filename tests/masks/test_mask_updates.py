"""How masks change between optimizer steps: gradients, momentum, budgets, ranks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import swatfx
from swatfx.compiled.layers import SparseLayer, sparse_layers
from swatfx.errors import AttachError, InputError
from swatfx.masks.rules import GROWS, GrowRule, MaskedLayer, by_score
from tests.nets.held_masks import (
    OPTIMIZERS,
    POLICIES,
    TIMES,
    TOTAL,
    active,
    assert_inactive_are_zero,
    attached,
    masks_of,
    moments,
    same,
    steps,
)
from tests.nets.small_nets import (
    EagerMiddle,
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

GROWING = [2, 4, 6]  # optimizer steps of the RigL of held_masks, a cosine of six steps
DROPPED = {2: 0.225, 4: 0.075, 6: 0.0}


def _gradient(layer: SparseLayer) -> Tensor:
    assert layer.weight.grad is not None
    return layer.weight.grad


# ---- Gradients -----------------------------------------------------------------------------------


def _watch_gradients(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Layer name -> the gradient that RigL's rule last saw; filled as masks are updated."""
    seen: dict[str, Tensor] = {}
    choose = GROWS["gradient"].choose

    def watch(layer: MaskedLayer, count: int) -> Tensor:
        assert layer.gradient is not None
        seen[layer.name] = layer.gradient.clone()
        return choose(layer, count)

    monkeypatch.setitem(GROWS, "gradient", replace(GROWS["gradient"], choose=watch))
    return seen


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_rigl_sees_dense_gradients_at_the_steps_that_grow_only(
    micro_batches: int, to_none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the dense network with these weights, summed over the micro-batches.

    `.grad` never holds the part of inactive weights: clipping sees what the optimizer sees.
    """
    seen = _watch_gradients(monkeypatch)
    gm, optimizer = attached(POLICIES["rigl"])
    data = iter(batches(TOTAL * (micro_batches + 1)))
    for step in range(1, TOTAL + 1):
        loss_of(gm(next(data))).backward()  # thrown away: not part of the step
        optimizer.zero_grad(to_none)
        inactive = {layer.plan.name: ~layer.keep() for layer in sparse_layers(gm)}
        dense = plain()
        dense.load_state_dict(swatfx.dense_state_dict(gm))
        for _ in range(micro_batches):
            x = next(data)
            loss_of(gm(x)).backward()
            loss_of(dense(x)).backward()
            for layer in sparse_layers(gm):
                assert not _gradient(layer)[inactive[layer.plan.name]].any()
        torch.nn.utils.clip_grad_norm_(gm.parameters(), 1e-3)
        seen.clear()
        optimizer.step()
        assert sorted(seen) == (["2", "5"] if step in GROWING else [])
        for name, gradient in seen.items():
            torch.testing.assert_close(gradient, dense.get_parameter(f"{name}.weight").grad)
        for layer in sparse_layers(gm):
            assert not _gradient(layer)[inactive[layer.plan.name]].any()
            momentum = moments(optimizer, layer.weight)["momentum_buffer"]
            assert not momentum[inactive[layer.plan.name]].any()


@pytest.mark.parametrize("name", ["static", "set", "dsr", "gradual-magnitude"])
def test_other_masked_gradients_are_never_dense(name: str) -> None:
    gm, optimizer = attached(POLICIES[name])
    for x in batches(TOTAL):
        optimizer.zero_grad()
        loss_of(gm(x)).backward()
        for layer in sparse_layers(gm):
            assert not _gradient(layer)[~layer.keep()].any()
            assert _gradient(layer)[layer.keep()].any()
        optimizer.step()


def test_rigl_follows_its_rule_to_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights after the step, the smallest go; of the dense gradient, the largest come."""
    seen = _watch_gradients(monkeypatch)
    gm, optimizer = attached(POLICIES["rigl"], Residual)
    for step, x in enumerate(batches(TOTAL), 1):
        optimizer.zero_grad()
        loss_of(gm(x)).backward()
        before = masks_of(gm)
        optimizer.step()
        for layer in sparse_layers(gm):
            old, new = before[layer.plan.name].flatten(), layer.keep().flatten()
            gone = int(DROPPED.get(step, 0.0) * int(old.sum()) + 1e-9)
            # What was dropped is zero by now, and so is what was grown; what stayed is the rest.
            stayed = old & new & (layer.weight.detach().flatten() != 0)
            assert int(old.sum()) - int(stayed.sum()) == gone, (step, layer.plan.name)
            if step not in GROWING:
                continue
            gradient = seen[layer.plan.name].abs().flatten()
            order = gradient.masked_fill(stayed, -1).argsort(descending=True)
            assert set(order[:gone].tolist()) == set((new & ~stayed).nonzero()[:, 0].tolist())


def test_a_first_step_may_grow() -> None:
    gm, optimizer = attached(swatfx.rigl(0.8, update_every=1))
    loss_of(gm(batches(1)[0])).backward()
    before = masks_of(gm)
    optimizer.step()
    assert not same(masks_of(gm), before)


def test_a_layer_without_a_gradient_stays_as_it_is() -> None:
    """Not even the gradient of an earlier update moves it."""
    gm, optimizer = attached(POLICIES["rigl"])
    train(gm, optimizer, batches(3))
    before = masks_of(gm)
    loss_of(gm(batches(1)[0])).backward()
    weight = gm.get_parameter("2.weight")
    values, weight.grad = weight.detach().clone(), None
    optimizer.step()
    after = masks_of(gm)
    assert torch.equal(weight, values)
    assert torch.equal(after["2"], before["2"]) and not torch.equal(after["5"], before["5"])


def test_a_scaler_that_skips_a_growing_step_only_delays_it() -> None:
    gm, optimizer = attached(POLICIES["rigl"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    before, changed = masks_of(gm), []
    for attempt, x in enumerate(batches(5), 1):
        optimizer.zero_grad()
        loss = loss_of(gm(x)) * (float("inf") if attempt == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = masks_of(gm)
        changed.append(not same(before, after))
        before = after
        assert_inactive_are_zero(gm)
    assert changed == [False, False, True, False, True]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_may_compute_the_gradients_within_the_step(by_name: bool) -> None:
    (gm, optimizer), (reference, other) = attached(POLICIES["rigl"]), attached(POLICIES["rigl"])
    expected = train(reference, other, batches(TOTAL))
    losses = []
    for x in batches(TOTAL):

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(gm(x))
            loss.backward()
            return loss

        step: Any = optimizer.step
        losses.append((step(closure=closure) if by_name else step(closure)).item())
        assert_inactive_are_zero(gm)
    assert losses == expected
    assert_same(snapshot(gm), snapshot(reference))


# ---- What starts from zero -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_what_is_dropped_and_grown_at_once_starts_anew(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest of the inactive weights are those dropped just now: all others are zero."""
    again = GrowRule(by_score(lambda layer: layer.weight.abs()))
    monkeypatch.setitem(GROWS, "again", again)
    gm, optimizer = attached(replace(POLICIES["set"], grow="again"), make=OPTIMIZERS[kind])
    before = masks_of(gm)
    train(gm, optimizer, batches(3))  # the third step ends an epoch
    assert same(masks_of(gm), before)
    for layer in sparse_layers(gm):
        zero = layer.keep() & (layer.weight == 0)
        assert abs(int(zero.sum()) - 0.3 * int(layer.keep().sum())) < 1, layer.plan.name
        remembered = moments(optimizer, layer.weight)
        assert remembered
        for key, value in remembered.items():
            assert not value[zero].any() and value[layer.keep() & ~zero].any(), key


def test_momentum_of_dense_training_revives_nothing() -> None:
    """An optimizer that trained the dense network first remembers gradients of every weight."""
    torch.manual_seed(0)
    net = plain()
    optimizer = sgd(net)
    train(net, optimizer, batches(3))
    gm = swatfx.compile(net, POLICIES["static"])
    swatfx.attach(gm, optimizer)
    for _ in steps(gm, optimizer):
        assert_inactive_are_zero(gm)


def test_dense_layers_of_a_sparse_budget_are_left_alone() -> None:
    """What Erdos-Renyi densities leave dense has nothing to grow: nothing of it is zeroed."""
    gm, optimizer = attached("set:0.5", Residual)
    dense = [layer for layer in sparse_layers(gm) if layer.weight_density.is_dense]
    assert [layer.plan.name for layer in dense] == ["stem", "block1.down", "block2.down", "fc"]
    for _ in steps(gm, optimizer):
        assert all(layer.weight.all() for layer in dense)


def test_every_draw_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the policy's seed, the layer and the step; the initial masks are the weights' here."""
    seeds: list[int] = []
    draw = GROWS["random"].choose

    def watch(layer: MaskedLayer, count: int) -> Tensor:
        seeds.append(layer.generator.initial_seed())
        return draw(layer, count)

    monkeypatch.setitem(GROWS, "random", GrowRule(watch))
    ends = []
    for seed in (0, 0, 1):
        gm, optimizer = attached(replace(POLICIES["set"], weight_selector="nchw", seed=seed))
        list(steps(gm, optimizer))
        ends.append(masks_of(gm))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])
    assert seeds[:6] == seeds[6:12] and len(seeds) == 18 and len(set(seeds)) == 12


# ---- Budgets -------------------------------------------------------------------------------------


def test_rules_of_a_per_layer_policy_have_budgets_and_memories_of_their_own() -> None:
    rules = {
        "stem": swatfx.static(0.5),
        "block1.*": swatfx.dsr(0.7, update_every=2, drop_fraction=0.5),
        "block2.*": swatfx.dsr(0.9, update_every=3, drop_fraction=0.01),
    }
    gm, optimizer = attached(swatfx.per_layer(rules, default="rigl:0.8,update_every=2"), Residual)
    budgets = {"stem": 0.5, "block1.": 0.3, "block2.": 0.1, "fc": 0.2}
    before = masks_of(gm)
    for step in steps(gm, optimizer):
        after = masks_of(gm)
        for prefix, density in budgets.items():
            mine = {name: mask for name, mask in after.items() if name.startswith(prefix)}
            total = sum(mask.numel() for mask in mine.values())
            assert abs(active(mine) - density * total) <= len(mine), (step, prefix)
    assert gm.swat.memory is not None
    # Position 0 is the default's, then one a rule; only DSR's remember.
    assert [value > 0 for value in gm.swat.memory.tolist()] == [False, False, True, True]
    assert gm.swat.memory[2] != gm.swat.memory[3]
    assert torch.equal(before["stem"], after["stem"])
    for prefix in ("block1.", "block2.", "fc"):
        assert any(not torch.equal(before[n], after[n]) for n in after if n.startswith(prefix))


def test_rules_of_two_methods_combine() -> None:
    gm, optimizer = attached(replace(POLICIES["snfs"], grow_share="survivors"))
    densities = [layer.weight_density.value for layer in sparse_layers(gm)]
    list(steps(gm, optimizer))
    layers = list(sparse_layers(gm))
    assert [layer.weight_density.value for layer in layers] != densities
    for layer in layers:  # the target is what the mask holds
        assert layer.weight_density.count(layer.weight.numel()) == int(layer.keep().sum())


@pytest.mark.parametrize("name", ["set", "rigl", "snfs", "dsr", "gradual-magnitude"])
def test_frozen_layers_keep_their_masks(name: str) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(Residual(), POLICIES[name])
    gm.get_parameter("block1.conv1.weight").requires_grad_(False)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    before = masks_of(gm)
    budget = active(before)
    frozen = gm.get_parameter("block1.conv1.weight").clone()
    for _ in steps(gm, optimizer):
        assert_inactive_are_zero(gm)
        if name != "gradual-magnitude":
            assert active(masks_of(gm)) == budget
    after = masks_of(gm)
    assert torch.equal(after["block1.conv1"], before["block1.conv1"])
    assert torch.equal(gm.get_parameter("block1.conv1.weight"), frozen)
    assert not torch.equal(after["block1.conv2"], before["block1.conv2"])


def test_layers_below_eager_code_take_part() -> None:
    gm, optimizer = attached(POLICIES["rigl"], EagerMiddle)
    before = masks_of(gm)
    for _ in steps(gm, optimizer):
        assert_inactive_are_zero(gm)
    assert not torch.equal(masks_of(gm)["gate.a"], before["gate.a"])


def test_a_weight_of_two_layers_has_one_mask() -> None:
    gm, optimizer = attached(swatfx.set_(0.5), Tied)
    assert list(masks_of(gm)) == ["first", "again"]
    before = masks_of(gm)
    for _ in range(TOTAL):
        train(gm, optimizer, [torch.randn(8, 6)])
        assert_inactive_are_zero(gm)
    assert active(masks_of(gm)) == active(before) and not same(masks_of(gm), before)


# ---- Refusals ------------------------------------------------------------------------------------


class TiedEmbedding(nn.Module):
    """The usual language model: one table at both ends. (N,) of 0 to 5 -> (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.middle(self.table(x)).relu())
        return y


def _weight_norm() -> nn.Module:
    net = plain()
    parametrizations.weight_norm(net[2])
    return net


@pytest.mark.parametrize(
    ("build", "policy", "message"),
    [
        (_weight_norm, "static:0.5", "layer '2'.*static.*computed from others.*parametrization"),
        (_weight_norm, "swat-frozen:0.5", "layer '2'.*swat-frozen.*computed from others"),
        (
            TiedEmbedding,
            "static:0.5",
            "layer 'head'.*other code reads.*table.weight.*'head': 'dense'",
        ),
    ],
)
def test_weights_that_no_mask_can_hold_are_refused(
    build: Callable[[], nn.Module], policy: str, message: str
) -> None:
    net = build()
    gm = swatfx.compile(net, policy)
    before = snapshot(gm)
    optimizer = sgd(net)
    with pytest.raises(AttachError, match=message):
        swatfx.attach(gm, optimizer, **TIMES)
    assert_same(snapshot(gm), before)
    assert not optimizer._optimizer_step_post_hooks


def test_momentum_that_is_none_is_found_out_at_the_first_step() -> None:
    """Adamax has betas as Adam has, but not its second moment; SNFS reads it an epoch later."""
    gm, optimizer = attached(POLICIES["snfs"], make=lambda p: torch.optim.Adamax(p))
    with pytest.raises(AttachError, match="layer '0': Adamax keeps no momentum.*Adam or AdamW"):
        train(gm, optimizer, batches(1))


@pytest.mark.parametrize("name", ["rigl", "gradual-magnitude"])
def test_nan_is_not_dropped_silently(name: str) -> None:
    gm, optimizer = attached(POLICIES[name])
    optimizer.step()  # without gradients: it only counts
    with torch.no_grad():
        layer = next(x for x in sparse_layers(gm) if x.plan.name == "2")
        layer.weight[layer.keep()] = float("nan")
    with pytest.raises(InputError, match=r"layer '2'.*NaN in the weight"):
        train(gm, optimizer, batches(2))


def test_the_remedy_of_a_refusal_works() -> None:
    policy = swatfx.per_layer({"head": "dense"}, default=swatfx.static(0.5))
    gm, _ = attached(policy, TiedEmbedding)
    assert list(masks_of(gm)) == ["middle"]
    with pytest.raises(AttachError, match=r"rigl.*wants total_steps"):
        attached("rigl:0.9", plain, steps_per_epoch=3)
