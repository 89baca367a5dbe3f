"""Averages by loops of one's own, which leave masks out, or take the mean of their bytes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.errors import SwatWarning
from tests.nets.any_optimizer import Outer, net, rows
from tests.nets.held_masks import POLICIES, TIMES, TOTAL
from tests.nets.small_nets import assert_same, sgd, snapshot, train

MOVING = ["set", "rigl", "snfs", "dsr", "swat-frozen"]  # masks that training changes
DECAY = 0.6


def entries(module: nn.Module, floats: bool) -> list[Tensor]:
    state: dict[str, Tensor] = module.state_dict()
    return [value for value in state.values() if value.is_floating_point() or not floats]


def averaged(mine: Any, theirs: Any) -> None:
    with torch.no_grad():
        for one, other in zip(mine, theirs, strict=True):
            one.copy_(DECAY * one + (1 - DECAY) * other)


def behind(mine: nn.Module, model: nn.Module) -> None:
    """Behind autograd's back."""
    for one, other in zip(mine.parameters(), model.parameters(), strict=True):
        one.data.mul_(DECAY).add_(other.data, alpha=1 - DECAY)


LEFT: dict[str, Callable[[nn.Module, nn.Module], None]] = {
    "parameters": lambda a, m: averaged(a.parameters(), m.parameters()),
    "data of parameters": behind,
    "floats": lambda a, m: averaged(entries(a, True), entries(m, True)),
}
LOOPS = LEFT | {"all": lambda a, m: averaged(entries(a, False), entries(m, False))}


@pytest.fixture(autouse=True)
def told_again() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SwatWarning)
        yield


def compiled(name: str) -> SwatModule:
    torch.manual_seed(0)
    return swatfx.compile(net(), replace(POLICIES[name], first_dense=False, last_dense=False))


def trained(
    name: str, loop: str, *, nested: bool = False, early: bool = False
) -> tuple[nn.Module, nn.Module]:
    """(model, its average) after all steps; `early`: copied before there was an optimizer."""
    gm = compiled(name)
    model: nn.Module = Outer(gm) if nested else gm
    optimizer = sgd(model)
    average = copy.deepcopy(model).eval() if early else None
    swatfx.attach(model, optimizer, **TIMES)
    average = copy.deepcopy(model).eval() if average is None else average
    for x in rows(TOTAL):
        train(model, optimizer, [x])
        LOOPS[loop](average, model)
    return model.eval(), average


def inner(model: nn.Module) -> SwatModule:
    return next(m for m in model.modules() if isinstance(m, SwatModule))


def as_expected(average: nn.Module, source: nn.Module | None = None) -> nn.Module:
    """The dense net with, in each layer, the weights of the source's mask or the largest."""
    plain: nn.Module = net()
    root = inner(average)
    weights = {name: p.detach().clone() for name, p in root.named_parameters()}
    theirs = None if source is None else {x.plan.name: x for x in sparse_layers(inner(source))}
    for layer in sparse_layers(root):
        weight, keep = weights[layer.plan.weight], layer.keep_now()
        if theirs is None or not torch.equal(keep, theirs[layer.plan.name].keep_now()):
            density = layer.weight_threshold.density_now
            counts = density.count(weight.numel()), density.count_within(weight.numel())
            assert int(keep.sum()) in counts
            keep = weight.abs() >= weight.abs().flatten().topk(int(keep.sum())).values[-1]
        weight[~keep] = 0
    plain.load_state_dict(weights, strict=True)
    return plain


