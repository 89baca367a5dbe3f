"""A small network for scikit-learn's digits."""

from __future__ import annotations

from torch import Tensor, nn

from swatfx.models.layers import conv, initialise


class DigitsCNN(nn.Module):
    """Four-convolution network for scikit-learn's digits: (N, 1, 8, 8) -> (N, num_classes).

    Not in the paper: small enough to train to the end in seconds on a CPU, for tests and examples.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for index, outputs in enumerate((width, width, 2 * width, 2 * width)):
            if index == 2:
                layers.append(nn.MaxPool2d(2))
            layers += [conv(channels, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, num_classes)."""
        logits: Tensor = self.fc(self.flatten(self.pool(self.features(x))))
        return logits
