"""torchvision's shifted-window attention, taken apart while tracing: its projections are layers.

It calls `F.linear` behind control flow on shapes; what stands between the two projections runs as
ordinary functions on whatever shapes they meet. `*S` is (H, W), or (T, H, W) of a video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.tracing.composites.common import call
from swatfx.compiled import Heads

Sizes = Sequence[int]


def _padded(x: Tensor, window: Sizes) -> list[int]:
    return [size + -size % extent for size, extent in zip(x.shape[1:-1], window, strict=True)]


def _moved(padded: Sizes, window: Sizes, shift: Sizes) -> list[int]:
    """The shift, where there is more than one window to shift between."""
    return [
        0 if extent >= size else by for size, extent, by in zip(padded, window, shift, strict=True)
    ]


def _split(x: Tensor, window: Sizes) -> Tensor:
    """(N, *S, C) -> (N * windows, window volume, C), for sizes that windows divide."""
    batch, *sizes, channels = x.shape
    pairs = [n for s, w in zip(sizes, window, strict=True) for n in (s // w, w)]
    rank = len(window)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    tiles = x.view(batch, *pairs, channels).permute(order)
    return tiles.reshape(-1, math.prod(window), channels)


def window_partition(x: Tensor, window: Sizes, shift: Sizes) -> Tensor:
    """(N, *S, C) -> (N * windows, window volume, C), zero padded and cyclically shifted."""
    padded = _padded(x, window)
    missing = [p - s for p, s in zip(padded, x.shape[1:-1], strict=True)]
    x = F.pad(x, (0, 0, *(n for after in reversed(missing) for n in (0, after))))
    moved = _moved(padded, window, shift)
    if sum(moved) > 0:
        x = torch.roll(x, shifts=[-by for by in moved], dims=list(range(1, x.dim() - 1)))
    return _split(x, window)


def window_attend(
    qkv: Tensor,
    x: Tensor,
    bias: Tensor,
    window: Sizes,
    shift: Sizes,
    heads: int,
    dropout: float,
    training: bool,
    logit_scale: Tensor | None,
) -> Tensor:
    """Attention in each window: (windows, volume, 3 C) -> (windows, volume, C); `x` gives *S."""
    q, k, v = _in_heads(qkv, heads)
    volume = q.shape[-2]
    if logit_scale is not None:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    else:
        q = q * q.shape[-1] ** -0.5
        scores = q.matmul(k.transpose(-2, -1))
    scores = scores + bias
    mask = _mask(x, window, shift)
    if mask is not None:
        scores = scores.view(-1, mask.shape[0], heads, volume, volume)
        scores = (scores + mask.unsqueeze(1).unsqueeze(0)).view(-1, heads, volume, volume)
    weights = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=training)
    return _joined(weights.matmul(v))


def window_heads(
    qkv: Tensor,
    x: Tensor,
    bias: Tensor,
    window: Sizes,
    shift: Sizes,
    heads: int,
    dropout: float,
    training: bool,
    logit_scale: Tensor | None,
) -> Heads | None:
    """What `window_attend` is as one op; None where it is more than that."""
    if logit_scale is not None:
        return None
    three, drop = _in_heads(qkv, heads), dropout if training else 0.0
    return Heads(*three, bias, _mask(x, window, shift), _joined, dropout=drop)


def _in_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(windows, volume, 3 C) -> query, key and value, (windows, heads, volume, C / heads) each."""
    windows, volume, packed = qkv.shape
    split = qkv.reshape(windows, volume, 3, heads, packed // 3 // heads).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def _joined(out: Tensor) -> Tensor:
    """(windows, heads, volume, C / heads) -> (windows, volume, C)."""
    return out.transpose(1, 2).flatten(2)


def _mask(x: Tensor, window: Sizes, shift: Sizes) -> Tensor | None:
    """What shifted windows add to scores, (windows of an image, volume, volume), or None."""
    padded = _padded(x, window)
    moved = _moved(padded, window, shift)
    return _region_mask(padded, window, moved, x) if sum(moved) > 0 else None


def _region_mask(sizes: Sizes, window: Sizes, moved: Sizes, x: Tensor) -> Tensor:
    """(windows, volume, volume): -100 between positions that were not neighbours before."""
    regions = torch.zeros([1] * len(sizes), dtype=torch.long, device=x.device)
    for dim, (size, extent, by) in enumerate(zip(sizes, window, moved, strict=True)):
        at = torch.arange(size, device=x.device)
        label = (at >= size - extent).long() + (at >= size - by).long()
        shape = [1] * len(sizes)
        shape[dim] = size
        regions = regions * 3 + label.view(shape)
    flat = _split(regions[None, ..., None], window).squeeze(-1)
    apart = flat.unsqueeze(1) != flat.unsqueeze(2)
    return x.new_zeros(apart.shape).masked_fill(apart, -100.0)


def window_merge(windows: Tensor, x: Tensor, window: Sizes, shift: Sizes) -> Tensor:
    """Inverse of `window_partition` for an input like `x`: -> (N, *S, C)."""
    padded, rank = _padded(x, window), len(window)
    counts = [p // w for p, w in zip(padded, window, strict=True)]
    out = windows.view(x.shape[0], *counts, *window, windows.shape[-1])
    order = [0, *(n for i in range(rank) for n in (1 + i, 1 + rank + i)), 2 * rank + 1]
    out = out.permute(order).reshape(x.shape[0], *padded, windows.shape[-1])
    moved = _moved(padded, window, shift)
    if sum(moved) > 0:
        out = torch.roll(out, shifts=moved, dims=list(range(1, rank + 1)))
    return out[(slice(None), *(slice(size) for size in x.shape[1:-1]))].contiguous()


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
    window_size: Any,
    num_heads: int,
    shift_size: Any,
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


def shifted_window_attention_3d(tracer: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for video; it has no logit scale, so `training` comes one place earlier."""
    if len(args) > 11:
        kwargs["training"] = args[11]
    return shifted_window_attention(tracer, *args[:11], **kwargs)
