"""VGG-16 for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from swatfx.models.layers import conv, initialise

_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """VGG-16 with batch norm for CIFAR: (N, 3, 32, 32) -> (N, num_classes).

    The VGG-16-D of the paper's sections 4.1 and 4.2. Five halvings bring 32x32 to 1x1, so the
    classifier reads 512 features without an average pool. Convolutions carry a bias although batch
    norm follows: the paper's parameter count comes out only so.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in _VGG16_STAGES:
            for width in stage:
                layers += [conv(channels, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(channels, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        out: Tensor = self.classifier(self.flatten(self.features(x)))
        return out
