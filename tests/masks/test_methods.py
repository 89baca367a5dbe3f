"""What every method of the paper's tables promises while it trains, checked at every step."""

from __future__ import annotations

import copy
import pathlib
from dataclasses import replace

import pytest
import torch
from torch import nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.compiled.swat_state import SwatState
from swatfx.density import Density
from swatfx.errors import AttachError
from tests.nets.held_masks import (
    EPOCH,
    OPTIMIZERS,
    POLICIES,
    SEEDED,
    TIMES,
    TOTAL,
    UPDATES,
    active,
    assert_inactive_are_zero,
    attached,
    masks_of,
    moments,
    same,
    steps,
)
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

MASKED = [name for name in POLICIES if POLICIES[name].sparsity and name != "forward-activations"]
# The cubic ramp from 1 to 0.2 over six steps, moved every second step: 1 - 0.8 (1 - (1 - t/6)^3).
RAMP = [1.0, 1.0, *[1 - 0.8 * (1 - 8 / 27)] * 2, *[1 - 0.8 * (1 - 1 / 27)] * 2, *[0.2] * 4]


def _budget(name: str, gm: SwatModule, step: int) -> float:
    """Weights that may be active after `step` steps."""
    if name == "soft-filter":  # whole filters, so each layer is rounded by one of them
        layers = [layer.weight for layer in sparse_layers(gm)]
        return sum(Density(0.5).count(w.shape[0]) * w[0].numel() for w in layers)
    density = RAMP[step] if name == "gradual-magnitude" else 1 - POLICIES[name].sparsity
    return density * sum(layer.weight.numel() for layer in sparse_layers(gm))


@pytest.mark.parametrize("build", [plain, Residual])
@pytest.mark.parametrize("name", MASKED)
def test_budget_at_every_step(name: str, build: type[nn.Module]) -> None:
    """What forwards see, and, where masks are held, what is left after the step too."""
    gm, optimizer = attached(POLICIES[name], build)
    sizes = {layer.plan.name: layer.weight.numel() for layer in sparse_layers(gm)}
    held = POLICIES[name].hold_from_epoch == 0
    for step, x in enumerate(batches(TOTAL), 1):
        with swatfx.observe(gm) as seen:
            train(gm, optimizer, [x])
        count = sum(seen.weight_density[layer] * size for layer, size in sizes.items())
        assert abs(count - _budget(name, gm, step - 1)) <= len(sizes), step
        if held:
            assert abs(active(masks_of(gm)) - _budget(name, gm, step)) <= len(sizes), step
        targets = [x.weight_density.count(x.weight.numel()) for x in sparse_layers(gm)]
        if name != "soft-filter":
            assert abs(sum(targets) - _budget(name, gm, step)) <= len(sizes), step


@pytest.mark.parametrize("name", ["forward-activations", "meprop"])
def test_methods_without_sparse_weights_keep_them_all(name: str) -> None:
    gm, optimizer = attached(POLICIES[name])
    for _ in steps(gm, optimizer):
        assert all(mask.all() for mask in masks_of(gm).values())


@pytest.mark.parametrize("name", UPDATES)
def test_masks_change_after_the_steps_that_the_schedule_names(name: str) -> None:
    gm, optimizer = attached(POLICIES[name])
    before, changed = masks_of(gm), []
    for step in steps(gm, optimizer):
        after = masks_of(gm)
        if not same(before, after):
            changed.append(step)
        before = after
    expected = [
        s for s in UPDATES[name] if not (name == "rigl" and s == 6)
    ]  # its cosine is 0 there
    assert changed == expected


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", UPDATES)
def test_inactive_weights_are_zero_at_every_step(name: str, kind: str) -> None:
    """Momentum, decay and second moments cannot revive them; what is grown starts at zero."""
    if name == "snfs" and kind in ("adagrad", "sgd without momentum"):
        with pytest.raises(AttachError, match="keeps no momentum.*snfs.*SGD with momentum"):
            attached(POLICIES[name], make=OPTIMIZERS[kind])
        return
    gm, optimizer = attached(POLICIES[name], make=OPTIMIZERS[kind])
    assert_inactive_are_zero(gm)
    before = masks_of(gm)
    for step in steps(gm, optimizer):
        assert_inactive_are_zero(gm)
        for layer in sparse_layers(gm):
            old, new = before[layer.plan.name], layer.keep()
            assert not layer.weight[new & ~old].any(), (step, layer.plan.name)
            remembered = moments(optimizer, layer.weight)
            assert remembered or kind == "sgd without momentum"
            # SNFS grows by the momentum of inactive weights: only what it drops is cleared.
            cleared = old & ~new if name == "snfs" else ~new
            for key, value in remembered.items():
                assert not value[cleared].any(), (step, layer.plan.name, key)
        before = masks_of(gm)


