"""Held masks under every optimizer: inactive weights are exactly zero after every step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.errors import AttachError
from tests.nets.any_optimizer import FORMS, SignUpdates, SkipsNaN, net, rows, step_of
from tests.nets.held_masks import POLICIES, TIMES, TOTAL, masks_of, same
from tests.nets.small_nets import loss_of

ZERO = ["static", "set", "rigl", "snfs", "dsr", "gradual-magnitude", "ssc"]
ALL = POLICIES | {"ssc": swatfx.ssc(2, 4)}
HELD = [*ZERO, "soft-filter", "swat-frozen", "swat-frozen-active"]


def _policy(name: str) -> swatfx.Policy:
    return replace(ALL[name], first_dense=False, last_dense=False)


def _start(name: str, make: Any) -> tuple[SwatModule, torch.optim.Optimizer]:
    torch.manual_seed(0)
    gm = swatfx.compile(net(), _policy(name))
    optimizer = make(gm.parameters())
    swatfx.attach(gm, optimizer, **TIMES)
    return gm, optimizer


def _check(gm: SwatModule, name: str, step: int) -> None:
    for layer in sparse_layers(gm):
        keep = layer.keep()
        if name in ZERO:
            assert not layer.weight[~keep].any(), (step, layer.plan.name)
            assert not torch.signbit(layer.weight[~keep]).any()
        assert 0 < int(keep.sum()) < keep.numel() or name == "gradual-magnitude"


# Forms that differ from another in the optimizer's own arithmetic alone, for most methods.
_VARIANTS = ("maximize", "nesterov", "amsgrad", "foreach")
_PAIRS = [
    pytest.param(
        form,
        name,
        marks=pytest.mark.slow if form.endswith(_VARIANTS) and name not in ("rigl", "snfs") else (),
    )
    for form in FORMS
    for name in HELD
]


@pytest.mark.parametrize(("form", "name"), _PAIRS)
def test_inactive_weights_are_zero(form: str, name: str) -> None:
    """Also with a loss that has gradients on zero weights, and weights that someone moved."""
    try:
        gm, optimizer = _start(name, FORMS[form])
    except AttachError as error:
        assert name == "snfs" and "keeps no momentum" in str(error)
        return
    before, changed = masks_of(gm), []

    def loss(output: Tensor) -> Tensor:
        pull = sum(((layer.weight - 1) ** 2).mean() for layer in sparse_layers(gm))
        return loss_of(output) + 0.1 * pull

    for step, x in enumerate(rows(TOTAL), 1):
        try:
            step_of(gm, optimizer, x, loss)
        except AttachError as error:
            assert name == "snfs" and "keeps no momentum" in str(error)
            return
        _check(gm, name, step)
        after = masks_of(gm)
        if not same(before, after):
            changed.append(step)
        before = after
    assert int(gm.swat.clock.updates) == TOTAL
    expected = {
        "set": [3, 6],
        "rigl": [2, 4],
        "snfs": [3, 6],
        "dsr": [2, 4, 6, 8],
        "gradual-magnitude": [2, 4, 6],
    }
    if name in expected and name != "dsr":  # whose threshold may find nothing
        assert changed == expected[name]
    if name in ("static", "ssc"):
        assert changed == []


def test_there_are_all_forms() -> None:
    names = {form.split()[0] for form in FORMS}
    assert {"SGD", "Adam", "AdamW", "Muon", "LBFGS", "Adafactor", "Rprop", "ASGD"} <= names
    assert {"SGD fused", "Adam fused", "AdamW fused", "Adagrad fused"} <= FORMS.keys()
    assert {"NAdam foreach", "Adadelta foreach", "LBFGS line_search_fn"} <= FORMS.keys()


# ---- Against a plain reimplementation ------------------------------------------------------------


class _PlainRigL:
    """RigL of two matrices by the book, in float64: no graph, no hooks, no packed masks."""

    def __init__(self, weights: list[Tensor], masks: list[Tensor], make: Any) -> None:
        self.weights = [nn.Parameter(w.detach().clone()) for w in weights]
        self.masks = [m.clone() for m in masks]
        with torch.no_grad():
            for w, m in zip(self.weights, self.masks, strict=True):
                w.mul_(m)
        self.optimizer = make(self.weights)

    def step(self, x: Tensor, step: int, every: int, end: int) -> None:
        self.optimizer.zero_grad()
        first, second = (w * m for w, m in zip(self.weights, self.masks, strict=True))
        first.retain_grad(), second.retain_grad()
        loss_of(torch.relu(x @ first.T) @ second.T).backward()
        dense = [first.grad, second.grad]  # of the masked weights: gradients of all places
        self.optimizer.step()
        with torch.no_grad():
            for i, (w, m) in enumerate(zip(self.weights, self.masks, strict=True)):
                w.mul_(m)
                if step % every == 0 and step <= end:
                    grown = self._update(w, m, dense[i], step, end)
                    for value in self.optimizer.state[w].values():
                        if isinstance(value, Tensor) and value.shape == w.shape:
                            value[~self.masks[i] if grown is None else ~m | grown] = 0

    def _update(self, w: Tensor, m: Tensor, gradient: Any, step: int, end: int) -> Tensor:
        fraction = 0.3 / 2 * (1 + math.cos(math.pi * step / end))
        count = math.floor(fraction * int(m.sum()) + 1e-9)
        active = sorted(m.flatten().nonzero()[:, 0].tolist(), key=lambda i: w.flatten()[i].abs())
        dropped = active[:count]
        m.view(-1)[dropped] = False
        inactive = (~m).flatten().nonzero()[:, 0].tolist()
        grown = sorted(inactive, key=lambda i: -gradient.flatten()[i].abs())[:count]
        m.view(-1)[grown] = True
        w.view(-1)[dropped + grown] = 0
        new = torch.zeros_like(m)
        new.view(-1)[grown + dropped] = True
        return new


@pytest.mark.parametrize("form", ["SGD", "Adam", "AdamW amsgrad", "Muon", "NAdam", "RMSprop"])
def test_rigl_is_rigl(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.ReLU(), nn.Linear(24, 8, bias=False))
    gm = swatfx.compile(model.double(), swatfx.rigl(0.7, update_every=2, first_dense=False))
    optimizer = FORMS[form](gm.parameters())
    masks = masks_of(gm)
    plain = _PlainRigL([model[0].weight, model[2].weight], list(masks.values()), FORMS[form])
    swatfx.attach(gm, optimizer, total_steps=16)
    for step, x in enumerate(rows(14), 1):
        step_of(gm, optimizer, x.double())
        plain.step(x.double(), step, every=2, end=12)
        for mask, expected in zip(masks_of(gm).values(), plain.masks, strict=True):
            assert torch.equal(mask, expected), step
        for layer, weight in zip(sparse_layers(gm), plain.weights, strict=True):
            torch.testing.assert_close(layer.weight.data, weight.data, rtol=1e-6, atol=1e-9)
    assert not same(masks, masks_of(gm))


# ---- Steps that are left out ---------------------------------------------------------------------

SKIPPING = [*HELD, "swat-m", "dst", "swat-u"]


def _clipped(gm: SwatModule) -> dict[str, Tensor]:
    """All state but what counts forwards and what they select."""
    counts = ("iteration", "stamp", "activation_threshold")
    own = {k: v for k, v in gm.state_dict().items() if not k.endswith(counts)}
    return {
        k: v.clone()
        for k, v in own.items()
        if "activation_threshold.threshold" not in k
        and not (
            k.endswith("weight_threshold.threshold") and v.is_floating_point() and v.dim() == 0
        )
    }


def _skips(gm: SwatModule, optimizer: torch.optim.Optimizer, how: str) -> None:
    """Train 8 attempts, of which the second, the third and the sixth overflow.

    Not the first: torch's fused SGD would then go on with momentum that no one has set.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=10**6)
    done = 0
    for attempt, x in enumerate(rows(8), 1):
        optimizer.zero_grad()
        overflow = attempt in (2, 3, 6)
        output = gm(x)
        before = _clipped(gm)
        loss = loss_of(output) * (float("inf") if overflow else 1.0)
        if how == "itself":
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            if how == "unscaled":
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(gm.parameters(), 1.0, error_if_nonfinite=False)
            scaler.step(optimizer)
            scaler.update()
        after = _clipped(gm)
        changed = [k for k in after if not torch.equal(after[k], before[k])]
        if overflow:
            assert not changed, (attempt, changed)
        else:
            done += 1
            assert changed
        assert int(gm.swat.clock.updates) == done


