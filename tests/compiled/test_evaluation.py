"""Evaluation selects from the weights as they are, whatever wrote them, and writes nothing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, fx, nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.compiled.state import WeightThreshold
from tests.nets.period_nets import batch, net

torch.set_num_threads(1)
S = 0.75
SELECTORS = [
    "nchw",
    "chw",
    "hw",
    "channel",
    "channel-per-filter",
    "filter",
    "filter-l2",
    "input-channel",
    "random",
    "2:4",
    "block-4x2",
]
Write = Callable[[SwatModule, nn.Module], Any]


def compiled(selector: str = "nchw", **options: Any) -> tuple[SwatModule, nn.Module]:
    """A compiled network, and the model that it shares its parameters with."""
    model = net()
    policy = swatfx.swat_u(
        0.5 if selector == "2:4" else S, weight_selector=selector, first_dense=False, **options
    )
    return swatfx.compile(model, policy), model


def step(gm: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    gm(batch(seed)).pow(2).mean().backward()
    optimizer.step()


def evaluate(gm: nn.Module) -> Tensor:
    was = gm.training
    gm.eval()
    with torch.no_grad():
        y: Tensor = gm(batch(99))
    gm.train(was)
    return y


def after_refresh(gm: SwatModule) -> Tensor:
    """What a copy gives in evaluation that has never seen these weights, and was refreshed."""
    twin = copy.deepcopy(gm)
    swatfx.refresh(twin)
    return evaluate(twin)


def selected(gm: SwatModule) -> Tensor:
    """What an interpreter gives with every weight replaced by its Top-K: plain formulas."""
    x = batch(99)
    layers = {layer.plan.name: layer for layer in sparse_layers(gm)}

    def top(name: str) -> Tensor:
        weight = layers[name].weight.detach()
        k = layers[name].weight_density.count(weight.numel())
        t = weight.abs().reshape(-1).sort(descending=True).values[k - 1]
        return weight * (weight.abs() >= t)

    bias = {name: gm.get_parameter(f"{name}.bias").detach() for name in ("0", "2", "5")}
    x = torch.conv2d(x, top("0"), bias["0"], padding=1).relu()
    x = torch.conv2d(x, top("2"), bias["2"], padding=1).relu()
    return x.flatten(1) @ top("5").t() + bias["5"]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("period", [1, 3, 1000])
def test_after_every_step_evaluation_is_that_of_a_refreshed_model(
    selector: str, period: int
) -> None:
    gm, _ = compiled(selector, period=period)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.5, momentum=0.9)
    outputs = []
    for seed in range(5):
        step(gm, optimizer, seed)
        outputs.append(evaluate(gm))
        assert torch.equal(outputs[-1], after_refresh(gm)), seed
        if selector == "nchw":
            torch.testing.assert_close(outputs[-1], selected(gm), rtol=1e-12, atol=1e-12)
    assert all(not torch.equal(a, b) for a, b in zip(outputs, outputs[1:], strict=False))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("period", [1, 3])
def test_training_goes_on_as_if_nobody_had_evaluated(selector: str, period: int) -> None:
    found = []
    for evaluated in (False, True):
        gm, _ = compiled(selector, period=period, activation_selector="nchw")
        optimizer = torch.optim.Adam(gm.parameters(), lr=0.01)
        for seed in range(5):
            before = {name: b.clone() for name, b in gm.named_buffers()}
            if evaluated:
                evaluate(gm)
            assert all(torch.equal(b, before[name]) for name, b in gm.named_buffers())
            step(gm, optimizer, seed)
        found.append({**gm.state_dict(), **dict(gm.named_buffers())})
    assert all(torch.equal(value, found[0][name]) for name, value in found[1].items())


def _load(gm: SwatModule, model: nn.Module) -> None:
    model.load_state_dict({name: value * 3 + 0.1 for name, value in model.state_dict().items()})


def _load_child(gm: SwatModule, model: nn.Module) -> None:
    child = model.get_submodule("2")
    child.load_state_dict({name: value + 0.1 for name, value in child.state_dict().items()})


def _load_own_child(gm: SwatModule, model: nn.Module) -> None:
    _load_child(gm, gm)


def _load_ours(gm: SwatModule, model: nn.Module) -> None:
    torch.manual_seed(5)
    other, _ = compiled(gm_selector(gm), period=10)
    nn.init.normal_(other.get_parameter("2.weight"))
    gm.load_state_dict(other.state_dict())


def _load_dense(gm: SwatModule, model: nn.Module) -> None:
    state = {name: value + 0.1 for name, value in swatfx.dense_state_dict(gm).items()}
    gm.load_state_dict(state, strict=True)


def _assign_dense(gm: SwatModule, model: nn.Module) -> None:
    state = {name: value + 0.1 for name, value in swatfx.dense_state_dict(gm).items()}
    gm.load_state_dict(state, strict=True, assign=True)


def _vector(gm: SwatModule, model: nn.Module) -> None:
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(vector * 2 + 0.1, model.parameters())


def _init(gm: SwatModule, model: nn.Module) -> None:
    for p in model.parameters():
        nn.init.normal_(p)


def _reset(gm: SwatModule, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()


def _data(gm: SwatModule, model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 2 + 0.1


def _data_in_place(gm: SwatModule, model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(2).add_(0.1)  # a mean teacher's way: autograd does not see it, a sample does


def _merge(gm: SwatModule, model: nn.Module) -> None:
    with torch.no_grad():
        p = model.get_parameter("5.weight")
        p += torch.randn(5, 2, dtype=p.dtype) @ torch.randn(2, 128, dtype=p.dtype)


def _one_element(gm: SwatModule, model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("5.weight")[3, 77] = 9


def _inference(gm: SwatModule, model: nn.Module) -> None:
    with torch.inference_mode():
        for p in model.parameters():
            p.add_(0.1)


def _fused(gm: SwatModule, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.grad.view(-1)[::2] = 0
    torch.optim.SGD(model.parameters(), lr=0.05, fused=True).step()


def _density(gm: SwatModule, model: nn.Module) -> None:
    for layer in sparse_layers(gm):
        layer.set_density(swatfx.Density(0.5))


def gm_selector(gm: SwatModule) -> str:
    return next(iter(sparse_layers(gm))).plan.weight_selector


WRITES: dict[str, Write] = {
    f.__name__: f
    for f in (
        _load,
        _load_child,
        _load_own_child,
        _load_ours,
        _load_dense,
        _assign_dense,
        _vector,
        _init,
        _reset,
        _data,
        _data_in_place,
        _merge,
        _one_element,
        _inference,
        _fused,
    )
}


@pytest.mark.parametrize("selector", ["nchw", "hw", "input-channel", "random", "2:4"])
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_weights_that_something_else_wrote(write: Write, selector: str) -> None:
    gm, model = compiled(selector, period=10)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for seed in range(3):
        step(gm, optimizer, seed)
    before = evaluate(gm)
    write(gm, model)
    found = evaluate(gm)
    if (write, selector) != (_one_element, "random"):  # the draw may leave it out
        assert not torch.equal(found, before)
    assert torch.equal(found, after_refresh(gm))
    write(gm, model)  # and again, with a result remembered
    assert torch.equal(evaluate(gm), after_refresh(gm))


def test_a_density_that_moves_counts_at_once_in_evaluation() -> None:
    gm, model = compiled()
    evaluate(gm)
    _density(gm, model)
    assert torch.equal(evaluate(gm), after_refresh(gm))


class Counter:
    """How often a weight was ranked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from swatfx.selectors import Selector

        self.calls = 0
        own = Selector.state

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(Selector, "state", counted)


