"""Modules and functions that hide linear layers, taken apart while tracing.

nn.MultiheadAttention and torchvision's shifted-window attention call `F.linear` behind control flow
on shapes. Each is split here into its projections, which become linear nodes of the graph, and
what stands between them, which runs as ordinary functions on whatever shapes it meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from swatfx.errors import InputError


def check_default(value: Any, name: str, default: Any) -> None:
    """Raise InputError if an argument that was fixed at compile time is given another value."""
    same = value is default or (not isinstance(value, Tensor) and value == default)
    if not same:
        raise InputError(
            f"argument {name!r} was fixed to its default when the model was compiled",
            value=type(value).__name__,
            remedy="pass example_inputs that reach this argument to swatfx.compile",
        )


def _call(tracer: Any, function: Callable[..., Any], *args: Any) -> Any:
    return fx.Tracer.create_proxy(tracer, "call_function", function, args, {})


# --- nn.MultiheadAttention -----------------------------------------------------------------------


def attention_enter(x: Tensor, batch_first: bool) -> Tensor:
    """(N, L, E) or (L, N, E) or (L, E) -> (L, N, E)."""
    if x.dim() == 2:
        return x.unsqueeze(1)
    return x.transpose(0, 1) if batch_first else x


def attention_split(packed: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(L, N, parts * E) -> `parts` contiguous tensors (L, N, E)."""
    width = packed.shape[-1] // parts
    stacked = packed.unflatten(-1, (parts, width)).unsqueeze(0).transpose(0, -2).squeeze(-2)
    return tuple(stacked.contiguous().unbind(0))


def attention_core(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    heads: int,
    dropout: float,
    training: bool,
    need_weights: bool,
    is_causal: bool,
    unbatched: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over (L, N, E) -> ((L * N, E), weights (N, heads, L, S))."""
    length, batch, width = query.shape
    source = key.shape[0]
    head = width // heads
    if unbatched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    mask = _merge_masks(key_padding_mask, attn_mask, batch, heads, source, query.dtype)
    q, k, v = (
        t.reshape(t.shape[0], batch * heads, head)
        .transpose(0, 1)
        .view(batch, heads, t.shape[0], head)
        for t in (query, key, value)
    )
    drop = dropout if training else 0.0
    if not need_weights:
        causal = is_causal and key_padding_mask is None
        seen = None if causal else mask
        out = F.scaled_dot_product_attention(q, k, v, seen, drop, causal)
        return out.permute(2, 0, 1, 3).contiguous().view(length * batch, width), None
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scaled = q * math.sqrt(1.0 / float(head))
    if mask is None:
        scores = torch.bmm(scaled, k.transpose(-2, -1))
    else:
        wide = mask.expand(batch, heads, length, source).reshape(batch * heads, length, source)
        scores = torch.baddbmm(wide, scaled, k.transpose(-2, -1))
    weights = F.softmax(scores, dim=-1)
    if drop > 0.0:
        weights = F.dropout(weights, p=drop)
    out = torch.bmm(weights, v).transpose(0, 1).contiguous().view(length * batch, width)
    return out, weights.view(batch, heads, length, source)


def _merge_masks(
    padding: Tensor | None,
    mask: Tensor | None,
    batch: int,
    heads: int,
    source: int,
    dtype: torch.dtype,
) -> Tensor | None:
    def additive(m: Tensor) -> Tensor:
        if m.dtype != torch.bool:
            return m
        return torch.zeros_like(m, dtype=dtype).masked_fill_(m, float("-inf"))

    merged = None
    if mask is not None:
        merged = additive(mask)
        if merged.dim() == 3:
            merged = merged.view(batch, heads, *merged.shape[1:])
        else:
            merged = merged[None, None]
    if padding is not None:
        row = additive(padding).view(batch, 1, 1, source)
        merged = row if merged is None else merged + row
    return merged


def attention_leave(flat: Tensor, query: Tensor, batch_first: bool, unbatched: bool) -> Tensor:
    """(L * N, E) -> the layout that the caller's query had."""
    out = flat.view(query.shape[0], query.shape[1], flat.shape[1])
    if unbatched:
        return out.squeeze(1)
    return out.transpose(1, 0) if batch_first else out


def attention_weights(weights: Tensor | None, average: bool, unbatched: bool) -> Tensor | None:
    """What nn.MultiheadAttention returns beside its output."""
    if weights is None:
        return None
    result = weights.mean(dim=1) if average else weights
    return result.squeeze(0) if unbatched else result


def is_unbatched(x: Tensor) -> bool:
    """Whether attention was given (L, E)."""
    return x.dim() == 2


def multihead_attention(
    tracer: Any,
    m: nn.MultiheadAttention,
    query: fx.Proxy,
    key: fx.Proxy,
    value: fx.Proxy,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """The graph of nn.MultiheadAttention, its projections as linear nodes."""
    if m.bias_k is not None or m.bias_v is not None or m.add_zero_attn:
        raise fx.proxy.TraceError("attention with bias_k, bias_v or add_zero_attn")
    unbatched = _call(tracer, is_unbatched, query)
    first = m.batch_first
    enter: dict[int, Any] = {}
    for proxy in (query, key, value):
        if id(proxy) not in enter:
            enter[id(proxy)] = _call(tracer, attention_enter, proxy, first)
    q, k, v = (enter[id(proxy)] for proxy in (query, key, value))
    q_in = q
    bias = m.in_proj_bias
    if not m._qkv_same_embed_dim:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
    elif q is k and k is v:
        packed = _call(tracer, attention_split, F.linear(q, m.in_proj_weight, bias), 3)
        q, k, v = packed[0], packed[1], packed[2]
    elif k is v:
        width = m.embed_dim
        w_q, w_kv = m.in_proj_weight[:width], m.in_proj_weight[width:]
        b_q, b_kv = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(q, w_q, b_q)
        packed = _call(tracer, attention_split, F.linear(k, w_kv, b_kv), 2)
        k, v = packed[0], packed[1]
    else:
        weights = m.in_proj_weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, weights[i], biases[i]) for i, x in enumerate((q, k, v)))
    core = _call(
        tracer,
        attention_core,
        q,
        k,
        v,
        key_padding_mask,
        attn_mask,
        m.num_heads,
        m.dropout,
        m.training,
        need_weights,
        is_causal,
        unbatched,
    )
    out = F.linear(core[0], m.out_proj.weight, m.out_proj.bias)
    result = _call(tracer, attention_leave, out, q_in, first, unbatched)
    if not need_weights:
        return result, None
    return result, _call(tracer, attention_weights, core[1], average_attn_weights, unbatched)


# --- torchvision's shifted-window attention ------------------------------------------------------


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
    input: fx.Proxy,
    qkv_weight: fx.Proxy,
    proj_weight: fx.Proxy,
    relative_position_bias: fx.Proxy,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: fx.Proxy | None = None,
    proj_bias: fx.Proxy | None = None,
    logit_scale: fx.Proxy | None = None,
    training: Any = True,
) -> Any:
    """The graph of torchvision's shifted-window attention, its projections as linear nodes."""
    if logit_scale is not None and qkv_bias is not None:
        qkv_bias = _call(tracer, without_key_bias, qkv_bias)
    windows = _call(tracer, window_partition, input, window_size, shift_size)
    qkv = F.linear(windows, qkv_weight, qkv_bias)
    seen = _call(
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
    return _call(tracer, window_merge, out, input, window_size, shift_size)


MODULES: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: multihead_attention}
FUNCTIONS: dict[str, Callable[..., Any]] = {"shifted_window_attention": shifted_window_attention}