@pytest.mark.parametrize(
    "how", ["SGD", "SGD fused", "Adam fused", "AdamW fused", "Adagrad fused", "unscaled", "itself"]
)
@pytest.mark.parametrize("name", SKIPPING)
def test_a_skipped_step_changes_nothing(name: str, how: str) -> None:
    torch.manual_seed(0)
    every = {"update_every": 1} if name in ("rigl", "dsr", "gradual-magnitude") else {}
    policy = swatfx.dst(0.01) if name == "dst" else replace(_policy(name), **every)
    gm = swatfx.compile(net(), policy)
    make = {"unscaled": FORMS["SGD fused"], "itself": SkipsNaN}.get(how) or FORMS[how]
    optimizer = make(gm.parameters())
    if how == "Adagrad fused" and name in ("snfs", "swat-m"):
        with pytest.raises(AttachError, match="no momentum"):
            swatfx.attach(gm, optimizer, **TIMES)
        return
    swatfx.attach(gm, optimizer, **TIMES)
    _skips(gm, optimizer, how)


def test_steps_whose_writes_cannot_be_seen_are_believed() -> None:
    """Fused kernels and `.data` move no version; a rate of zero moves nothing."""
    for make in (SignUpdates, FORMS["SGD fused"], FORMS["Adam"]):
        for rate in (0.0, 0.01):
            gm, optimizer = _start("set", make)
            for x in rows(4):
                optimizer.param_groups[0]["lr"] = rate
                step_of(gm, optimizer, x)
            assert int(gm.swat.clock.updates) == 4, (make, rate)


def test_a_step_that_raised_is_none() -> None:
    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            if self.fails:
                raise RuntimeError("no step")
            return super().step(closure)

    def make(p: Iterable[nn.Parameter]) -> Fails:
        return Fails(p, lr=0.05)

    (gm, optimizer), (other, reference) = _start("rigl", make), _start("rigl", FORMS["SGD"])
    reference.param_groups[0].update(momentum=0, weight_decay=0, lr=0.05)
    for x in rows(TOTAL):
        assert isinstance(optimizer, Fails)
        optimizer.fails = True
        with pytest.raises(RuntimeError, match="no step"):
            step_of(gm, optimizer, x)
        optimizer.fails = False
        optimizer.step()
        step_of(other, reference, x)
    assert int(gm.swat.clock.updates) == int(other.swat.clock.updates) == TOTAL
    assert same(masks_of(gm), masks_of(other))
