"""nn.MultiheadAttention, taken apart while tracing: its projections are layers.

What stands between the projections runs as ordinary functions, on whatever shapes and masks they
meet. Layouts: L target length, S source length, N batch, E width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.tracing.composites.common import additive, call
from swatfx.compiled import Heads
from swatfx.errors import InputError


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


def attention_gather(query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> Tensor:
    """What one packed projection reads: the tensor if all three are it, else all rows in turn.

    For attention whose caller is eager code: only at run time is it known whether query, key and
    value are one tensor. Where they are not, rows are projected that no one reads.
    """
    distinct = {id(x): x for x in (query, key, value)}
    entered = [attention_enter(x, batch_first) for x in distinct.values()]
    return entered[0] if len(entered) == 1 else torch.cat([x.flatten(0, 1) for x in entered])


def attention_scatter(
    packed: Tensor, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
) -> tuple[Tensor, ...]:
    """Query, key and value projections (L, N, E) out of what `attention_gather` had projected."""
    if query is key and key is value:
        return attention_split(packed, 3)
    width = packed.shape[-1] // 3
    start = 0
    rows: dict[int, Tensor] = {}
    for x in (query, key, value):
        if id(x) not in rows:
            length, batch = attention_enter(x, batch_first).shape[:2]
            rows[id(x)] = packed[start : start + length * batch].view(length, batch, 3 * width)
            start += length * batch
    return tuple(
        rows[id(x)][..., i * width : (i + 1) * width].contiguous()
        for i, x in enumerate((query, key, value))
    )


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
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over (L, N, E) -> ((L * N, E), weights (N, heads, L, S))."""
    seen = _heads(
        *(query, key, value, key_padding_mask, attn_mask, heads, dropout if training else 0.0),
        *(need_weights, is_causal, unbatched, bias_k, bias_v, add_zero_attn),
    )
    q, k, v, merged, drop = seen.query, seen.key, seen.value, seen.mask, seen.dropout
    if not need_weights:
        out = F.scaled_dot_product_attention(q, k, v, merged, drop, seen.causal)
        return _joined(out), None
    batch, length, source, head = q.shape[0], q.shape[2], k.shape[2], q.shape[3]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scaled = q * math.sqrt(1.0 / float(head))
    if merged is None:
        scores = torch.bmm(scaled, k.transpose(-2, -1))
    else:
        wide = merged.expand(batch, heads, length, source).reshape(batch * heads, length, source)
        scores = torch.baddbmm(wide, scaled, k.transpose(-2, -1))
    weights = F.softmax(scores, dim=-1)
    if drop > 0.0:
        weights = F.dropout(weights, p=drop)
    out = torch.bmm(weights, v).transpose(0, 1).contiguous().view(length * batch, heads * head)
    return out, weights.view(batch, heads, length, source)


def attention_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    heads: int,
    dropout: float,
    training: bool,
    need_weights: bool,
    *rest: Any,
) -> Heads | None:
    """What `attention_core` is as one op; None where it is of another result."""
    if need_weights:
        return None
    drop = dropout if training else 0.0
    masks = key_padding_mask, attn_mask
    return _heads(query, key, value, *masks, heads, drop, need_weights, *rest)


def _heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    heads: int,
    dropout: float,
    need_weights: bool,
    is_causal: bool,
    unbatched: bool,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
) -> Heads:
    """What `attention_core` computes with, its result as it has it without weights."""
    if is_causal and attn_mask is None:
        raise InputError("attention with is_causal=True wants an attn_mask")
    _, batch, width = query.shape
    if unbatched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    causal = bool(is_causal) and key_padding_mask is None and not need_weights
    padding = None if key_padding_mask is None else additive(key_padding_mask, query.dtype)
    mask = None if causal or attn_mask is None else additive(attn_mask, query.dtype)
    extra = []
    if bias_k is not None and bias_v is not None:
        extra.append((bias_k.repeat(1, batch, 1), bias_v.repeat(1, batch, 1)))
    if add_zero_attn:
        extra.append((key.new_zeros(1, batch, width), value.new_zeros(1, batch, width)))
    for more_key, more_value in extra:
        key, value = torch.cat([key, more_key]), torch.cat([value, more_value])
        padding = None if padding is None else F.pad(padding, (0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))
    merged = _merge(padding, mask, batch, heads, key.shape[0])
    q, k, v = (_in_heads(t, heads) for t in (query, key, value))
    return Heads(q, k, v, None, merged, _finished, causal, None, dropout)


