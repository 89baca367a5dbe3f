"""A convolution traced from within: as a root, or as a user's subclass of nn.Conv without forward.

Its forward would pad before it convolves, and Top-K would rank the padding. One node keeps the two
together, so that the layer's activation is what its caller gave.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.tracing.composites.common import call

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def padded_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: Any,
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
    pad: list[int],
) -> Tensor:
    """Pad by `pad` (in `F.pad` order) in a mode other than zeros, then convolve without padding.

    `padding` is what the module was given; it says the same as `pad`, for analysis.
    """
    conv = _CONV[weight.dim() - 2]
    return conv(F.pad(input, pad, mode=padding_mode), weight, bias, stride, 0, dilation, groups)


def convolution(tracer: Any, m: Any, input: fx.Proxy) -> Any:
    """The graph of nn.Conv1d, nn.Conv2d or nn.Conv3d."""
    if m.padding_mode == "zeros":
        return type(m).forward(m, input)
    pad = list(m._reversed_padding_repeated_twice)
    options = (m.stride, m.padding, m.dilation, m.groups, m.padding_mode, pad)
    return call(tracer, padded_conv, input, m.weight, m.bias, *options)


CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
