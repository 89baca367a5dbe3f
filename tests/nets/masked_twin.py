"""A network under held masks, and the dense one on masked weights, with the same gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32)),
    )


def step(gm: nn.Module, x: Tensor, half: bool) -> None:
    gm.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = gm(x).float().square().mean()
    loss.backward()


def assert_masked_gradients(gm: SwatModule, x: Tensor, half: bool) -> int:
    """That the gradients of `step(gm, x, half)` are the masked ones of the dense network on masked
    weights: in float64, or as near to it as dense autocast is.

    Returns:
        How many active weights that are zero have a gradient.
    """
    keeps = {layer.plan.name: layer.keep() for layer in sparse_layers(gm)}
    gradients = {}
    for wide in (True, False):
        twin = network().double() if wide else network()
        twin.load_state_dict({k: v for k, v in gm.state_dict().items() if "swat." not in k})
        for name, keep in keeps.items():
            twin.get_submodule(name).weight.data.mul_(keep)
        step(twin, x.double() if wide else x, half and not wide)
        gradients[wide] = {n: p.grad for n, p in twin.named_parameters()}
    grown = 0
    for name, parameter in gm.named_parameters():
        keep = keeps.get(name.removesuffix(".weight"), torch.tensor(True))
        true = gradients[True][name] * keep
        assert parameter.grad is not None
        off = (parameter.grad - true).norm() / true.norm()
        dense_off = (gradients[False][name] * keep - true).norm() / true.norm()
        assert off <= (2 * dense_off + 2e-3 if half else 1e-4), (name, off, dense_off)
        if name.removesuffix(".weight") in keeps:
            assert (parameter.grad[~keep] == 0).all()
            grown += int(((parameter == 0) & keep & (parameter.grad != 0)).sum())
    return grown
