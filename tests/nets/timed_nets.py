"""Callables for `swatfx bench package.module:callable`, and rounds whose figures are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swatfx.timing.records import LayerTime


class Reader(nn.Module):
    """Integer tokens (N, T), and which of them count, to (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.wide = nn.Linear(32, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return self.head(torch.relu(self.wide(x)).mean(1))


def reader() -> nn.Module:
    return Reader()


def with_inputs() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Reader(), {"ids": torch.randint(50, (4, 6)), "mask": torch.ones(4, 6)}


def with_loss() -> tuple[Any, ...]:
    model, inputs = with_inputs()
    return model, (inputs["ids"],), lambda output: output.logsumexp(1).sum()


def with_a_list() -> list[nn.Module]:
    return [Reader()]


def with_no_loss() -> tuple[Any, ...]:
    return Reader(), torch.zeros(1), 3


def failing() -> nn.Module:
    raise RuntimeError("out of\nluck")


def layer(name: str, seconds: float, dense: float | None) -> LayerTime:
    return LayerTime(name, "conv2d", (8, 8), seconds, dense_seconds=dense, kernels="sparse")


def span(low: float, median: float, high: float) -> dict[str, float]:
    """A spread whose quartiles lie half-way."""
    return {
        "median": median,
        "minimum": low,
        "maximum": high,
        "lower_quartile": (low + median) / 2,
        "upper_quartile": (median + high) / 2,
        "iqr": (high - low) / 2,
        "count": 5,
    }
