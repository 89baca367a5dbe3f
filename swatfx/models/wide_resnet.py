"""Wide residual networks for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from swatfx.models.layers import conv, initialise


class _WideBlock(nn.Module):
    """Pre-activation block of a wide ResNet: (N, C, H, W) -> (N, F, H / stride, W / stride).

    Where the shape changes, the shortcut is a 1x1 convolution of the normalised, rectified input
    (the tensor that the first 3x3 convolution reads too), not of the raw input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(inputs, outputs, 3, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(outputs, outputs, 3, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return residual plus shortcut, (N, F, H / stride, W / stride)."""
        active = self.relu1(self.bn1(x))
        residual: Tensor = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(active)))))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        return residual + shortcut


class WideResNet(nn.Module):
    """Wide ResNet for CIFAR, WRN-depth-width: (N, 3, 32, 32) -> (N, num_classes).

    WRN-16-8 and WRN-28-10 are the paper's (section 4.1 and appendix table 6).
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, dropout: float = 0.3) -> None:
        super().__init__()
        # depth counts the stem, three shortcuts, and two convolutions a block in three stages
        blocks = (depth - 4) // 6
        channels = 16
        self.conv1 = conv(3, channels, 3, bias=False)
        stages: list[nn.Module] = []
        for index, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            stage: list[nn.Module] = []
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(_WideBlock(channels, outputs, stride, dropout))
                channels = outputs
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(self.flatten(self.pool(self.relu(self.bn(out)))))
        return logits
