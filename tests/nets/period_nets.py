"""One float64 network, its batches and a stand-in for an optimizer: tests of thresholds in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).double()


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)


def nudge(model: nn.Module, seed: int) -> None:
    """Move all weights, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.std()