def _finished(out: Tensor) -> tuple[Tensor, None]:
    return _joined(out), None


def _in_heads(x: Tensor, heads: int) -> Tensor:
    """(L, N, E) -> (N, heads, L, E / heads)."""
    length, batch, width = x.shape
    rows = x.reshape(length, batch * heads, width // heads).transpose(0, 1)
    return rows.view(batch, heads, length, width // heads)


def _joined(out: Tensor) -> Tensor:
    """(N, heads, L, E / heads) -> (L * N, E)."""
    batch, heads, length, head = out.shape
    return out.permute(2, 0, 1, 3).contiguous().view(length * batch, heads * head)


def _merge(
    padding: Tensor | None, mask: Tensor | None, batch: int, heads: int, source: int
) -> Tensor | None:
    merged = mask
    if mask is not None:
        split = mask.dim() == 3
        merged = mask.view(batch, heads, *mask.shape[1:]) if split else mask[None, None]
    if padding is not None:
        row = padding.view(batch, 1, 1, source)
        merged = row if merged is None else merged + row
    return merged


def attention_leave(flat: Tensor, query: Tensor, batch_first: bool) -> Tensor:
    """(L * N, E) -> the layout of the caller's `query`."""
    if query.dim() == 2:
        return flat.view(query.shape[0], 1, flat.shape[1]).squeeze(1)
    batch, length = query.shape[:2] if batch_first else (query.shape[1], query.shape[0])
    out = flat.view(length, batch, flat.shape[1])
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
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: Any = True,
    attn_mask: Any = None,
    average_attn_weights: Any = True,
    is_causal: Any = False,
) -> tuple[Any, Any]:
    """The graph of nn.MultiheadAttention, its projections as linear nodes.

    All arguments but the module may be values known only at run time.
    """
    unbatched = call(tracer, is_unbatched, query)
    q, k, v = _projections(tracer, m, query, key, value)
    core = call(
        tracer,
        attention_core,
        *(q, k, v, key_padding_mask, attn_mask, m.num_heads, m.dropout, m.training),
        *(need_weights, is_causal, unbatched),
        *((m.bias_k, m.bias_v, m.add_zero_attn) if m.add_zero_attn or m.bias_k is not None else ()),
    )
    out = F.linear(core[0], m.out_proj.weight, m.out_proj.bias)
    result = call(tracer, attention_leave, out, query, m.batch_first)
    if need_weights is False:
        return result, None
    return result, call(tracer, attention_weights, core[1], average_attn_weights, unbatched)


def _projections(
    tracer: Any, m: nn.MultiheadAttention, query: Any, key: Any, value: Any
) -> tuple[Any, Any, Any]:
    bias = m.in_proj_bias
    if m._qkv_same_embed_dim and tracer.is_caller_eager(m):
        rows = call(tracer, attention_gather, query, key, value, m.batch_first)
        packed = F.linear(rows, m.in_proj_weight, bias)
        split = call(tracer, attention_scatter, packed, query, key, value, m.batch_first)
        return split[0], split[1], split[2]
    enter: dict[int, Any] = {}
    for proxy in (query, key, value):
        if id(proxy) not in enter:
            enter[id(proxy)] = call(tracer, attention_enter, proxy, m.batch_first)
    q, k, v = (enter[id(proxy)] for proxy in (query, key, value))
    if m._qkv_same_embed_dim and q is k and k is v:
        packed = call(tracer, attention_split, F.linear(q, m.in_proj_weight, bias), 3)
        return packed[0], packed[1], packed[2]
    if m._qkv_same_embed_dim and k is v:
        width = m.embed_dim
        w_q, w_kv = m.in_proj_weight[:width], m.in_proj_weight[width:]
        b_q, b_kv = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(q, w_q, b_q)
        packed = call(tracer, attention_split, F.linear(k, w_kv, b_kv), 2)
        return q, packed[0], packed[1]
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    weights: Any = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    if m._qkv_same_embed_dim:
        weights = m.in_proj_weight.chunk(3)
    q, k, v = (F.linear(x, weights[i], biases[i]) for i, x in enumerate((q, k, v)))
    return q, k, v
