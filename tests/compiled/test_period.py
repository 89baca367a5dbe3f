"""When thresholds are recomputed, what counts as an iteration, and what evaluation leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import Policy
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.compiled.state import Pack
from swatfx.density import Density
from swatfx.errors import InputError
from swatfx.ops.where import weight_keep
from tests.nets.period_nets import batch, net, nudge

torch.set_num_threads(1)
S = 0.75


def kth(x: Tensor, sparsity: float = S) -> Tensor:
    k = Density.from_sparsity(sparsity).count(x.numel())
    return x.detach().abs().reshape(-1).sort(descending=True).values[k - 1]


def top(x: Tensor, t: Tensor) -> Tensor:
    return x.detach() * (x.detach().abs() >= t)


def one_linear(period: int, **options: Any) -> tuple[nn.Linear, SwatModule]:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False).double()
    policy = swatfx.swat_u(S, first_dense=False, period=period, **options)
    return layer, swatfx.compile(nn.Sequential(layer), policy)


def test_a_fresh_model_has_valid_weight_thresholds() -> None:
    layer, gm = one_linear(1000)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(gm.eval()(x), x @ top(layer.weight, kth(layer.weight)).t())


def test_thresholds_are_reused_between_refreshes() -> None:
    layer, gm = one_linear(3)
    t_w = t_a = torch.zeros(())
    for t in range(8):
        x = torch.randn(5, 12, dtype=torch.float64) * (1 + t)
        if t % 3 == 0:
            t_w, t_a = kth(layer.weight), kth(x)
        y = gm(x)
        assert torch.equal(y, x @ top(layer.weight, t_w).t())
        layer.weight.grad = None
        y.backward(g := torch.randn_like(y))
        torch.testing.assert_close(layer.weight.grad, g.t() @ top(x, t_a), rtol=1e-12, atol=1e-12)
        nudge(gm, t)


@pytest.mark.parametrize("selector", ["chw", "hw"])
def test_batch_shaped_thresholds_are_recomputed_at_every_step(selector: str) -> None:
    layer, gm = one_linear(1000, activation_selector=selector)
    for t in range(3):
        x = torch.randn(4 + t, 6, 12, dtype=torch.float64)  # the batch size may change
        dims = {"chw": x.flatten(1), "hw": x.transpose(1, 2)}[selector]
        k = Density.from_sparsity(S).count(dims.shape[-1])
        kept = dims.abs() >= dims.abs().sort(dim=-1, descending=True).values[..., k - 1 : k]
        a_s = (dims * kept).view_as(x) if selector == "chw" else (dims * kept).transpose(1, 2)
        layer.weight.grad = None
        y = gm(x)
        y.backward(g := torch.randn_like(y))
        expected = torch.einsum("nto,nti->oi", g, a_s)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_only_training_forwards_count() -> None:
    layer, gm = one_linear(3)
    x = torch.randn(5, 12, dtype=torch.float64)
    clock = gm.swat.clock
    gm(x)
    first = kth(layer.weight)
    for seed in range(5):
        gm.eval()(x)
        nudge(gm, seed)
    with torch.no_grad():
        gm.train()(x)  # a training forward counts, with or without gradients
    assert clock.iteration == 2
    assert torch.equal(gm(x), x @ top(layer.weight, first).t()) and clock.iteration == 3
    assert torch.equal(gm(x), x @ top(layer.weight, kth(layer.weight)).t())


def test_micro_batches_count() -> None:
    _, gm = one_linear(4)
    for _ in range(3):  # three optimizer steps of two micro-batches
        for _ in range(2):
            gm(torch.randn(5, 12, dtype=torch.float64)).sum().backward()
    assert gm.swat.clock.iteration == 6
    assert [int(t.stamp) for _, t in gm.swat.thresholds()] == [4, 4]


@pytest.mark.parametrize("selector", ["nchw", "channel", "random", "2:4"])
def test_evaluation_changes_nothing_and_is_deterministic(selector: str) -> None:
    sparsity = 0.5 if selector == "2:4" else S
    gm = swatfx.compile(net(), swatfx.swat_u(sparsity, weight_selector=selector, period=2))
    gm(batch(0)).sum().backward()
    nudge(gm, 1)
    gm.eval()
    before = copy.deepcopy(gm.state_dict())
    buffers = {name: b.clone() for name, b in gm.named_buffers()}
    with torch.no_grad():
        outputs = [gm(batch(i)) for i in (1, 2, 1)]
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    after = gm.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(b, buffers[name]) for name, b in gm.named_buffers())


def test_evaluation_keeps_activations_dense() -> None:
    model = net()
    policy = Policy(
        "figure-1-a", S, forward_weight=False, forward_activation=True, backward_weight=False
    )
    gm = swatfx.compile(copy.deepcopy(model), policy)
    assert not torch.equal(gm(batch(0)), model(batch(0)))
    assert torch.equal(gm.eval()(batch(0)), model.eval()(batch(0)))


def test_two_forwards_before_one_backward_with_a_refresh_between() -> None:
    layer, gm = one_linear(2)
    xs = [torch.randn(5, 12, dtype=torch.float64) * (i + 1) for i in range(3)]
    gm(xs[0])
    old_w, old_a = kth(layer.weight), kth(xs[0])
    nudge(gm, 0)
    inputs = [x.clone().requires_grad_() for x in xs]
    first, second = gm(inputs[1]), gm(inputs[2])  # iterations 1 and 2; the second refreshes
    grads = [torch.randn_like(first) for _ in range(2)]
    torch.autograd.backward([first, second], grads)
    new_w, new_a = kth(layer.weight), kth(xs[2])
    for x, g, t in zip(inputs[1:], grads, (old_w, new_w), strict=True):
        torch.testing.assert_close(x.grad, g @ top(layer.weight, t), rtol=1e-12, atol=1e-12)
    expected = grads[0].t() @ top(xs[1], old_a) + grads[1].t() @ top(xs[2], new_a)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_evaluation_with_gradients_is_not_disturbed_by_a_later_refresh() -> None:
    layer, gm = one_linear(1)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    t = kth(layer.weight)
    y = gm.eval()(x)
    swatfx.refresh(gm)
    for threshold in sparse_layers(gm):
        threshold.weight_threshold.threshold.mul_(100)
    y.sum().backward()
    expected = top(layer.weight, t).sum(0).expand(5, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


# ---- NaN and infinity ----------------------------------------------------------------------------


def test_nan_in_an_activation_at_a_refresh_names_the_layer() -> None:
    gm = swatfx.compile(net(), swatfx.swat_u(S, period=2))
    x = batch(0)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="learning rate") as caught:
        gm(x)
    assert "'2'" in str(caught.value) and "input activation" in str(caught.value)
    gm = swatfx.compile(net(), swatfx.swat_u(S, period=2))
    gm(batch(0))
    assert gm(x).isnan().any()  # between refreshes it reaches the loss
    gm.eval()
    assert gm(x).isnan().any()


def test_nan_in_a_weight_at_a_refresh_names_the_layer() -> None:
    gm = swatfx.compile(net(), swatfx.swat_u(S, period=2))
    gm(batch(0))
    with torch.no_grad():
        gm.get_parameter("5.weight")[0, 0] = torch.nan
    assert gm(batch(1)).isnan().any()
    with pytest.raises(InputError, match="'5'.*weight"):
        gm(batch(2))
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    with pytest.raises(InputError, match="'5'.*weight"):
        swatfx.refresh(gm)
    after = gm.state_dict()
    same = (torch.allclose(after[k], v, rtol=0, atol=0, equal_nan=True) for k, v in before.items())
    assert all(same)


def test_nan_where_nothing_is_ranked_does_not_raise() -> None:
    for policy in (swatfx.swat_u(0.0, first_dense=False), swatfx.meprop(S)):
        gm = swatfx.compile(net(), policy)
        with torch.no_grad():
            gm.get_parameter("5.weight")[0, 0] = torch.nan
        assert gm(batch(0)).isnan().any()
        swatfx.refresh(gm)


@pytest.mark.parametrize("selector", ["nchw", "chw", "channel", "filter"])
def test_infinity_does_not_raise_and_is_kept(selector: str) -> None:
    gm = swatfx.compile(net(), swatfx.swat_u(S, weight_selector=selector))
    with torch.no_grad():
        gm.get_parameter("5.weight")[0, 0] = -torch.inf
    x = batch(0)
    y = gm(x)
    assert not y.isfinite().all()
    keep = {layer.plan.name: layer.keep() for layer in sparse_layers(gm)}
    assert keep["5"][0, 0]


# ---- Nothing saved where nothing trains ----------------------------------------------------------


def saved_and_packed(gm: SwatModule, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    saved: list[Tensor] = []
    packed: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    hooks = [
        m.register_forward_hook(lambda _, a, out: packed.append(out) if out is not None else None)
        for m in gm.swat.modules()
        if isinstance(m, Pack)
    ]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        gm(x)
    for hook in hooks:
        hook.remove()
    return saved, packed


def test_no_grad_saves_and_packs_nothing() -> None:
    gm = swatfx.compile(net(), swatfx.swat_u(S))
    with torch.no_grad():
        assert saved_and_packed(gm, batch(0)) == ([], [])
    assert len(saved_and_packed(gm, batch(0))[1]) == 2


def test_frozen_weights_pack_nothing() -> None:
    gm = swatfx.compile(net(), swatfx.swat_u(S))
    gm.requires_grad_(False)
    assert saved_and_packed(gm, batch(0)) == ([], [])
    gm.get_parameter("5.weight").requires_grad_(True)
    saved, packed = saved_and_packed(gm, batch(0))
    assert len(packed) == 1 and not any(t.shape == (4, 128) for t in saved)
    gm.get_parameter("5.weight").requires_grad_(False)
    gm.get_parameter("5.bias").requires_grad_(True)
    saved, packed = saved_and_packed(gm, batch(0))
    assert packed == [] and not any(t.numel() == 4 * 128 for t in saved)


# ---- Where the state lives -----------------------------------------------------------------------


def test_casting_the_model_does_not_move_densities() -> None:
    gm = swatfx.compile(net().float(), swatfx.swat_erk(0.9))
    wanted = [layer.weight_density for layer in sparse_layers(gm)]
    for cast in (gm.half, gm.bfloat16, gm.float, gm.double):
        cast()
        assert [layer.weight_density for layer in sparse_layers(gm)] == wanted
    assert all(t.threshold.dtype == torch.float64 for _, t in gm.swat.thresholds())
    gm = swatfx.compile(net().float(), swatfx.swat_erk(0.9)).float()
    gm(batch(0).float()).sum().backward()
    for layer in sparse_layers(gm):
        assert int(layer.keep().sum()) == layer.weight_density.count(layer.weight.numel())


@pytest.mark.parametrize("selector", ["nchw", "channel", "filter", "input-channel"])
def test_moving_the_model_moves_no_weight_across_its_threshold(selector: str) -> None:
    gm = swatfx.compile(net().float(), swatfx.swat_u(S, weight_selector=selector))
    wanted = [layer.keep() for layer in sparse_layers(gm)]
    for change in ({"memory_format": torch.channels_last}, {"dtype": torch.float64}):
        gm.to(**change)
        for layer, keep in zip(sparse_layers(gm), wanted, strict=True):
            assert torch.equal(layer.keep(), keep)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resuming_in_the_middle_of_a_period_does_not_refresh(stop: int) -> None:
    policy = swatfx.swat_u(S, period=3)
    gm = swatfx.compile(net(), policy)
    for t in range(stop):
        gm(batch(t)).sum().backward()
        nudge(gm, t)
    twin = swatfx.compile(net(), policy)
    twin.load_state_dict(gm.state_dict())
    for t in range(stop, stop + 4):
        assert torch.equal(gm(batch(t)), twin(batch(t)))
        for model in (gm, twin):
            nudge(model, t)
    for a, b in zip(sparse_layers(gm), sparse_layers(twin), strict=True):
        assert torch.equal(a.keep(), b.keep())
        assert a.weight_threshold.stamp == b.weight_threshold.stamp == 3 * ((stop + 3) // 3)


def test_random_gradients_are_drawn_anew_at_each_step() -> None:
    layer = nn.Linear(12, 40, bias=False).double()
    gm = swatfx.compile(nn.Sequential(layer), swatfx.meprop(S, gradient_selector="random"))
    masks = []
    for _ in range(2):
        layer.weight.grad = None
        gm(torch.eye(12, dtype=torch.float64)).backward(torch.randn(12, 40, dtype=torch.float64))
        assert layer.weight.grad is not None
        masks.append(layer.weight.grad != 0)  # row i of the gradient is what output i was given
    assert not torch.equal(masks[0], masks[1])
    kept = torch.stack(masks).double().mean().item()
    assert abs(kept - (1 - S)) < 5 * (S * (1 - S) / 960) ** 0.5


def test_random_masks_are_drawn_anew_at_each_refresh_only() -> None:
    masks = []
    _, gm = one_linear(2, weight_selector="random")
    (layer,) = sparse_layers(gm)
    for _ in range(4):
        gm(torch.randn(5, 12, dtype=torch.float64))
        state = layer.weight_threshold
        masks.append(weight_keep(layer.weight.detach(), state.threshold, "random"))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])
    _, other = one_linear(2, weight_selector="random", seed=9)
    (layer,) = sparse_layers(other)
    assert not torch.equal(layer.keep(), masks[0])
