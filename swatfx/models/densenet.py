"""Densely connected networks for CIFAR."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swatfx.models.layers import conv, initialise


class _DenseLayer(nn.Module):
    """Bottleneck layer of a DenseNet: (N, C, H, W) -> (N, C + growth, H, W)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = conv(4 * growth, growth, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with `growth` new channels behind it, (N, C + growth, H, W)."""
        new = self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x))))))
        return torch.cat((x, new), 1)


class DenseNet(nn.Module):
    """DenseNet for CIFAR, DenseNet-BC: (N, 3, 32, 32) -> (N, num_classes).

    The paper's (section 4.1) has bottlenecks, compression 1/2 and growth 32. `layers` counts the
    dense layers of each stage.
    """

    def __init__(self, layers: tuple[int, ...], num_classes: int = 10, growth: int = 32) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = conv(3, channels, 3, bias=False)
        stages: list[nn.Module] = []
        for index, count in enumerate(layers):
            stage: list[nn.Module] = []
            for _ in range(count):
                stage.append(_DenseLayer(channels, growth))
                channels += growth
            if index < len(layers) - 1:
                stage += [
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    conv(channels, channels // 2, 1, bias=False),
                    nn.AvgPool2d(2),
                ]
                channels //= 2
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        out = self.relu(self.bn(self.stages(self.conv1(x))))
        logits: Tensor = self.fc(self.flatten(self.pool(out)))
        return logits
