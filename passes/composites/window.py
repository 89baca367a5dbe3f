"""torchvision's shifted-window attention, taken apart while tracing: its projections are layers.

It calls `F.linear` behind control flow on shapes; what stands between the two projections runs as
ordinary functions on whatever shapes they meet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.composites.common import call


def window_partition(x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """(N, H, W, C) -> (N * windows, window area, C), zero padded and cyclically shifted."""
    _, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    batch, padded_h, padded_w, _ = x.shape
    shift = _effective_shift(padded_h, padded_w, window, shift)
    if sum(shift) > 0:
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    rows, columns = padded_h // window[0], padded_w // window[1]
    x = x.view(batch, rows, window[0], columns, window[1], channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window[0] * window[1], channels)


def _effective_shift(height: int, width: int, window: list[int], shift: list[int]) -> list[int]:
    return [0 if window[i] >= (height, width)[i] else shift[i] for i in (0, 1)]


def window_attend(
    qkv: Tensor,
    x: Tensor,
    bias: Tensor,
    window: list[int],
    shift: list[int],
    heads: int,
    dropout: float,
    training: bool,
    logit_scale: Tensor | None,
) -> Tensor:
    """Attention in each window: (windows, area, 3 C) -> (windows, area, C); `x` gives H and W."""
    windows, area, packed = qkv.shape
    channels = packed // 3
    split = qkv.reshape(windows, area, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    q, k, v = split[0], split[1], split[2]
    if logit_scale is not None:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    else:
        q = q * (channels // heads) ** -0.5
        scores = q.matmul(k.transpose(-2, -1))
    scores = scores + bias
    height = x.shape[1] + -x.shape[1] % window[0]
    width = x.shape[2] + -x.shape[2] % window[1]
    shift = _effective_shift(height, width, window, shift)
    if sum(shift) > 0:
        mask = _region_mask(height, width, window, shift, x)
        scores = scores.view(-1, mask.shape[0], heads, area, area)
        scores = (scores + mask.unsqueeze(1).unsqueeze(0)).view(-1, heads, area, area)
    weights = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=training)
    return weights.matmul(v).transpose(1, 2).reshape(windows, area, channels)


def _region_mask(height: int, width: int, window: list[int], shift: list[int], x: Tensor) -> Tensor:
    """(windows, area, area): -100 between positions that were not neighbours before the roll."""

    def labels(extent: int, size: int, moved: int) -> Tensor:
        at = torch.arange(extent, device=x.device)
        return (at >= extent - size).long() + (at >= extent - moved).long()

    rows, columns = labels(height, window[0], shift[0]), labels(width, window[1], shift[1])
    regions = rows[:, None] * 3 + columns[None, :]
    tiles = regions.view(height // window[0], window[0], width // window[1], window[1])
    flat = tiles.permute(0, 2, 1, 3).reshape(-1, window[0] * window[1])
    apart = flat.unsqueeze(1) != flat.unsqueeze(2)
    return x.new_zeros(apart.shape).masked_fill(apart, -100.0)


def window_merge(windows: Tensor, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """Inverse of `window_partition` for an input like `x`: -> (N, H, W, C)."""
    batch, height, width, _ = x.shape
    padded_h, padded_w = height + -height % window[0], width + -width % window[1]
    channels = windows.shape[-1]
    rows, columns = padded_h // window[0], padded_w // window[1]
    out = windows.view(batch, rows, columns, window[0], window[1], channels)
    out = out.permute(0, 1, 3, 2, 4, 5).reshape(batch, padded_h, padded_w, channels)
    shift = _effective_shift(padded_h, padded_w, window, shift)
    if sum(shift) > 0:
        out = torch.roll(out, shifts=(shift[0], shift[1]), dims=(1, 2))
    return out[:, :height, :width, :].contiguous()


def without_key_bias(bias: Tensor) -> Tensor:
    """A packed (q, k, v) bias whose key part is zero, as cosine attention wants it."""
    third = bias.numel() // 3
    return torch.cat([bias[:third], bias.new_zeros(third), bias[2 * third :]])


def shifted_window_attention(
    tracer: Any,
    input: Any,
    qkv_weight: Any,
    proj_weight: Any,
    relative_position_bias: Any,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Any = None,
    proj_bias: Any = None,
    logit_scale: Any = None,
    training: Any = True,
) -> Any:
    """The graph of torchvision's shifted-window attention, its projections as linear nodes."""
    if logit_scale is not None and qkv_bias is not None:
        qkv_bias = call(tracer, without_key_bias, qkv_bias)
    windows = call(tracer, window_partition, input, window_size, shift_size)
    qkv = F.linear(windows, qkv_weight, qkv_bias)
    seen = call(
        tracer,
        window_attend,
        qkv,
        input,
        relative_position_bias,
        window_size,
        shift_size,
        num_heads,
        attention_dropout,
        training,
        logit_scale,
    )
    out = F.linear(seen, proj_weight, proj_bias)
    out = F.dropout(out, p=dropout, training=training)
    return call(tracer, window_merge, out, input, window_size, shift_size)
