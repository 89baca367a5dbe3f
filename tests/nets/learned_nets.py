"""Compiled models with learned thresholds, and their training without `swatfx.attach`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.learned import add_penalty, learned_thresholds, reset_if_empty
from swatfx.compiled.module import SwatModule
from tests.nets.small_nets import loss_of, plain

torch.set_num_threads(1)
# Without a penalty of its own, so that it trains without `swatfx.attach`: see `fit`.
POLICY = swatfx.Policy("dst", weight_selector="learned", backward_activation=False)
PENALTY = 0.02


def compiled(build: Callable[[], nn.Module] = plain, **options: Any) -> SwatModule:
    torch.manual_seed(0)
    return swatfx.compile(build(), POLICY, **options)


def moved(build: Callable[[], nn.Module] = plain) -> SwatModule:
    """With thresholds that leave out about half of the weights."""
    gm = compiled(build)
    for layer in sparse_layers(gm):
        threshold = layer.weight_threshold.threshold.detach()
        medians = layer.weight.detach().abs().flatten(1).median(1).values
        threshold.copy_(medians.view_as(threshold))
    reset_if_empty(gm)
    return gm


def fit(
    gm: SwatModule,
    optimizer: torch.optim.Optimizer,
    data: list[Tensor],
    weight: float = PENALTY,
    run: Callable[..., Tensor] | None = None,
) -> list[float]:
    """Train as the hooks of `swatfx.attach` would."""
    losses = []
    for x in data:
        optimizer.zero_grad()
        loss = loss_of((gm if run is None else run)(x))
        loss.backward()
        add_penalty(gm, weight)
        optimizer.step()
        reset_if_empty(gm)
        losses.append(loss.item())
    return losses


def densities(gm: SwatModule) -> list[float]:
    return [layer.weight_density.value for layer in sparse_layers(gm)]


def mean_threshold(gm: SwatModule) -> float:
    return float(torch.cat([m.threshold.detach().flatten() for m in learned_thresholds(gm)]).mean())
