"""Small networks and steps that several test files share. Inputs are (N, 3, 8, 8) unless said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

torch.set_num_threads(1)


def plain(dropout: float = 0.0) -> nn.Sequential:
    """Three layers without batch norm; a linear one last."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    tail = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Flatten(), *tail, nn.Linear(512, 10))


class Block(nn.Module):
    """A residual block whose shortcut and first convolution read the same tensor."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.down(x))


class Residual(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.block1 = Block(8, 8, 1)
        self.block2 = Block(8, 16, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.relu(self.bn(self.stem(x)))))
        return self.fc(self.drop(self.flatten(self.pool(x))))


class Gate(nn.Module):
    """Looks at values: symbolic tracing has to leave it to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and bool(torch.isfinite(x).all()):
            x = self.a(x).relu()
        return self.b(x)


class EagerMiddle(nn.Module):
    """Untraceable in the middle only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = Gate()
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gate(self.stem(x).relu()).relu().flatten(1))


class EagerRoot(nn.Module):
    """Untraceable at the root, with traceable layers below."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 12 or bool(torch.isnan(x).any()):
            raise ValueError("rows of 12 numbers, please")
        for layer in self.layers:
            x = layer(x).relu()
        return self.fc(x)


class TwoInputs(nn.Module):
    """(N, 3, 8, 8) and (N, 5) -> (N, 4), with two first layers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.vector = nn.Linear(5, 8)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        seen = self.mix(self.image(image).relu()).relu().mean((2, 3))
        return self.head(torch.cat([seen, self.vector(vector).relu()], 1))


class Tied(nn.Module):
    """One weight in two layers, and one layer called twice. (N, 6) -> (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.again = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.again(self.again(x).relu())


def pads() -> nn.Sequential:
    """Every padding mode, string paddings, groups, dilation."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="replicate"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2, padding="same", groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, stride=2),
    )


def batches(count: int, size: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def loss_of(output: Tensor) -> Tensor:
    """A mean, so that halves of a batch average to the whole."""
    return output.float().square().mean() + output.float().mean()


def sgd(module: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), **{"lr": 0.05, "momentum": 0.9} | options)


def train(
    run: Callable[..., Tensor], optimizer: torch.optim.Optimizer, data: list[Tensor]
) -> list[float]:
    losses = []
    for x in data:
        optimizer.zero_grad()
        loss = loss_of(run(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those that no checkpoint holds included."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        same = (
            torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
            if (value.dim())
            else torch.equal(value, other[name])
        )
        assert same, name