def test_evaluating_again_ranks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, model = compiled()
    evaluate(gm)
    count = Counter(monkeypatch)
    for _ in range(3):
        evaluate(gm)
    assert count.calls == 0
    _one_element(gm, model)
    evaluate(gm)
    assert count.calls == 1
    swatfx.refresh(gm)  # it may follow a write that nobody can see
    count.calls = 0
    evaluate(gm)
    assert count.calls == 3


def test_an_optimizer_of_other_weights_makes_nobody_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = compiled()
    evaluate(gm)
    count = Counter(monkeypatch)
    other = nn.Linear(3, 3)
    other(torch.ones(3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1, fused=True).step()
    evaluate(gm)
    assert count.calls == 0


def test_refresh_sees_what_nothing_else_can() -> None:
    gm, model = compiled()
    evaluate(gm)
    weight = model.get_parameter("5.weight")
    weight.data[3, 77] = 9  # one element, behind autograd's back
    swatfx.refresh(gm)
    assert torch.equal(evaluate(gm), after_refresh(gm))


def test_training_in_evaluation_mode_with_a_fused_optimizer() -> None:
    gm, _ = compiled()
    gm.eval()
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.05, fused=True)
    for seed in range(3):
        step(gm, optimizer, seed)
        assert torch.equal(evaluate(gm), after_refresh(gm))
    assert gm.swat.clock.iteration == 0


