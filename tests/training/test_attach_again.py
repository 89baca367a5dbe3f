"""Attaching as frameworks do: again at every fit, to outer modules, through wrappers."""

from __future__ import annotations

import copy
import gc
import itertools
import pathlib
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.learned import learned_thresholds
from swatfx.compiled.module import SwatModule
from swatfx.errors import AttachError, InputError
from tests.nets.any_optimizer import Outer, net, rows
from tests.nets.held_masks import POLICIES, TIMES, TOTAL, masks_of, same
from tests.nets.small_nets import assert_same, loss_of, snapshot

RIGL = replace(POLICIES["rigl"], first_dense=False)


def _compiled(policy: swatfx.Policy | str = RIGL) -> SwatModule:
    torch.manual_seed(0)
    return swatfx.compile(net(bias=True), policy)


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def _train(model: Any, optimizer: Any, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()


def _hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


# ---- Again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_optimizer", [False, True])
@pytest.mark.parametrize("name", [*POLICIES, "dst"])
def test_a_later_attach_takes_over(name: str, same_optimizer: bool) -> None:
    """Nothing is done twice, and what the first was waiting for goes on."""
    policy = swatfx.dst(0.01) if name == "dst" else POLICIES[name]
    gm, reference = _compiled(policy), _compiled(policy)
    first, only = _sgd(gm), _sgd(reference)
    old = swatfx.attach(gm, first, **TIMES)
    swatfx.attach(reference, only, **TIMES)
    _train(gm, first, rows(3))
    _train(reference, only, rows(3))
    second = first if same_optimizer else _sgd(gm)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    swatfx.attach(gm, second, **TIMES)
    old.detach()  # its optimizer was replaced: this is nothing any more
    assert same_optimizer or not _hooks(first)
    assert _hooks(second) == 2 and gm.swat.clock.attached
    _train(gm, second, rows(TOTAL - 3, seed=1))
    _train(reference, only, rows(TOTAL - 3, seed=1))
    assert_same(snapshot(gm), snapshot(reference))


def test_detaching_the_newer_one_leaves_none() -> None:
    gm = _compiled()
    swatfx.attach(gm, _sgd(gm), **TIMES)
    handle = swatfx.attach(gm, _sgd(gm), **TIMES)
    handle.detach()
    handle.detach()
    with pytest.raises(AttachError, match="none is attached"):
        gm(rows(1)[0])


def test_a_refused_attach_leaves_the_earlier_one() -> None:
    gm = _compiled(replace(POLICIES["snfs"], first_dense=False))
    optimizer = _sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    before = snapshot(gm)
    for bad, match in (
        (torch.optim.SGD(gm.parameters(), lr=0.1), "keeps no momentum"),
        (_sgd(net()), "none of the model's parameters"),
        ([], "no optimizer"),
    ):
        with pytest.raises(AttachError, match=match):
            swatfx.attach(gm, bad, **TIMES)
    with pytest.raises(AttachError, match="wants steps_per_epoch"):
        swatfx.attach(gm, _sgd(gm))
    assert_same(snapshot(gm), before)
    assert _hooks(optimizer) == 2
    _train(gm, optimizer, rows(TOTAL))
    assert int(gm.swat.clock.updates) == TOTAL


def test_one_of_two_is_replaced() -> None:
    """Each of a fit's optimizers replaces its own of the fit before; the numbers are the newer."""
    gm = _compiled()
    parts = [gm.get_submodule("0"), nn.ModuleList([gm.get_submodule(i) for i in "24"])]
    old = [_sgd(part) for part in parts]
    handles = [swatfx.attach(gm, optimizer, **TIMES) for optimizer in old]
    new = [_sgd(part) for part in parts]
    swatfx.attach(gm, new[0], total_steps=50)
    assert [_hooks(o) for o in (*old, *new)] == [0, 2, 2, 0]
    swatfx.attach(gm, new[1])  # the numbers that are there still hold
    for handle in handles:
        handle.detach()
    assert [_hooks(o) for o in (*old, *new)] == [0, 0, 2, 2]
    for x in rows(20):
        loss_of(gm(x)).backward()
        before = masks_of(gm)
        for optimizer in new:
            optimizer.step()
            optimizer.zero_grad()
    assert int(gm.swat.clock.updates) == 20
    assert not same(before, masks_of(gm))  # past the 9 steps of the first fit
    swatfx.attach(gm, new, **TIMES).detach()
    assert not gm.swat.clock.attached


def test_learned_thresholds_are_added_once() -> None:
    model = net()
    first = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gm = swatfx.compile(model, swatfx.dst(0.01))
    for _ in range(3):
        swatfx.attach(gm, first)
    assert [len(g["params"]) for g in first.param_groups] == [3, 3]
    second = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    swatfx.attach(gm, second)
    assert [len(g["params"]) for g in second.param_groups] == [3, 3]
    second.load_state_dict(first.state_dict())
    whole = torch.optim.SGD(gm.parameters(), lr=0.1)
    swatfx.attach(gm, whole)
    assert [len(g["params"]) for g in whole.param_groups] == [6]
    before = [m.threshold.clone() for m in learned_thresholds(gm)]
    _train(gm, whole, rows(2))
    for module, t in zip(learned_thresholds(gm), before, strict=True):
        assert not torch.equal(module.threshold, t)


def test_a_copy_is_attached_by_itself() -> None:
    gm = _compiled()
    optimizer = _sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    _train(gm, optimizer, rows(3))
    twin = copy.deepcopy(gm)
    other = _sgd(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    swatfx.attach(twin, other, **TIMES)
    before = snapshot(gm)
    _train(twin, other, rows(TOTAL - 3, seed=1))
    assert_same(snapshot(gm), before)
    _train(gm, optimizer, rows(TOTAL - 3, seed=1))
    assert_same(snapshot(gm), snapshot(twin))


def _copied(gm: SwatModule, optimizer: torch.optim.Optimizer) -> list[Any]:
    twin = copy.deepcopy(gm)
    other = _sgd(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    swatfx.attach(twin, other, **TIMES)
    _train(twin, other, rows(1))
    return [twin, other]


def _pickled(gm: SwatModule, optimizer: torch.optim.Optimizer) -> list[Any]:
    again = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)]
    for one in again:  # it holds parameters of its own, which hang on nothing of ours
        assert not _hooks(one)
        assert not any(p._backward_hooks for g in one.param_groups for p in g["params"])
    return again


def _reported(gm: SwatModule, optimizer: torch.optim.Optimizer) -> list[Any]:
    swatfx.report(gm, (rows(1)[0],))
    swatfx.report(gm, (rows(1)[0].to("meta"),))
    return []


def _attached_again(gm: SwatModule, optimizer: torch.optim.Optimizer) -> list[Any]:
    swatfx.attach(gm, optimizer, **TIMES).detach()
    other = _sgd(gm)
    swatfx.attach(gm, other, **TIMES)
    _train(gm, other, rows(2))  # for RigL, up to the step before the next that grows
    return [other]


Deed = Callable[[SwatModule, torch.optim.Optimizer], list[Any]]
DEEDS: list[Deed] = [_copied, _pickled, _reported, _attached_again]


def _watched(policy: swatfx.Policy | str, deeds: Sequence[Deed]) -> list[weakref.ref[Any]]:
    """Of a model that has trained a step, all that could be freed."""
    gm = _compiled(policy)
    optimizer = _sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    _train(gm, optimizer, rows(1))
    found = [gm, optimizer]
    for deed in deeds:
        found += deed(gm, optimizer)
    found += [p for one in found if isinstance(one, nn.Module) for p in one.parameters()]
    return [weakref.ref(one) for one in found]


def _alive(watched: Sequence[weakref.ref[Any]]) -> list[str]:
    gc.collect()
    return [type(one()).__name__ for one in watched if one() is not None]


def _all_deeds() -> Iterator[Any]:
    """Every policy with every deed; in the fast suite those whose hooks differ."""
    for name, deed in itertools.product([*POLICIES, "dst"], [None, *DEEDS]):
        quick = deed is None or name in ("swat-u", "rigl", "dst")
        yield pytest.param(name, deed, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "deed"), list(_all_deeds()))