@pytest.mark.parametrize("early", [False, True], ids=["attached", "early"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", MOVING)
def test_an_average_has_its_largest_weights(
    name: str, loop: str, nested: bool, early: bool
) -> None:
    if name == "swat-frozen" and early and loop.endswith("parameters"):
        pytest.skip("not held when copied, and nothing says that it is now: selected anew")
    model, average = trained(name, loop, nested=nested, early=early)
    x = rows(1, seed=5)[0]
    root = inner(average)
    got = root(x)
    torch.testing.assert_close(got, as_expected(average, model)(x))
    source = [layer.keep_now() for layer in sparse_layers(inner(model))]
    mine = [layer.keep_now() for layer in sparse_layers(root)]
    near = [(a == b).double().mean().item() for a, b in zip(mine, source, strict=True)]
    # Redistributed densities are as when copied, where they are left out.
    assert min(near) > (
        0.6 if name == "snfs" else 0.75
    )  # an average of all its steps; not of its mask when it was copied
    # It is so in whatever is made of it.
    again = compiled(name)
    again.load_state_dict(root.state_dict())
    torch.testing.assert_close(again.eval()(x), got)
    torch.testing.assert_close(copy.deepcopy(root)(x), got)
    if all(layer.weight_threshold.is_held for layer in sparse_layers(root)):
        plain = net()
        plain.load_state_dict(swatfx.dense_state_dict(root))
        torch.testing.assert_close(plain(x), got)


@pytest.mark.parametrize("how", ["state dict", "deepcopy", "save", "report", "double", "export"])
@pytest.mark.parametrize("loop", LOOPS)
def test_it_need_not_be_called_first(loop: str, how: str, tmp_path: Path) -> None:
    _, average = trained("rigl", loop)
    _, other = trained("rigl", loop)
    x = rows(1, seed=5)[0]
    want = average(x)
    root = inner(other)
    if how == "state dict":
        gm = compiled("rigl")
        gm.load_state_dict(root.state_dict())
    elif how == "deepcopy":
        gm = copy.deepcopy(root)
    elif how == "save":
        swatfx.save(root, tmp_path / "a.ckpt")
        gm = swatfx.load(tmp_path / "a.ckpt", net())
    elif how == "report":
        realised = [r.realised_weight_density for r in swatfx.report(root, (x,)).layers]
        swatfx.refresh(average)
        again = [r.realised_weight_density for r in swatfx.report(average, (x,)).layers]
        assert realised == again
        gm = root
    elif how == "double":
        gm, want = root.double(), want.double()
        torch.testing.assert_close(gm.eval()(x.double()), want, atol=1e-5, rtol=1e-5)
        return
    else:
        swatfx.export(root, tmp_path / "a.pt2", (x,))
        program = torch.export.load(tmp_path / "a.pt2").module()
        torch.testing.assert_close(program(x), want)
        return
    torch.testing.assert_close(gm.eval()(x), want)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["rigl", "swat-frozen", "swat-m", "swat-u"])
def test_compiled_by_torch(name: str, loop: str, fresh_dynamo: None) -> None:
    _, average = trained(name, loop)
    twin = copy.deepcopy(average)
    _, other = trained(name, loop)
    x = rows(1, seed=5)[0]
    before = snapshot(other)
    step = torch.compile(other, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(step(x), average(x))
        torch.testing.assert_close(step(x), twin(x))
        if loop != "data of parameters":
            for model in (other, average):
                for p in model.parameters():
                    p.mul_(torch.linspace(0, 1, p.numel()).view_as(p))
            torch.testing.assert_close(step(x), average(x))
    assert before.keys() == snapshot(other).keys()


@pytest.mark.parametrize("name", MOVING)
def test_weights_copied_into_a_fresh_copy(name: str) -> None:
    """As `copy_to` of EMA packages does: the largest, or, where all is loaded, its masks."""
    model, average = trained(name, "parameters")
    source, x = inner(model), rows(1, seed=5)[0]
    twin = copy.deepcopy(source)
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), average.parameters(), strict=True):
            mine.copy_(theirs)
    torch.testing.assert_close(twin(x), as_expected(twin, model)(x))
    state = dict(source.state_dict()) | dict(average.named_parameters())
    twin = copy.deepcopy(source)
    twin.load_state_dict(state)
    for layer, other in zip(sparse_layers(twin), sparse_layers(source), strict=True):
        assert torch.equal(layer.keep(), other.keep())
        if layer.weight_threshold.is_held:
            assert torch.equal(layer.keep_now(), other.keep())


def test_weights_that_went_back_keep_their_masks() -> None:
    """A lottery ticket: the first weights under the last mask; of a copy, zero outside of it."""
    gm = compiled("rigl")
    first = {name: p.detach().clone() for name, p in gm.named_parameters()}
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    train(gm, optimizer, rows(TOTAL))
    masks = [layer.keep() for layer in sparse_layers(gm)]
    for ticket in (gm, copy.deepcopy(gm)):
        ticket.load_state_dict(first, strict=False)
        if ticket is not gm:
            with torch.no_grad():
                for layer, mask in zip(sparse_layers(ticket), masks, strict=True):
                    layer.weight.mul_(mask)
        ticket.eval()(rows(1)[0])
        swatfx.attach(ticket, torch.optim.SGD(ticket.parameters(), lr=0.05), **TIMES)
        for layer, mask in zip(sparse_layers(ticket), masks, strict=True):
            assert torch.equal(layer.keep(), mask)


