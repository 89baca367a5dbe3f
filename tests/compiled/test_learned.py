"""Learned thresholds in a compiled model: graph, state, training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import swatfx
from swatfx import kernels
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.learned import (
    LearnedThreshold,
    add_penalty,
    learned_thresholds,
    penalty,
    reset_if_empty,
)
from swatfx.compiled.module import private_copy
from swatfx.errors import PolicyError
from tests.nets.learned_nets import (
    PENALTY,
    POLICY,
    compiled,
    densities,
    fit,
    mean_threshold,
    moved,
)
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
)

# ---- Graph and state -----------------------------------------------------------------------------

GOLDEN = """
input_1 = input
step = self.swat.clock(input_1)
_0_weight = getattr(self, "0").weight
layer_0_w_t = self.swat.layer_0.weight_threshold(_0_weight, step)
_0_bias = getattr(self, "0").bias
_0 = torch.ops.swatfx.conv.default(input_1, _0_weight, _0_bias, layer_0_w_t, None, (1, 1), (1, 1), \
(1, 1), 1, sparse = 'w/w', weight_selector = 'learned')
_1 = getattr(self, "1")(_0)
_2_weight = getattr(self, "2").weight
layer_2_w_t = self.swat.layer_2.weight_threshold(_2_weight, step)
_2_bias = getattr(self, "2").bias
_2 = torch.ops.swatfx.conv.default(_1, _2_weight, _2_bias, layer_2_w_t, None, (1, 1), (1, 1), \
(1, 1), 1, sparse = 'w/w', weight_selector = 'learned')
_3 = getattr(self, "3")(_2)
_4 = getattr(self, "4")(_3)
_5_weight = getattr(self, "5").weight
layer_5_w_t = self.swat.layer_5.weight_threshold(_5_weight, step)
_5_bias = getattr(self, "5").bias
_5 = torch.ops.swatfx.linear.default(_4, _5_weight, _5_bias, layer_5_w_t, None, sparse = 'w/w', \
weight_selector = 'learned')
return _5
""".strip()


def test_golden_graph() -> None:
    code = compiled(kernels="dense").code.strip().splitlines()[1:]
    assert "\n".join(line.strip().partition(";")[0] for line in code) == GOLDEN


def test_it_starts_as_the_dense_model() -> None:
    torch.manual_seed(0)
    model = Residual()
    nn.init.zeros_(model.block1.conv2.weight)  # at zero, they are not below a threshold of zero
    gm = swatfx.compile(model, POLICY)
    x = batches(1)[0]
    assert densities(gm) == [1.0] * 8
    with kernels.reference_only():
        for training in (True, False):
            model.train(training)
            gm.train(training)
            before = copy.deepcopy(model.state_dict())
            expected = model(x)
            model.load_state_dict(before)
            assert torch.equal(gm(x), expected)


def test_parameters_and_their_names() -> None:
    gm = compiled()
    own = dict(plain().named_parameters())
    names = [name for name, _ in gm.named_parameters()]
    assert names[: len(own)] == list(own)
    learned = [f"swat.layer_{i}.weight_threshold.threshold" for i in (0, 2, 5)]
    assert names[len(own) :] == learned
    assert [tuple(m.threshold.shape) for m in learned_thresholds(gm)] == [
        (8, 1, 1, 1),
        (8, 1, 1, 1),
        (10, 1),
    ]
    assert all(not m.threshold.any() for m in learned_thresholds(gm))
    buffers = {"density", "fraction", "stamp"}
    prefix = "swat.layer_0.weight_threshold."
    keys = {k.removeprefix(prefix) for k in gm.state_dict() if k.startswith(prefix)}
    assert keys == {"threshold"} | buffers


def test_dense_checkpoints_load_and_leave() -> None:
    gm = moved()
    dense = swatfx.dense_state_dict(gm)
    model = plain()
    model.load_state_dict(dense, strict=True)
    assert all((v != 0).all() for k, v in dense.items() if k.endswith("weight"))
    thresholds = [m.threshold.clone() for m in learned_thresholds(gm)]
    small = {k: v * 0.5 for k, v in dense.items()}
    gm.load_state_dict(small, strict=True)
    for module, before in zip(learned_thresholds(gm), thresholds, strict=True):
        assert torch.equal(module.threshold, before)  # a dense checkpoint says nothing of them
    for layer in sparse_layers(gm):  # and what they keep of the new weights is measured
        assert layer.weight_density.value == float(layer.keep().double().mean()) < 0.5


def test_copies() -> None:
    gm = moved()
    twin, private = copy.deepcopy(gm), private_copy(gm)
    before = snapshot(gm)
    x = batches(1)[0]
    assert torch.equal(twin(x), gm(x))
    fit(twin, sgd(twin), batches(2))
    assert mean_threshold(twin) != mean_threshold(gm)
    after = snapshot(gm)
    counted = "swat.clock.iteration"
    assert_same(
        {k: v for k, v in after.items() if k != counted},
        {k: v for k, v in before.items() if k != counted},
    )
    pairs = zip(learned_thresholds(gm), learned_thresholds(private), strict=True)
    assert all(one.threshold is other.threshold for one, other in pairs)


def test_it_moves_with_the_model() -> None:
    gm = moved()
    optimizer = sgd(gm)
    held = [id(m.threshold) for m in learned_thresholds(gm)]
    before = densities(gm)
    gm.bfloat16()
    assert [id(m.threshold) for m in learned_thresholds(gm)] == held
    assert {m.threshold.dtype for m in learned_thresholds(gm)} == {torch.bfloat16}
    assert {m.density.dtype for m in learned_thresholds(gm)} == {torch.float64}
    assert densities(gm) == before
    start = mean_threshold(gm)
    for x in batches(2):
        fit(gm, optimizer, [x.bfloat16()], weight=0.1)
    assert mean_threshold(gm) > start


@pytest.mark.parametrize(("build", "shape"), [(Tied, (4, 6)), (EagerRoot, (4, 12))])
def test_shared_weights_and_parts(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    gm = compiled(build)
    layers = list(sparse_layers(gm))
    assert len(list(learned_thresholds(gm))) == len(layers)
    fit(gm, sgd(gm), [torch.randn(shape) for _ in range(3)], weight=0.1)
    assert all(bool((m.threshold > 0).all()) for m in learned_thresholds(gm))
    assert max(densities(gm)) < 1


def test_below_eager_code() -> None:
    gm = compiled(EagerMiddle)
    fit(gm, sgd(gm), batches(3), weight=0.1)
    assert len(densities(gm)) == 4 and max(densities(gm)) < 1


def test_frozen_layers_keep_their_thresholds() -> None:
    torch.manual_seed(0)
    model = plain()
    model[2].weight.requires_grad_(False)
    gm = swatfx.compile(model, POLICY)
    fit(gm, sgd(gm), batches(2), weight=0.1)
    first, frozen, last = learned_thresholds(gm)
    assert not frozen.threshold.requires_grad and not frozen.threshold.any()
    assert bool((first.threshold > 0).all()) and bool((last.threshold > 0).all())


def test_computed_weights() -> None:
    def build() -> nn.Module:
        net = plain()
        parametrizations.weight_norm(net[2])
        return net

    gm = compiled(build)
    fit(gm, sgd(gm), batches(3), weight=0.1)
    assert max(densities(gm)) < 1


def test_a_forward_that_does_not_see_them_is_refused() -> None:
    policy = swatfx.Policy("x", weight_selector="learned", forward_weight=False)
    with pytest.raises(PolicyError, match=r"layer '0'.*forward_weight=True"):
        swatfx.compile(plain(), policy)


# ---- Training ------------------------------------------------------------------------------------


def test_the_penalty_drives_thresholds_up_and_density_down() -> None:
    found = {}
    for weight in (0.0, 0.02, 0.2):
        gm = compiled()
        fit(gm, sgd(gm, lr=0.02), batches(8), weight=weight)
        found[weight] = mean_threshold(gm), sum(densities(gm)) / 3
    (none, full), (little, some), (much, few) = found.values()
    assert none < little < much
    assert full > some > few > 0.01


def test_weights_below_their_threshold_are_zero_in_forward() -> None:
    gm = moved()
    x = batches(1)[0]
    model = plain()
    state = swatfx.dense_state_dict(gm)
    for layer in sparse_layers(gm):
        assert 0.3 < float(layer.keep().double().mean()) < 0.7
        state[layer.plan.weight] = torch.where(layer.keep(), layer.weight, 0.0)
    model.load_state_dict(state)
    with swatfx.observe(gm) as seen:
        assert torch.equal(gm(x), model(x))
    assert list(seen.weight_density.values()) == densities(gm)
    assert torch.equal(gm.eval()(x), model.eval()(x))


def test_inactive_weights_learn_and_recover() -> None:
    gm = moved()
    optimizer = sgd(gm)
    before = [layer.keep().clone() for layer in sparse_layers(gm)]
    loss_of(gm(batches(1)[0])).backward()
    for layer, keep in zip(sparse_layers(gm), before, strict=True):
        assert layer.weight.grad is not None and layer.weight.grad[~keep].any()
    optimizer.step()
    fit(gm, optimizer, batches(8), weight=0.0)
    returned = [
        (~k & layer.keep()).any() for layer, k in zip(sparse_layers(gm), before, strict=True)
    ]
    assert any(returned)


def test_penalty_and_its_gradient() -> None:
    gm = moved()
    found = [m.threshold.detach().double() for m in learned_thresholds(gm)]
    expected = sum(torch.exp(-t).sum().item() for t in found)
    assert penalty(gm).item() == pytest.approx(expected, rel=1e-6)
    parameters = [m.threshold for m in learned_thresholds(gm)]
    own = torch.autograd.grad(penalty(gm), parameters)
    loss_of(gm(batches(1)[0])).backward()
    first, *others = [t.grad.clone() for t in parameters if t.grad is not None]
    parameters[1].grad = None
    add_penalty(gm, 0.5)
    assert torch.equal(parameters[0].grad, first + 0.5 * own[0])
    assert parameters[1].grad is None
    before = [t.grad.clone() for t in (parameters[0], parameters[2]) if t.grad is not None]
    add_penalty(gm, {"5": 2.0}, scale=torch.tensor(8.0))
    assert torch.equal(parameters[0].grad, before[0])
    torch.testing.assert_close(parameters[2].grad, before[1] + 16 * own[2])
    assert penalty(swatfx.compile(plain(), "swat-u:0.5")).item() == 0.0


def test_adding_the_gradient_is_adding_the_penalty_to_the_loss() -> None:
    gm = moved()
    twin = copy.deepcopy(gm)
    optimizer, other = sgd(gm), sgd(twin)
    for x in batches(4):
        fit(gm, optimizer, [x])
        other.zero_grad()
        (loss_of(twin(x)) + PENALTY * penalty(twin)).backward()
        other.step()
    for (name, one), second in zip(gm.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, second, msg=name)


def test_empty_layers_start_anew() -> None:
    gm = moved()
    first, second, third = learned_thresholds(gm)
    pointers = [m.threshold.data_ptr() for m in (first, second, third)]
    with torch.no_grad():
        first.threshold.fill_(9.0)
        # Of the last layer's 5120 weights, 1% is just enough.
        weights = next(x.weight for x in sparse_layers(gm) if x.plan.name == "5").detach()
        third.threshold.fill_(float(weights.abs().flatten().sort(descending=True).values[51]))
    kept = second.threshold.clone()
    assert reset_if_empty(gm) == ["0"]
    assert not first.threshold.any() and torch.equal(second.threshold, kept)
    assert densities(gm)[0] == 1.0 and densities(gm)[2] == 52 / 5120
    assert reset_if_empty(gm, least=0.02) == ["5"]
    assert [m.threshold.data_ptr() for m in (first, second, third)] == pointers
    assert reset_if_empty(swatfx.compile(plain(), "swat-u:0.5")) == []


def test_refresh_leaves_thresholds_alone() -> None:
    gm = moved()
    with torch.no_grad():
        for layer in sparse_layers(gm):
            layer.weight.mul_(0.5)
    before = [m.threshold.clone() for m in learned_thresholds(gm)]
    swatfx.refresh(gm)
    for module, t in zip(learned_thresholds(gm), before, strict=True):
        assert torch.equal(module.threshold, t)
    assert densities(gm) == [float(x.keep().double().mean()) for x in sparse_layers(gm)]
    assert max(densities(gm)) < 0.5


def test_evaluation_changes_nothing() -> None:
    gm = moved().eval()
    before = snapshot(gm)
    gm(batches(1)[0])
    with torch.no_grad():
        gm(batches(1)[0])
    assert_same(snapshot(gm), before)


def test_a_reset_between_forward_and_backward() -> None:
    gm = moved()
    loss = loss_of(gm(batches(1)[0]))
    first = next(learned_thresholds(gm))
    with torch.no_grad():
        first.threshold.zero_()
    loss.backward()
    assert first.threshold.grad is not None and first.threshold.grad.any()


def test_torch_compile_is_bit_for_bit_and_compiles_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gm = compiled(Residual)
    twin = copy.deepcopy(gm)
    step = torch.compile(gm, backend="aot_eager", fullgraph=True)
    optimizer, other = sgd(gm), sgd(twin)
    for part in (batches(3), batches(3, seed=1)):
        assert fit(gm, optimizer, part, run=step) == fit(twin, other, part)
        for root in (gm, twin):
            with torch.no_grad():
                next(learned_thresholds(root)).threshold.fill_(9.0)
            assert reset_if_empty(root) == ["stem"]
    assert_same(snapshot(gm), snapshot(twin))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_only_learned_layers_have_learned_thresholds() -> None:
    policy = swatfx.per_layer({"0": POLICY, "2": "swat-u:0.5"}, default="dense")
    gm = swatfx.compile(plain(), policy)
    kinds = {x.plan.name: type(x.weight_threshold) is LearnedThreshold for x in sparse_layers(gm)}
    assert kinds == {"0": True, "2": False}
    assert reset_if_empty(gm) == []
    assert [m.layer for m in learned_thresholds(gm)] == ["0"]