def test_snfs_keeps_the_momentum_of_what_it_may_grow() -> None:
    gm, optimizer = attached(POLICIES["snfs"])
    for _ in steps(gm, optimizer):
        for layer in sparse_layers(gm):
            assert moments(optimizer, layer.weight)["momentum_buffer"][~layer.keep()].any()


def test_soft_filters_are_zeroed_once_an_epoch_and_recover() -> None:
    gm, optimizer = attached(POLICIES["soft-filter"], make=lambda p: torch.optim.SGD(p, 0.5))
    inactive = {layer.plan.name: ~layer.keep() for layer in sparse_layers(gm)}
    chosen = []
    for step in steps(gm, optimizer):
        for layer in sparse_layers(gm):
            inactive[layer.plan.name] = ~layer.keep()
            moved = bool(layer.weight[inactive[layer.plan.name]].any())
            assert moved == (step % EPOCH != 0), (step, layer.plan.name)
            norms = layer.weight.flatten(1).norm(dim=1)
            if step % EPOCH == 0:  # zeroed just now: the others are the largest
                assert int((norms == 0).sum()) == layer.weight.shape[0] // 2
        chosen.append(masks_of(gm))
    assert not same(chosen[0], chosen[EPOCH]) or not same(chosen[EPOCH], chosen[2 * EPOCH])


def test_frozen_swat_is_swat_until_its_epoch() -> None:
    """Figure 8: the active set is that of the weights as the epoch begins, and stays."""
    frozen, swat = (attached(POLICIES[name]) for name in ("swat-frozen", "swat-u"))
    for step, _ in zip(steps(*frozen), steps(*swat), strict=True):
        if step <= EPOCH + 1:  # the first forward of the epoch would have chosen the same
            for (name, p), q in zip(
                frozen[0].named_parameters(), swat[0].parameters(), strict=True
            ):
                assert torch.equal(p, q), (step, name)
        if step == EPOCH:
            held = masks_of(frozen[0])
        if step > EPOCH:
            assert same(masks_of(frozen[0]), held)
    inactive = [layer.weight[~layer.keep()] for layer in sparse_layers(frozen[0])]
    assert all(values.any() for values in inactive)  # frozen, not zeroed


@pytest.mark.parametrize("name", ["rigl", "snfs"])
def test_fewer_are_dropped_along_a_cosine_until_updates_end(name: str) -> None:
    fractions = {"rigl": {2: 0.225, 4: 0.075, 6: 0.0}, "snfs": {3: 0.375, 6: 0.125}}[name]
    gm, optimizer = attached(POLICIES[name], Residual)
    before = masks_of(gm)
    for step in steps(gm, optimizer):
        after = masks_of(gm)
        for layer, old in before.items():
            gone = int((old & ~after[layer]).sum())
            limit = fractions.get(step, 0.0) * int(old.sum())
            assert gone <= limit + 1e-6, (step, layer)
            if step < 6 and limit >= 20:
                assert gone > 0.3 * limit, (step, layer)
        before = after


@pytest.mark.parametrize("name", SEEDED)
def test_masks_are_decided_by_the_seed_alone(name: str) -> None:
    """Not by the global random state, which is neither read nor moved."""
    runs = []
    for seed, outside in ((0, 1), (0, 2), (7, 1)):
        torch.manual_seed(0)
        net = plain()
        torch.manual_seed(outside)
        state = torch.get_rng_state()
        gm = swatfx.compile(net, replace(POLICIES[name], seed=seed))
        optimizer = sgd(gm)
        swatfx.attach(gm, optimizer, **TIMES)
        first = masks_of(gm)
        list(steps(gm, optimizer))
        assert torch.equal(torch.get_rng_state(), state)
        runs.append((first, masks_of(gm), snapshot(gm)))
    assert_same(runs[0][2], runs[1][2])
    for one, other in zip(runs[0][:2], runs[2][:2], strict=True):
        assert not any(torch.equal(one[k], other[k]) for k in one if not one[k].all())