@pytest.mark.parametrize("selector", ["nchw", "hw", "2:4"])
def test_functional_call_ranks_the_weights_that_it_is_given(selector: str) -> None:
    gm, _ = compiled(selector)
    gm.eval()
    own = evaluate(gm)
    for scale in (2.0, 3.0):
        torch.manual_seed(int(scale))
        others = {n: torch.randn_like(p) * scale for n, p in gm.named_parameters()}
        with torch.no_grad():
            found = torch.func.functional_call(gm, others, (batch(99),))
        twin = copy.deepcopy(gm)
        twin.load_state_dict({**twin.state_dict(), **others})
        assert torch.equal(found, after_refresh(twin))
        assert torch.equal(evaluate(gm), own)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_computed_weights(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16)).double()
    getattr(parametrizations, kind)(model[2])
    gm = swatfx.compile(model, "swat-u:0.75,period=5")
    x = torch.randn(4, 12, dtype=torch.float64)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        gm(x).square().sum().backward()
        optimizer.step()
        gm.eval()
        with torch.no_grad():
            found = gm(x)
            swatfx.refresh(gm)
            assert torch.equal(gm(x), found)
            weight = model.eval()[2].weight
            t = weight.abs().reshape(-1).sort(descending=True).values[63]
            expected = model[1](model[0](x)) @ (weight * (weight.abs() >= t)).t() + model[2].bias
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        gm.train()


@pytest.mark.parametrize("selector", ["nchw", "hw", "random", "2:4"])
def test_compiled_by_dynamo_in_evaluation(selector: str) -> None:
    torch._dynamo.reset()
    gm, model = compiled(selector)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, fused=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    fast = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        step(gm, optimizer, seed)
        gm.eval()
        with torch.no_grad():
            assert torch.equal(fast(batch(99)), after_refresh(gm))
            _merge(gm, model)
            assert torch.equal(fast(batch(99)), after_refresh(gm))
        gm.train()
    assert counters["stats"]["unique_graphs"] == 1


def test_exported_interpreted_copied_and_in_threads() -> None:
    gm, model = compiled("hw")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    step(gm, optimizer, 0)
    gm.eval()
    program = torch.export.export(gm, (batch(99),), strict=False)
    for change in (None, _init):
        if change is not None:
            change(gm, model)
        expected = after_refresh(gm)
        with torch.no_grad():
            assert torch.equal(fx.Interpreter(gm).run(batch(99)), expected)
            assert torch.equal(copy.deepcopy(gm)(batch(99)), expected)
            if change is None:
                assert torch.equal(program.module()(batch(99)), expected)
            one = gm(batch(99)[:1])
            torch.testing.assert_close(one, expected[:1], rtol=1e-12, atol=1e-12)
            assert all(torch.equal(y, expected) for y in in_threads(gm))


def in_threads(gm: SwatModule) -> list[Tensor]:
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(evaluate(gm))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    return results