def test_a_mean_of_state_dicts() -> None:
    """A soup: of their entries, as numbers."""
    states = []
    for seed in (1, 2):
        gm = compiled("set")
        optimizer = sgd(gm)
        swatfx.attach(gm, optimizer, **TIMES)
        train(gm, optimizer, rows(TOTAL, seed=seed))
        states.append(copy.deepcopy(dict(gm.state_dict())))
    mean = {
        name: ((value + states[1][name]) / 2).to(value.dtype) for name, value in states[0].items()
    }
    gm = compiled("set")
    gm.load_state_dict(mean)
    x = rows(1, seed=5)[0]
    torch.testing.assert_close(gm.eval()(x), as_expected(gm)(x))


def test_what_is_trained_keeps_its_masks() -> None:
    """A copy that is trained itself: nothing of it is an average."""
    gm = compiled("swat-frozen-active")
    twin = copy.deepcopy(gm)
    snapshots = []
    for model in (gm, twin):
        optimizer = sgd(model)
        swatfx.attach(model, optimizer, **TIMES)
        torch.manual_seed(1)
        for x in rows(TOTAL):
            train(model, optimizer, [x])
            model.eval()(x)
            model.train()
        snapshots.append(snapshot(model))
    assert_same(*snapshots)


def test_it_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    _, average = trained("rigl", "parameters")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", SwatWarning)
        average(rows(1)[0])
        average(rows(1)[0])
    found = [w for w in caught if issubclass(w.category, SwatWarning)]
    assert len(found) == 1 and "nobody wrote" in str(found[0].message)


@pytest.mark.parametrize("how", ["loaded", "resumed", "second", "params by load", "update_bn"])
@pytest.mark.parametrize("name", ["set", "rigl", "snfs"])
def test_averages_that_load(name: str, how: str) -> None:
    """Loads bring masks along, and then weights may move on without them again."""
    gm = compiled(name)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    average: SwatModule = copy.deepcopy(gm).eval()
    if how == "second":
        average = compiled(name).eval()
    if how in ("loaded", "second"):
        average.load_state_dict(gm.state_dict())
    for step, x in enumerate(rows(TOTAL)):
        train(gm, optimizer, [x])
        if how == "params by load":
            mine = dict(average.named_parameters())
            mean = {n: DECAY * mine[n] + (1 - DECAY) * p for n, p in gm.named_parameters()}
            average.load_state_dict({n: p.detach() for n, p in mean.items()}, strict=False)
        else:
            averaged(average.parameters(), gm.parameters())
        if step == 3 and how == "resumed":
            state = copy.deepcopy(average.state_dict())
            average = copy.deepcopy(gm).eval()
            average.load_state_dict(state)
    if how == "update_bn":
        with torch.no_grad():
            average.train()(rows(1)[0])
    x = rows(1, seed=5)[0]
    average.eval()
    torch.testing.assert_close(average(x), as_expected(average, gm)(x))


@pytest.mark.parametrize("name", ["set", "snfs", "gradual-magnitude", "swat-u"])
def test_a_second_model_of_averaged_entries(name: str) -> None:
    """Not copied, but loaded: it is mended as a copy is, its fractions too."""
    policy = swatfx.swat_u(0.7) if name == "swat-u" else POLICIES[name]
    policy = replace(policy, first_dense=False, last_dense=False)
    torch.manual_seed(0)
    gm, average = swatfx.compile(net(), policy), swatfx.compile(net(), policy).eval()
    average.load_state_dict(gm.state_dict())
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    for x in rows(TOTAL):
        train(gm, optimizer, [x])
        averaged(entries(average, False), entries(gm, False))
    x = rows(1, seed=5)[0]
    got = average(x)
    average.state_dict()  # where what is left to mend in the buffers is mended
    torch.testing.assert_close(got, as_expected(average, gm)(x))
    if name == "swat-u":
        assert {layer.weight_density.value for layer in sparse_layers(average)} == {0.3}


@pytest.mark.parametrize("how", ["assign", "to_empty", "compiled on meta"])
@pytest.mark.parametrize("name", ["snfs", "rigl", "swat-frozen", "dst", "swat-u"])
def test_a_state_loaded_over_meta_is_that_state(name: str, how: str) -> None:
    policy = swatfx.dst(0.01) if name == "dst" else POLICIES[name]
    torch.manual_seed(0)
    gm = swatfx.compile(net(), replace(policy, period=4) if name == "swat-u" else policy)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    train(gm, optimizer, rows(TOTAL))
    torch.manual_seed(1)
    policy = replace(policy, period=4) if name == "swat-u" else policy
    if how == "compiled on meta":
        with torch.device("meta"):
            other = swatfx.compile(net(), policy)
    else:
        other = swatfx.compile(net(), policy).to("meta")
    if how == "to_empty":
        other.to_empty(device="cpu")
    state = copy.deepcopy(gm.state_dict())
    other.load_state_dict(state, assign=how != "to_empty")
    x = rows(1, seed=5)[0]
    assert torch.equal(other.eval()(x), gm.eval()(x))
    assert_same(dict(other.state_dict()), dict(gm.state_dict()))


