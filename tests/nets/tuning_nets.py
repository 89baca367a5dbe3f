"""Batches and compiled nets that the tests of tuning share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import swatfx
from swatfx.compiled.layers import sparse_layers
from tests.nets.small_nets import Residual

META = torch.empty(4, 3, 8, 8, device="meta")
Batch = tuple[Tensor, Tensor]


def images(count: int = 3, size: int = 4, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def compiled(policy: str = "swat-u:0.9,first_dense=False", net: Any = Residual) -> Any:
    torch.manual_seed(0)
    model = net()
    return model, swatfx.compile(model, policy)


def layers_of(gm: Any) -> dict[str, Any]:
    return {layer.plan.name: layer for layer in sparse_layers(gm)}