def test_inference_tensors_are_ranked_at_every_use() -> None:
    with torch.inference_mode():
        gm, model = compiled("hw")
        gm.eval()
        for _ in range(2):
            for p in model.parameters():
                p.add_(0.1)
            expected = copy.deepcopy(gm)
            swatfx.refresh(expected)
            assert torch.equal(gm(batch(99)), expected(batch(99)))


def test_evaluation_under_autocast() -> None:
    gm, model = compiled("hw")
    gm.float().eval()
    for _ in range(2):
        _init(gm, model)
        twin = copy.deepcopy(gm)
        swatfx.refresh(twin)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gm(batch(99).float()), twin(batch(99).float()))


def test_gradients_in_evaluation_are_those_of_what_forward_saw() -> None:
    gm, model = compiled("nchw")
    gm.eval()
    x = batch(1).requires_grad_()
    y = gm(x)
    twin = copy.deepcopy(gm)
    other = batch(1).requires_grad_()
    twin(other).sum().backward()
    _density(gm, model)
    evaluate(gm)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, other.grad)


def test_nan_in_a_weight_reaches_the_output_of_an_evaluation() -> None:
    gm, model = compiled("hw")
    with torch.no_grad():
        model.get_parameter("5.weight")[0, 0] = torch.nan
    y = evaluate(gm)
    assert y[:, 0].isnan().all() and y[:, 1:].isfinite().all()


def test_held_masks_and_learned_thresholds_stay() -> None:
    for policy in ("static:0.75", "dst:1e-4"):
        model = net()
        gm = swatfx.compile(model, policy)
        states = [layer.weight_threshold.threshold.clone() for layer in sparse_layers(gm)]
        evaluate(gm)
        _init(gm, model)
        found = evaluate(gm)
        assert torch.equal(found, after_refresh(gm))
        for layer, state in zip(sparse_layers(gm), states, strict=True):
            assert torch.equal(layer.weight_threshold.threshold, state)


def test_ssc_has_the_pattern_that_it_has() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double()
    gm = swatfx.compile(model, "ssc,g=4,p=8,last_dense=false")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gm(x).sum().backward()
    optimizer.step()
    gm.eval()
    y = gm(x)
    swatfx.refresh(gm)
    assert torch.equal(gm(x), y)


def test_a_copy_and_a_moved_model_remember_nothing() -> None:
    gm, _ = compiled()
    evaluate(gm)
    twin = copy.deepcopy(gm)

    def memories(model: SwatModule) -> list[Any]:
        modules = [m for m in model.swat.modules() if isinstance(m, WeightThreshold)]
        return [m.remembered for m in modules]

    assert all(m.seen is not None for m in memories(gm))
    assert all(m.seen is None for m in memories(twin))
    tokens = [m.token for m in memories(gm) + memories(twin)]
    assert len(set(tokens)) == 6
    gm.float()
    assert all(m.seen is None for m in memories(gm))


@pytest.mark.parametrize("policy", ["swat-u:0.75,period=5", "swat-u:0.75,weight_selector=hw"])
def test_a_report_after_training_tells_what_evaluation_uses(policy: str) -> None:
    gm = swatfx.compile(net(), policy)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.5, momentum=0.9)
    for seed in range(3):
        step(gm, optimizer, seed)
    before = {name: b.clone() for name, b in gm.named_buffers()}
    used = {layer.plan.name: layer.keep() for layer in sparse_layers(gm)}
    told = {r.name: r.realised_weight_density for r in swatfx.report(gm, batch(0)).layers}
    assert all(torch.equal(b, before[name]) for name, b in gm.named_buffers())
    now = {layer.plan.name: layer.keep_now() for layer in sparse_layers(gm)}
    assert any(not torch.equal(used[name], now[name]) for name in used)
    swatfx.refresh(gm)
    for layer in sparse_layers(gm):
        name = layer.plan.name
        assert torch.equal(now[name], layer.keep())
        assert told[name] == float(layer.keep().double().mean())