@pytest.mark.parametrize("name", [n for n in POLICIES if n not in ("snfs", "dsr", "swat-m")])
def test_density_1_trains_as_the_model_does(name: str) -> None:
    """Without sparsity nothing is dropped, masked or zeroed, whatever the schedule."""
    field = "gradient_sparsity" if name == "meprop" else "sparsity"
    gm, optimizer = attached(replace(POLICIES[name], **{field: 0.0}))
    torch.manual_seed(0)
    net = plain()
    losses = train(net, sgd(net), batches(TOTAL))
    assert train(gm, optimizer, batches(TOTAL)) == pytest.approx(losses, rel=1e-5)
    for (path, p), q in zip(gm.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", POLICIES)
def test_state_dict_keys_and_dense_checkpoints(name: str) -> None:
    torch.manual_seed(1)
    dense = plain().state_dict()
    gm, optimizer = attached(POLICIES[name])
    own = [key for key in gm.state_dict() if not key.startswith("swat.")]
    assert own == list(dense)
    gm.load_state_dict(dense, strict=True)
    twin = swatfx.compile(plain(), POLICIES[name])
    twin.load_state_dict(dense, strict=True)
    assert same(masks_of(gm), masks_of(twin))
    if name in UPDATES:  # the optimizer is attached, and finds weights where none may be
        assert_inactive_are_zero(gm)
    train(gm, optimizer, batches(1))
    back = plain()
    back.load_state_dict(swatfx.dense_state_dict(gm), strict=True)


@pytest.mark.parametrize("name", ["soft-filter", "swat-frozen"])
def test_masks_held_by_magnitude_belong_to_the_weights_that_are_loaded(name: str) -> None:
    policy = replace(POLICIES[name], hold_from_epoch=0)
    torch.manual_seed(1)
    other = plain()
    expected = masks_of(swatfx.compile(other, policy))
    gm = swatfx.compile(plain(), policy)
    assert not same(masks_of(gm), expected)
    gm.load_state_dict(other.state_dict(), strict=True)
    assert same(masks_of(gm), expected)
    swatfx.refresh(gm)  # held: it stays, whatever becomes of the weights
    with torch.no_grad():
        gm.get_parameter("2.weight").mul_(torch.linspace(0, 9, 8).view(8, 1, 1, 1))
    swatfx.refresh(gm)
    assert same(masks_of(gm), expected)


@pytest.mark.parametrize("name", POLICIES)
def test_deepcopy_goes_on_bit_for_bit(name: str) -> None:
    gm, optimizer = attached(POLICIES[name])
    train(gm, optimizer, batches(4))
    twin = copy.deepcopy(gm)
    other = sgd(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    swatfx.attach(twin, other, **TIMES)
    before = snapshot(twin)
    assert_same(before, snapshot(gm))
    losses = train(gm, optimizer, batches(TOTAL)[4:])
    assert_same(snapshot(twin), before)  # nothing is shared
    assert train(twin, other, batches(TOTAL)[4:]) == losses
    assert_same(snapshot(twin), snapshot(gm))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*dynamic.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned:UserWarning")
@pytest.mark.parametrize("name", [*UPDATES, "soft-filter", "swat-frozen"])
def test_export_computes_what_eval_does(name: str, tmp_path: pathlib.Path) -> None:
    gm, optimizer = attached(POLICIES[name])
    train(gm, optimizer, batches(TOTAL))
    gm.eval()
    x = batches(1, seed=5)[0]
    path = tmp_path / "net.safetensors"
    swatfx.export(gm, path, (x,))
    bare = plain()
    bare.load_state_dict(swatfx.load_sparse(path))
    expected = gm(x)
    assert torch.equal(bare(x), expected)
    if name != "swat-frozen":  # zero already: the dense weights are the exported ones
        bare.load_state_dict(swatfx.dense_state_dict(gm))
        assert torch.equal(bare(x), expected)
    program = tmp_path / "net.pt2"
    swatfx.export(gm, program, (x,))
    torch.testing.assert_close(torch.export.load(program).module()(x), expected)


def _assert_compiles_once(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (gm, optimizer), (reference, other) = attached(POLICIES[name]), attached(POLICIES[name])
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(compiled, optimizer, batches(TOTAL))
    assert losses == train(reference, other, batches(TOTAL))
    assert_same(snapshot(gm), snapshot(reference))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


COMPILED = ["rigl", "snfs", "swat-frozen-active"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in COMPILED else pytest.mark.slow) for n in POLICIES]
)
def test_no_recompile_when_masks_change(name: str) -> None:
    """Masks, flags and densities are data: one graph, and the result of the uncompiled model."""
    _assert_compiles_once(name)


def test_what_a_drop_rule_remembers_keeps_its_precision() -> None:
    gm, _ = attached(POLICIES["dsr"])
    gm.swat.memory_of(0).fill_(0.001)
    gm.to(torch.bfloat16)
    assert isinstance(gm.swat, SwatState) and gm.swat.memory is not None
    assert gm.swat.memory.dtype == torch.float64 and gm.swat.memory[0] == 0.001


def test_half_precision_weights_keep_the_promises() -> None:
    for name in ("rigl", "dsr"):
        torch.manual_seed(0)
        gm = swatfx.compile(plain(), POLICIES[name]).to(torch.bfloat16)
        optimizer = sgd(gm)
        swatfx.attach(gm, optimizer, **TIMES)
        budget = active(masks_of(gm))
        for x in batches(TOTAL):
            optimizer.zero_grad()
            loss_of(gm(x.to(torch.bfloat16))).backward()
            optimizer.step()
            assert_inactive_are_zero(gm)
            assert active(masks_of(gm)) == budget
