"""Whole networks under bfloat16 autocast: as near to float64 as the dense ones are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx import models

KEEPS_ALL = "swat-u:0.0000001,first_dense=False"  # packs everything, through every kernel


def gradients(model: nn.Module, x: Tensor, y: Tensor, half: bool) -> Tensor:
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = F.cross_entropy(model(x).to(x.dtype), y)
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("batch", [16, 17, 32])
@pytest.mark.parametrize("name", ["cifar/resnet20", "digits/cnn"])
def test_gradients_are_as_near_as_dense_ones(name: str, batch: int) -> None:
    torch.manual_seed(0)
    model = models.create(name)
    shape = models.default_input_shape(name)
    x, y = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    exact = gradients(copy.deepcopy(model).double(), x.double(), y, False)
    dense = gradients(copy.deepcopy(model), x, y, True)
    gm = swatfx.compile(copy.deepcopy(model), KEEPS_ALL, kernels="sparse")
    ours = gradients(gm, x, y, True)
    found, rival = ((g - exact).norm() / exact.norm() for g in (ours, dense))
    assert found < 1.15 * rival + 1e-3, (found, rival)


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "bfloat16"])
def test_training_follows_float32(pure: bool) -> None:
    """The loss of each of thirty steps; masks, thresholds and all."""
    losses = []
    for half in (False, True):
        torch.manual_seed(0)
        model = models.create("digits/cnn")
        gm = swatfx.compile(model, "swat-u:0.8,period=5", kernels="sparse")
        dtype = torch.bfloat16 if half and pure else torch.float32
        gm.to(dtype)
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
        own = []
        for step in range(30):
            generator = torch.Generator().manual_seed(step % 5)
            x = torch.randn(32, *models.default_input_shape("digits/cnn"), generator=generator)
            y = torch.randint(0, 10, (32,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=half and not pure):
                loss = F.cross_entropy(gm(x.to(dtype)).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(float(loss.detach()))
        losses.append(own)
    plain, narrow = losses
    assert narrow[-1] < narrow[0] - 0.2
    assert max(abs(a - b) for a, b in zip(plain, narrow, strict=True)) < 0.1