def test_evaluation_with_other_weights_changes_no_copy() -> None:
    _, average = trained("rigl", "parameters")
    before = copy.deepcopy(dict(average.named_buffers()))
    others = {name: torch.randn_like(p) for name, p in average.named_parameters()}
    torch.func.functional_call(average, others, (rows(1)[0],))
    assert_same(dict(average.named_buffers()), before)


# ---- Other parameters, other models' masks -------------------------------------------------------


@pytest.mark.parametrize("of_copy", [False, True])
@pytest.mark.parametrize("how", ["parameter", "layer"])
@pytest.mark.parametrize("name", MOVING)
def test_another_parameter_of_the_same_values_keeps_its_mask(
    name: str, how: str, of_copy: bool
) -> None:
    """A mask that was drawn anew left out weights that training had grown."""
    gm = compiled(name)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    train(gm, optimizer, rows(TOTAL))
    model = copy.deepcopy(gm) if of_copy else gm
    model.eval()
    x = rows(1, seed=5)[0]
    before, masks = model(x), [layer.keep_now() for layer in sparse_layers(model)]
    path = next(sparse_layers(model)).plan.name
    layer = model.get_submodule(path)
    if how == "parameter":
        assert isinstance(layer.weight, Tensor)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    else:
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, copy.deepcopy(layer))
    assert torch.equal(model(x), before)
    for layer_now, mask in zip(sparse_layers(model), masks, strict=True):
        assert torch.equal(layer_now.keep_now(), mask)


@pytest.mark.parametrize("name", ["set", "rigl", "snfs", "static"])
def test_a_copy_whose_parameter_is_replaced_takes_its_largest_weights(name: str) -> None:
    gm = compiled(name)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    train(gm, optimizer, rows(TOTAL))
    average = copy.deepcopy(gm).eval()
    first = next(sparse_layers(average))
    other, kept = torch.randn_like(first.weight), int(first.keep_now().sum())
    owner = average.get_submodule(first.plan.name)
    owner.weight = nn.Parameter(other)
    with pytest.warns(SwatWarning, match="was replaced"):
        average(rows(1)[0])
    largest = other.abs() >= other.abs().flatten().topk(kept).values[-1]
    assert torch.equal(next(sparse_layers(average)).keep_now(), largest)


@pytest.mark.parametrize("loop", ["floats", "parameters", "all"])
def test_an_averaged_model_of_moving_densities_is_saved_and_loaded(
    loop: str, tmp_path: Path
) -> None:
    """Means of densities are none of the exact fractions that they had."""
    torch.manual_seed(0)
    gm = swatfx.compile(net(), "swat-m:0.8")
    optimizer = sgd(gm)
    average = copy.deepcopy(gm).eval()
    swatfx.attach(gm, optimizer, **TIMES)
    for x in rows(TOTAL):
        train(gm, optimizer, [x])
        LOOPS[loop](average, gm)
    swatfx.save(average, tmp_path / "average.ckpt")
    torch.manual_seed(0)
    loaded = swatfx.load(tmp_path / "average.ckpt", net()).eval()
    x = rows(1, seed=5)[0]
    assert torch.equal(loaded(x), average(x))
    for one, other in zip(loaded.swat.thresholds(), average.swat.thresholds(), strict=True):
        assert one[1].density.item() == other[1].density.item()


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_a_mean_of_floats_under_one_models_masks_is_told(name: str) -> None:
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        gm = swatfx.compile(net(), POLICIES[name])
        optimizer = sgd(gm)
        swatfx.attach(gm, optimizer, **TIMES)
        train(gm, optimizer, rows(TOTAL, seed=seed))
        states.append(copy.deepcopy(gm.state_dict()))
    floats = {k: (v + states[1][k]) / 2 for k, v in states[0].items() if v.is_floating_point()}
    with pytest.warns(SwatWarning, match="lies outside of the mask") as told:
        swatfx.compile(net(), POLICIES[name]).load_state_dict(states[0] | floats)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", SwatWarning)
        swatfx.compile(net(), POLICIES[name]).load_state_dict(states[0])
