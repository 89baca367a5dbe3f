"""What the networks of this package have in common: convolutions and their initialisation."""

from __future__ import annotations

from torch import nn


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, bias: bool) -> nn.Conv2d:
    """Return a "same"-padded square convolution (kernel 1 or 3)."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)


def initialise(model: nn.Module) -> None:
    """Set convolutions to He's normal initialisation (fan-out) and their biases to zero.

    Batch norm starts at one and zero and linear layers at PyTorch's default, as constructed.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
