"""Models that refuse inputs, and models that swallow errors.

Apart from the tests: pytest rewrites the assertions of test files, whose bytecode is not a model's.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Guards(nn.Module):
    """Refuses inputs in every usual way; the layers between see a graph all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2, f"got {x.dim()} dimensions"
        if x.shape[1] != self.a.in_features:
            raise ValueError(f"wants {self.a.in_features}, got {x.shape[1]}")
        x = self.a(x)
        if x.shape[0] == 0 or x.shape[0] > 9:
            raise RuntimeError("batch")
        assert x.shape[0] > 1 and x.shape[0] != 7
        if not x.shape[0] < 6:
            raise IndexError
        torch._assert(x.shape[0] != 5, "five")
        return self.b(x)


class Base(nn.Module):
    """A linear layer around whatever a subclass does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.factor(x)

    def factor(self, x: Tensor) -> Any:
        raise NotImplementedError


class CaughtRaise(Base):
    def factor(self, x: Tensor) -> Any:
        try:
            if x.shape[0] > 1:
                raise ValueError
        except ValueError:
            return 2
        return 1


class SwallowedBool(Base):
    def factor(self, x: Tensor) -> Any:
        try:
            return 3 if x.sum() < 1e9 else 2
        except Exception:
            return 1


class SwallowedLength(Base):
    def factor(self, x: Tensor) -> Any:
        try:
            return len(x)
        except (TypeError, RuntimeError, ValueError):
            return 1


class SwallowedInt(Base):
    def factor(self, x: Tensor) -> Any:
        try:
            return int(x.shape[0])
        except (TypeError, ValueError):
            return 1


class SwallowedLoop(Base):
    def factor(self, x: Tensor) -> Any:
        try:
            return sum(row.shape[0] for row in x)
        except Exception:
            return 1


class SwallowedType(Base):
    def factor(self, x: Tensor) -> Any:
        try:
            return 2 if isinstance(x, Tensor) else 3
        except Exception:
            return 1


SWALLOWERS = [
    CaughtRaise,
    SwallowedBool,
    SwallowedLength,
    SwallowedInt,
    SwallowedLoop,
    SwallowedType,
]