def test_models_and_optimizers_are_let_go(name: str, deed: Deed | None) -> None:
    """Hooks on tensors are held where no garbage collector looks."""
    policy = swatfx.dst(0.01) if name == "dst" else replace(POLICIES[name], first_dense=False)
    assert _alive(_watched(policy, [deed] if deed else [])) == []


@pytest.mark.parametrize("name", ["rigl", "swat-u"])
def test_an_exported_model_is_let_go(name: str, tmp_path: pathlib.Path) -> None:
    def export(gm: SwatModule, optimizer: torch.optim.Optimizer) -> list[Any]:
        gm.eval()
        swatfx.export(gm, tmp_path / "net.pt2", (rows(1)[0],))
        return []

    assert _alive(_watched(POLICIES[name], [export])) == []


def test_weights_outlive_the_compiled_model() -> None:
    """Hooks that still hang on them do nothing: gradients are dense again."""
    model = net(bias=True)
    gm = swatfx.compile(model, RIGL)
    optimizer = _sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    _train(gm, optimizer, rows(1))
    assert any(p._backward_hooks for p in model.parameters())
    watched = [weakref.ref(gm), weakref.ref(optimizer)]
    del gm, optimizer
    assert _alive(watched) == []
    plain = net(bias=True)
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        one.zero_grad()
        loss_of(one(rows(1)[0])).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_a_weight_that_was_replaced_is_found_out() -> None:
    gm = _compiled()
    optimizer = _sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    module = gm.get_submodule("2")
    assert isinstance(module, nn.Linear)
    module.weight = nn.Parameter(module.weight.detach().clone())
    with pytest.raises(AttachError, match="layer '2'"):
        _train(gm, optimizer, rows(1))
    other = _sgd(gm)
    swatfx.attach(gm, other, **TIMES)  # the remedy
    _train(gm, other, rows(4))
    for layer in sparse_layers(gm):
        assert not layer.weight[~layer.keep()].any()


