"""`swatfx::attention` and its backward: attention that keeps neither its weights nor its result.

Torch's fused kernel keeps query, key, value and the result, which is kept once more, packed, by the
layer that reads it; written out, attention keeps its weights. Here backward computes both anew from
query, key and value, as they are or, with `norm_saves`, from codes (`swatfx.ops.codes`); of dropout
a bit a weight is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from swatfx.errors import InputError
from swatfx.ops.autocast import register_autocast
from swatfx.ops.calls import AttentionCall, schema_of
from swatfx.ops.codes import BITS, decode_flat, encode_lines, flat_bytes, line_bytes
from swatfx.ops.saved import bits_size, no_double_backward, once_only
from swatfx.tensors import bits, layouts

aten = torch.ops.aten
_FLASH = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale query key^T + bias + mask) value, of weights that dropout left.

    Under autocast query, key, value and mask are in its dtype, as torch's fused attention has it.

    Args:
        query: (N, H, L, D).
        key: (N, H, S, D).
        value: (N, H, S, D).
        bias: what (N, H, L, S) can be added to, learned; None: torch's own attention runs.
        mask: bool, true where a position is seen, or numbers that are added to scores; of four
            dimensions, or two, that (N, H, L, S) can be added to. (W, L, S): numbers, added in turn
            to W neighbours of the N. Or None.
        options: fields of `swatfx.ops.calls.AttentionCall`.

    Returns:
        out: (N, H, L, D).
        code: uint8 [bytes]: codes of query, key and value, each up to a whole number of 64 bytes;
            with "exact" nothing.
        dropped: uint8 [ceil(N * H * L * S / 8)], weights that are left; without dropout nothing.
    """
    call = AttentionCall(*options)
    with torch._C._DisableAutocast():
        out, weights = _attend(query, key, value, bias, mask, call)
    code, dropped = (query.new_empty(0, dtype=torch.uint8) for _ in range(2))
    if call.saves in BITS:
        code = torch.cat([encode_lines(x.reshape(-1), call.saves) for x in (query, key, value)])
    if weights is not None:
        # A weight that is zero anyway has no gradient, dropped or not.
        dropped = bits.mask_to_bits(weights != 0)
    # What a fused kernel returns may be a view, which an op does not.
    return out.clone() if out._is_view() else out, code, dropped


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    call: AttentionCall,
) -> tuple[Tensor, Tensor | None]:
    """The result, and weights behind dropout, where there is any: all as eager has it."""
    if _is_torchs(bias, mask):
        told = call.dropout, call.causal
        if not call.dropout:
            fused = F.scaled_dot_product_attention(query, key, value, mask, *told, scale=call.scale)
            return fused, None
        added = None if mask is None else _additive(mask, query.dtype)
        three = query, key, value
        found = aten._scaled_dot_product_attention_math(*three, added, *told, scale=call.scale)
        return found[0], found[1]
    weights = _weights(query * call.scale_of(query), key, bias, mask, call)
    weights = F.dropout(weights, call.dropout) if call.dropout else weights
    return weights.to(value.dtype).matmul(value), weights if call.dropout else None


def _is_torchs(bias: Tensor | None, mask: Tensor | None) -> bool:
    """Whether it is what `F.scaled_dot_product_attention` computes."""
    return bias is None and (mask is None or mask.dim() != 3)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores."""
    if mask.dtype is not torch.bool:
        return mask
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _weights(
    scaled: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, call: AttentionCall
) -> Tensor:
    scores = scaled.matmul(key.transpose(-2, -1))
    scores = scores if bias is None else scores + bias
    if mask is not None and mask.dim() == 3:
        shape = scores.shape
        split = scores.view(-1, mask.shape[0], *shape[1:]) + mask.unsqueeze(1).unsqueeze(0)
        scores = split.view(shape)
    elif mask is not None:
        scores = scores + _additive(mask, scores.dtype)
    if call.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
        scores = scores.masked_fill(~seen, -torch.inf)
    # Torch's own attention hands out zeros where a position sees nothing.
    own = bias is None and (mask is not None or call.causal)
    return torch._safe_softmax(scores, -1) if own else F.softmax(scores, dim=-1)


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask"
# With dropout nothing may run it twice for one value, or share one value between two.
attention = torch.library.custom_op(
    "swatfx::attention",
    attention_reference,
    mutates_args=(),
    schema=schema_of(_TENSORS, AttentionCall, "(Tensor, Tensor, Tensor)"),
    tags=(torch.Tag.nondeterministic_seeded,),
)


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *options: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionCall(*options, **named)
    if _is_torchs(bias, mask):
        told = mask, call.dropout, call.causal
        out = F.scaled_dot_product_attention(query, key, value, *told, scale=call.scale)
        out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
    else:
        out = query.new_empty(query.shape)
    size = 0
    if call.saves in BITS:
        size = sum(line_bytes(x.numel(), call.saves) for x in (query, key, value))
    dropped = bits_size(query.shape[:-1].numel() * key.shape[-2]) if call.dropout else 0
    code = query.new_empty(size, dtype=torch.uint8)
    return out, code, query.new_empty(dropped, dtype=torch.uint8)


def attention_backward_reference(
    grad: Tensor,
    code: Tensor,
    dropped: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    shapes: Sequence[int],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::attention` for query, key, value and bias (empty without one).

    Args:
        grad: of the result.
        code: as forward returned it; so is dropped.
        dropped: likewise.
        query: as forward got it, or None where it is in codes; so are key and value.
        key: likewise.
        value: likewise.
        bias: as forward got it; so is mask.
        mask: likewise.
        shapes: of query and of key.
        options: as forward was told.
    """
    call = AttentionCall(*options)
    sizes = [list(shapes[:4]), *[list(shapes[4:])] * 2]
    if query is None or key is None or value is None:
        query, key, value = _decoded(code, sizes, call.saves, grad.dtype)
    with torch._C._DisableAutocast():
        if _is_torchs(bias, mask) and _runs_fused(query, key, value, mask, call):
            of_three = _fused_backward(grad, query, key, value, mask, call)
            return *of_three, grad.new_empty(0)
        return _backward_in_steps(grad, dropped, query, key, value, bias, mask, call)


