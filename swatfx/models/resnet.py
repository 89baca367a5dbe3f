"""Residual networks for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from swatfx.models.layers import conv, initialise


class _ResidualBlock(nn.Module):
    """Residual block: (N, C, H, W) -> (N, F, H / stride, W / stride).

    `kernels` gives the main path: (3, 3) is the basic block; (1, 3, 1) the bottleneck, whose inner
    width is F / 4. The stride is on the first 3x3 convolution in both.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, kernels: tuple[int, ...], bias: bool
    ) -> None:
        super().__init__()
        inner = outputs if len(kernels) == 2 else outputs // 4
        strided = kernels.index(3)
        layers: list[nn.Module] = []
        channels = inputs
        for index, kernel in enumerate(kernels):
            last = index == len(kernels) - 1
            width = outputs if last else inner
            step = stride if index == strided else 1
            layers += [conv(channels, width, kernel, step, bias=bias), nn.BatchNorm2d(width)]
            if not last:
                layers.append(nn.ReLU())
            channels = width
        self.residual = nn.Sequential(*layers)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, outputs, 1, stride, bias=bias), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified sum of residual and shortcut, (N, F, H / stride, W / stride)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out: Tensor = self.relu(self.residual(x) + shortcut)
        return out


class ResNet(nn.Module):
    """ResNet for CIFAR, 3x3 stem and no max-pool: (N, 3, 32, 32) -> (N, num_classes).

    `blocks` and `widths` give each stage's number of blocks and output channels, `kernels` the main
    path of a block, `stem` the first convolution's channels. `bias` puts a bias on every
    convolution, shortcuts included: the parameter counts of the paper's ResNet-18, 50 and 101
    (section 4.1) come out only so.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        kernels: tuple[int, ...],
        stem: int,
        bias: bool,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = conv(3, stem, 3, bias=bias)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        channels = stem
        stages: list[nn.Module] = []
        for index, (count, outputs) in enumerate(zip(blocks, widths, strict=True)):
            stage: list[nn.Module] = []
            for block in range(count):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(_ResidualBlock(channels, outputs, stride, kernels, bias))
                channels = outputs
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        out = self.stages(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(self.flatten(self.pool(out)))
        return logits
