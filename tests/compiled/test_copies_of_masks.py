"""Copies and averages keep masks of whole slices; exported training masks its gradients."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import swatfx

STRUCTURED = [
    "channel",
    "channel-per-filter",
    "input-channel",
    "filter",
    "filter-l2",
    "2:4",
    "block-4x2",
    "nchw",
]


@pytest.mark.parametrize("channels", [6, 16])
@pytest.mark.parametrize("selector", STRUCTURED)
def test_frozen_masks_of_slices_are_kept(selector: str, channels: int) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 32, 3, padding=1)]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    sparsity = 0.5 if selector == "2:4" else 0.7
    policy = f"swat-frozen:{sparsity},hold_from_epoch=1,weight_selector={selector}"
    gm = swatfx.compile(model, policy)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.5)
    swatfx.attach(gm, optimizer, steps_per_epoch=1)
    x = torch.randn(8, 3, 8, 8)
    for _ in range(10):
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()
    twin, average = copy.deepcopy(gm), AveragedModel(gm)
    average.update_parameters(gm)
    for one in (gm, twin, average):
        one.eval()
    want = gm(x)
    torch.testing.assert_close(twin(x), want, atol=0, rtol=0)
    torch.testing.assert_close(average(x), want, atol=1e-6, rtol=1e-5)
    for (name, mine), other in zip(gm.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other), name


def test_a_program_exported_before_growth_masks_its_gradients(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    gm = swatfx.compile(nn.Sequential(*convs, nn.Linear(128, 5)), "rigl:0.8,update_every=3")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    swatfx.attach(gm, optimizer, total_steps=100)
    x = torch.randn(4, 1, 8, 8)
    for step in range(4):
        path = tmp_path / f"{step}.pt2"
        swatfx.export(gm, path, (x,), training=True)
        program = torch.export.load(path).module()
        program(x).square().mean().backward()
        gradient = dict(program.named_parameters())["2.weight"].grad
        assert gradient is not None and int((gradient != 0).sum()) <= 116  # a fifth of 576
        gm.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()