# ---- Around and inside ---------------------------------------------------------------------------


WRAPPERS: dict[str, Callable[[SwatModule], Any]] = {
    "bare": lambda gm: gm,
    "outer": Outer,
    "compiled": lambda gm: torch.compile(gm, backend="eager"),
    "compiled outer": lambda gm: torch.compile(Outer(gm), backend="eager"),
    "outer of compiled": lambda gm: Outer(torch.compile(gm, backend="eager")),  # type: ignore
    "data parallel": nn.DataParallel,
    "sequential": lambda gm: nn.Sequential(gm, nn.ReLU()),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_attach_and_dense_state_dict_find_the_model(kind: str) -> None:
    torch._dynamo.reset()
    gm = _compiled()
    top = WRAPPERS[kind](gm)
    optimizer = _sgd(top)
    swatfx.attach(top, optimizer, **TIMES)
    before = masks_of(gm)
    _train(top, optimizer, rows(4))
    assert int(gm.swat.clock.updates) == 4 and not same(before, masks_of(gm))
    torch.manual_seed(1)
    plain = net(bias=True)
    fresh = {"outer": Outer(plain), "sequential": nn.Sequential(plain, nn.ReLU())}
    model = next((m for name, m in fresh.items() if name in kind), plain)
    model.load_state_dict(swatfx.dense_state_dict(top), strict=True)
    x = rows(1, seed=3)[0]
    torch.testing.assert_close(model.eval()(x), top.eval()(x))
    for layer in sparse_layers(gm):
        weight = plain.get_parameter(layer.plan.weight)
        assert torch.equal(weight != 0, layer.keep() & (layer.weight != 0))


def test_an_outer_module_with_two_compiled_models() -> None:
    pair = nn.ModuleDict({"g": _compiled(), "d": _compiled("set:0.8,update_every=2")})
    optimizers = [_sgd(pair["g"]), _sgd(pair["d"])]
    handle = swatfx.attach(pair, optimizers, **TIMES)
    for model, optimizer in zip(pair.values(), optimizers, strict=True):
        before = masks_of(model)  # type: ignore[arg-type]
        _train(model, optimizer, rows(4))
        assert not same(before, masks_of(model))  # type: ignore[arg-type]
    handle.detach()
    assert [_hooks(o) for o in optimizers] == [0, 0]


def test_a_module_without_a_compiled_model_is_refused() -> None:
    for module in (nn.Linear(2, 2), Outer(net()), nn.Sequential()):
        with pytest.raises(InputError, match="not a compiled model"):
            swatfx.attach(module, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


# ---- Wrapped optimizers --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bare", "outer"])
def test_accelerate(kind: str, tmp_path: pathlib.Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    gm, reference = _compiled(), _compiled()
    torch.manual_seed(1)
    top = WRAPPERS[kind](gm)
    torch.manual_seed(1)
    other = WRAPPERS[kind](reference)
    model, optimizer = accelerator.prepare(top, _sgd(top))
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    plain = _sgd(other)
    swatfx.attach(model, optimizer, **TIMES)
    swatfx.attach(other, plain, **TIMES)
    data = rows(2 * TOTAL)
    for x in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(x)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(data[::2], data[1::2], strict=True):
        for x in (first, second):
            (loss_of(other(x)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        plain.step()
        plain.zero_grad()
    assert int(gm.swat.clock.updates) == TOTAL
    assert_same(snapshot(gm), snapshot(reference))


@pytest.mark.filterwarnings("ignore")
def test_lightning_fits_again_and_again(tmp_path: pathlib.Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = _compiled()

        def configure_optimizers(self) -> Any:
            parts = [self.net.get_submodule("0"), self.net.get_submodule("2")]
            optimizers = [_sgd(part) for part in (*parts, self.net.get_submodule("4"))]
            swatfx.attach(self, optimizers, **TIMES)
            return optimizers

        def on_train_start(self) -> None:
            swatfx.attach(self, self.optimizers(), **TIMES)  # Lightning's own wrappers of them

        def training_step(self, batch: Any, _: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(loss_of(self.net(batch)))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    module = Module()
    before = masks_of(module.net)
    for fit in range(1, 3):
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(rows(4), batch_size=None))  # type: ignore
        assert int(module.net.swat.clock.updates) == 4 * fit
        for layer in sparse_layers(module.net):
            assert not layer.weight[~layer.keep()].any()
    assert not same(before, masks_of(module.net))


# ---- What others write between steps -------------------------------------------------------------


@pytest.mark.parametrize("name", ["rigl", "set", "snfs", "gradual-magnitude", "static"])
def test_a_dense_checkpoint_after_attach(name: str) -> None:
    """Even before step 1, and where that step grows: as if it had been loaded before."""
    every = {"update_every": 1} if name != "static" else {}
    policy = replace(POLICIES[name], first_dense=False, **every)
    torch.manual_seed(3)
    dense = net(bias=True).state_dict()
    gm, reference = _compiled(policy), _compiled(policy)
    optimizer, other = _sgd(gm), _sgd(reference)
    swatfx.attach(gm, optimizer, **TIMES)
    gm.load_state_dict(dense)
    reference.load_state_dict(dense)
    swatfx.attach(reference, other, **TIMES)
    assert_same(snapshot(gm), snapshot(reference))
    for x in rows(3):
        before = masks_of(gm)
        _train(gm, optimizer, [x])
        _train(reference, other, [x])
        assert_same(snapshot(gm), snapshot(reference))
        assert same(before, masks_of(gm)) == (name == "static")


def test_a_state_that_never_was_attached() -> None:
    """Its inactive weights are not zero, and it lets no dense gradient through."""
    policy = replace(RIGL, update_every=1)
    state = copy.deepcopy(_compiled(policy).state_dict())
    gm = _compiled(policy)
    optimizer = _sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    gm.load_state_dict(state)
    for layer in sparse_layers(gm):
        assert not layer.weight[~layer.keep()].any()
    before = masks_of(gm)
    _train(gm, optimizer, rows(1))
    assert not same(before, masks_of(gm))
