"""Activation checkpointing: no gradient changes, and an iteration counts once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swatfx
from swatfx import Policy
from swatfx.compiled.module import SwatModule
from tests.nets.period_nets import batch, net, nudge

torch.set_num_threads(1)
S = 0.75


def gradients(
    policy: Policy, *, steps: int, reentrant: bool | None, together: int = 1
) -> tuple[list[Tensor], SwatModule]:
    """Gradients of some steps, `together` forwards before each backward."""
    gm = swatfx.compile(net(), policy)
    found: list[Tensor] = []
    step = 0
    while step < steps:
        inputs = [batch(step + i).requires_grad_() for i in range(together)]
        outputs = []
        for x in inputs:
            if reentrant is None:
                outputs.append(gm(x))
            else:
                outputs.append(checkpoint(gm, x, use_reentrant=reentrant))
        gm.zero_grad()
        sum(y.pow(2).sum() for y in outputs).backward()
        found += [x.grad for x in inputs if x.grad is not None]
        found += [p.grad.clone() for p in gm.parameters() if p.grad is not None]
        nudge(gm, step)
        step += together
    return found, gm


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_selector": "random", "activation_selector": "random"},
        {"weight_selector": "2:4"},
    ],
    ids=["nchw", "random", "2:4"],
)
def test_checkpointing_changes_no_gradient_and_counts_once(
    reentrant: bool, period: int, together: int, options: dict[str, Any]
) -> None:
    sparsity = 0.5 if options.get("weight_selector") == "2:4" else S
    policy = swatfx.swat_u(sparsity, first_dense=False, period=period, **options)
    expected, plain = gradients(policy, steps=8, reentrant=None, together=together)
    found, gm = gradients(policy, steps=8, reentrant=reentrant, together=together)
    assert len(found) == len(expected) > 8
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert gm.swat.clock.iteration == plain.swat.clock.iteration == 8
    for name, value in plain.state_dict().items():
        assert torch.equal(gm.state_dict()[name], value), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("period", [1, 2])
def test_checkpointing_two_forwards_of_one_tensor(reentrant: bool, period: int) -> None:
    # As for a contrastive loss: the two differ by their dropout.
    found: list[list[Tensor]] = []
    for checkpointed in (False, True):
        model = nn.Sequential(nn.Dropout(0.5), net())
        gm = swatfx.compile(model, swatfx.swat_u(S, first_dense=False, period=period))
        torch.manual_seed(8)
        grads: list[Tensor] = []
        for step in range(3):
            x = batch(step).requires_grad_()
            gm.zero_grad()
            if checkpointed:
                outputs = [checkpoint(gm, x, use_reentrant=reentrant) for _ in range(3)]
            else:
                outputs = [gm(x) for _ in range(3)]
            torch.stack(outputs).pow(2).sum().backward()
            grads += [p.grad.clone() for p in gm.parameters() if p.grad is not None]
            nudge(gm, step)
        found.append(grads)
    assert len(found[0]) == len(found[1]) == 18
    # The order in which three gradients are summed is not the plain one.
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_deep_copy_keeps_its_own_time() -> None:
    # Two models see one tensor; the first is recomputed first, at its own iteration.
    options = {"weight_selector": "random", "activation_selector": "random"}
    gm = swatfx.compile(net(), swatfx.swat_u(S, first_dense=False, **options))
    gm(batch(9))
    twin = copy.deepcopy(gm)
    twin(batch(9))
    found: list[list[Tensor]] = []
    for checkpointed in (False, True):
        models = copy.deepcopy([gm, twin])
        x = batch(0).requires_grad_()
        if checkpointed:
            outputs = [checkpoint(m, x, use_reentrant=False) for m in models]
        else:
            outputs = [m(x) for m in models]
        for y in outputs:
            y.pow(2).sum().backward()
        grads = (p.grad for m in models for p in m.parameters())
        found.append([g for g in grads if g is not None])
    assert len(found[0]) == len(found[1]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Blocks(nn.Module):
    """A model that checkpoints its own middle, which therefore stays eager Python."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Conv2d(3, 3, 1)
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.reentrant is None:
            return self.body(x)
        y: Tensor = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return y


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("period", [1, 3])
def test_a_model_that_checkpoints_its_own_blocks(reentrant: bool, period: int) -> None:
    found: list[list[Tensor]] = []
    for mode in (None, reentrant):
        torch.manual_seed(4)
        model = Blocks(mode).double()
        gm = swatfx.compile(model, swatfx.swat_u(S, first_dense=False, period=period))
        grads: list[Tensor] = []
        for step in range(6):
            gm.zero_grad()
            x = batch(step).requires_grad_()
            gm(x).pow(2).sum().backward()
            grads += [p.grad.clone() for p in gm.parameters() if p.grad is not None]
            nudge(gm, step)
        assert gm.swat.clock.iteration == 6
        found.append(grads)
    assert len(found[0]) == len(found[1]) == 48
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
