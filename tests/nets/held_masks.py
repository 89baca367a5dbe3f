"""Every method with a schedule of nine steps, and what tests ask of its masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from tests.nets.small_nets import batches, plain, sgd, train

EPOCH, TOTAL = 3, 9  # optimizer steps: three epochs of three
TIMES = {"steps_per_epoch": EPOCH, "total_steps": TOTAL}

# Masks that keep inactive weights at zero, with the steps after which they change.
UPDATES: dict[str, list[int]] = {
    "static": [],
    "set": [3, 6],
    "rigl": [2, 4, 6],
    "snfs": [3, 6],
    "dsr": [2, 4, 6, 8],
    "gradual-magnitude": [2, 4, 6],
}
POLICIES: dict[str, swatfx.Policy] = {
    "static": swatfx.static(0.8),
    "set": swatfx.set_(0.8),
    "rigl": swatfx.rigl(0.8, update_every=2),
    "snfs": swatfx.snfs(0.8),
    "dsr": swatfx.dsr(0.8, update_every=2),
    "gradual-magnitude": swatfx.gradual_magnitude(0.8, update_every=2),
    "soft-filter": swatfx.soft_filter(0.5),
    "swat-frozen": swatfx.swat_frozen(0.8),
    "swat-frozen-active": swatfx.swat_frozen(0.8, update="active", period=2),
    "swat-active-update": swatfx.swat_active_update(0.8),
    "forward-weights": swatfx.forward_weights(0.8),
    "forward-activations": swatfx.forward_activations(0.8),
    "saw": swatfx.saw(0.8),
    "meprop": swatfx.meprop(0.8),
    "swat-u": swatfx.swat_u(0.8),
    "swat-erk": swatfx.swat_erk(0.8),
    "swat-m": swatfx.swat_m(0.8),
}
SEEDED = ["static", "set", "rigl", "snfs", "dsr"]  # masks that are drawn

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
    "sgd without momentum": lambda p: torch.optim.SGD(p, 0.05),
}


def attached(
    policy: swatfx.Policy | str,
    build: Callable[[], nn.Module] = plain,
    make: Make | None = None,
    **times: Any,
) -> tuple[SwatModule, torch.optim.Optimizer]:
    """A compiled network and its optimizer, the same at every call."""
    torch.manual_seed(0)
    gm = swatfx.compile(build(), policy)
    optimizer = sgd(gm) if make is None else make(gm.parameters())
    swatfx.attach(gm, optimizer, **(times or TIMES))
    return gm, optimizer


def steps(gm: SwatModule, optimizer: torch.optim.Optimizer, first: int = 1) -> Any:
    """Train on the same data as ever, from step `first` to the last; yields after each step."""
    for step, x in enumerate(batches(TOTAL), 1):
        if step >= first:
            train(gm, optimizer, [x])
            yield step


def masks_of(gm: SwatModule) -> dict[str, Tensor]:
    return {layer.plan.name: layer.keep().clone() for layer in sparse_layers(gm)}


def active(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(mask, other[name]) for name, mask in one.items())


def assert_inactive_are_zero(gm: SwatModule) -> None:
    for layer in sparse_layers(gm):
        assert not layer.weight[~layer.keep()].any(), layer.plan.name
        assert layer.weight[layer.keep()].any(), layer.plan.name


def moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """What the optimizer remembers of each element of `weight`."""
    state = optimizer.state.get(weight, {})
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == weight.shape
    }