def _fused_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's kernel, which wants its result and what its softmax divided by: anew."""
    three = query, key, value
    told = {
        "attn_mask": None if mask is None else _additive(mask, query.dtype),
        "scale": call.scale,
    }
    out, total = aten._scaled_dot_product_flash_attention_for_cpu(*three, 0.0, call.causal, **told)
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *three, out, total, 0.0, call.causal, **told
    )
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()


def _backward_in_steps(
    grad: Tensor,
    dropped: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = query.dtype
    if bias is None:  # torch's own attention, taken apart, computes in float32
        wide = torch.promote_types(given, torch.float32)
        grad, query, key, value = (x.to(wide) for x in (grad, query, key, value))
    scale = call.scale_of(query)
    scaled = query * scale
    weights = _weights(scaled, key, bias, mask, call)
    noise = _noise(dropped, weights, call.dropout) if call.dropout else None
    left = weights if noise is None else weights * noise
    of_value = left.to(value.dtype).transpose(-2, -1).matmul(grad)
    of_weights = grad.matmul(value.transpose(-2, -1)).to(weights.dtype)
    of_weights = of_weights if noise is None else of_weights * noise
    of_scores = aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    of_bias = grad.new_empty(0)
    if bias is not None:
        of_bias = of_scores.sum_to_size(bias.shape).to(bias.dtype)
    of_products = of_scores.to(query.dtype)
    of_query = of_products.matmul(key) * scale
    of_key = of_products.transpose(-2, -1).matmul(scaled)
    return of_query.to(given), of_key.to(given), of_value.to(given), of_bias


def _noise(dropped: Tensor, weights: Tensor, p: float) -> Tensor:
    """What dropout multiplied weights by."""
    if dropped.dtype is not torch.uint8 or dropped.shape != (bits_size(weights.numel()),):
        raise InputError(
            "backward of attention got other bits than its forward kept",
            value=f"{dropped.numel()} bytes for {tuple(weights.shape)}",
            remedy="pass on what swatfx::attention returned and saved as it is",
        )
    kept = bits.bits_to_mask(dropped, weights.numel()).view(weights.shape)
    return kept.to(weights.dtype).div_(1 - p)


def _runs_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: AttentionCall
) -> bool:
    """Whether torch's fused kernel for CPUs takes these: it dies of what has no elements."""
    if query.device.type != "cpu" or call.dropout or not (query.numel() and key.numel()):
        return False
    told = mask, 0.0, call.causal
    return bool(torch._fused_sdp_choice(query, key, value, *told, scale=call.scale) == _FLASH)


def _decoded(
    code: Tensor, sizes: Sequence[Sequence[int]], saves: str, dtype: torch.dtype
) -> list[Tensor]:
    counts = [torch.Size(size).numel() for size in sizes]
    bytes_of = [line_bytes(count, saves) for count in counts]
    if code.dtype is not torch.uint8 or code.shape != (sum(bytes_of),):
        raise InputError(
            "backward of attention got other bytes than its forward kept",
            value=f"{code.numel()} bytes for {sizes}",
            remedy="pass on what swatfx::attention returned and saved as it is",
        )
    parts = zip(code.split(bytes_of), counts, sizes, strict=True)
    return [
        layouts.from_flat(
            decode_flat(part[: flat_bytes(count, saves)], count, saves, dtype),
            size,
            layouts.ROW_MAJOR,
        )
        for part, count, size in parts
    ]


attention_backward = torch.library.custom_op(
    "swatfx::attention_backward",
    attention_backward_reference,
    mutates_args=(),
    schema=schema_of(
        "Tensor grad, Tensor code, Tensor dropped, Tensor? query, Tensor? key, Tensor? value,"
        " Tensor? bias, Tensor? mask, SymInt[] shapes",
        AttentionCall,
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
)


@attention_backward.register_fake
def _(grad: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, shapes = rest[5], rest[7]
    of_query, of_key, of_value = (
        grad.new_empty(size) for size in (shapes[:4], shapes[4:], shapes[4:])
    )
    of_bias = grad.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return of_query, of_key, of_value, of_bias


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *three, bias, mask = inputs[:5]
    ctx.call = AttentionCall(*inputs[5:])
    ctx.shapes = (*three[0].shape, *three[1].shape)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    whole = [None] * 3 if ctx.call.saves in BITS else three
    ctx.save_for_backward(*output[1:], *whole, bias, mask)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    count = 5 + len(AttentionCall.__match_args__)
    if grad is None:
        return (None,) * count
    grads = attention_backward(grad, *ctx.saved_tensors, ctx.shapes, *ctx.call.options)
    if ctx.call.saves in BITS:
        grads = once_only(*grads)
    wants = ctx.needs_input_grad[:4]
    found = [g if want else None for g, want in zip(grads, wants, strict=True)]
    return (*found, *(None,) * (count - 4))


attention.register_autograd(_backward, setup_context=_setup_context)
attention_backward.register_autograd(no_double_backward)
register_autocast("swatfx::attention", casts=(0, 1, 2, 4))
