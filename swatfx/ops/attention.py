"""`swatfx::attention` and its backward: attention that keeps neither its weights nor its result.

Torch's fused kernel keeps query, key, value and the result, which is kept once more, packed, by the
layer that reads it; written out, attention keeps its weights. Here backward computes both anew from
query, key and value, as they are or, with `norm_saves`, from codes (`swatfx.ops.codes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from swatfx.errors import InputError
from swatfx.ops.codes import BITS, decode_flat, encode_lines, flat_bytes, line_bytes
from swatfx.ops.saved import no_double_backward, once_only
from swatfx.tensors import layouts

aten = torch.ops.aten
_FLASH = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    saves: str,
) -> tuple[Tensor, Tensor]:
    """softmax(query key^T / sqrt(D) + bias + mask) value.

    Args:
        query: (N, H, L, D).
        key: (N, H, S, D).
        value: (N, H, S, D).
        bias: what (N, H, L, S) can be added to, learned; None: torch's fused attention runs.
        mask: (W, L, S), added in turn to W neighbours of the N; or None.
        saves: "exact", or a name of `swatfx.ops.codes.BITS`.

    Returns:
        out: (N, H, L, D).
        code: uint8 [bytes]: codes of query, key and value, each up to a whole number of 64 bytes;
            with "exact" nothing.
    """
    if bias is None:
        out = F.scaled_dot_product_attention(query, key, value)
    else:
        out = _weights(query * query.shape[-1] ** -0.5, key, bias, mask).matmul(value)
    code = query.new_empty(0, dtype=torch.uint8)
    if saves in BITS:
        code = torch.cat([encode_lines(x.reshape(-1), saves) for x in (query, key, value)])
    # What a fused kernel returns may be a view, which an op does not.
    return out.clone() if out._is_view() else out, code


def _weights(scaled: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    scores = scaled.matmul(key.transpose(-2, -1))
    scores = scores if bias is None else scores + bias
    if mask is not None:
        shape = scores.shape
        split = scores.view(-1, mask.shape[0], *shape[1:]) + mask.unsqueeze(1).unsqueeze(0)
        scores = split.view(shape)
    return F.softmax(scores, dim=-1)


attention = torch.library.custom_op("swatfx::attention", attention_reference, mutates_args=())


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    saves: str,
) -> tuple[Tensor, Tensor]:
    if bias is None:
        out = F.scaled_dot_product_attention(query, key, value)
        out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
    else:
        out = query.new_empty(query.shape)
    size = 0
    if saves in BITS:
        size = sum(line_bytes(x.numel(), saves) for x in (query, key, value))
    return out, query.new_empty(size, dtype=torch.uint8)


def attention_backward_reference(
    grad: Tensor,
    code: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    shapes: Sequence[int],
    saves: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::attention` for query, key, value and bias (empty without one).

    `shapes`: of query and of key; query, key and value are None where they are in codes.
    """
    sizes = [list(shapes[:4]), *[list(shapes[4:])] * 2]
    if query is None or key is None or value is None:
        query, key, value = _decoded(code, sizes, saves, grad.dtype)
    if bias is None and _runs_fused(query, key, value):
        out, total = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        fused = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, total, 0.0, False
        )
        found = [g.contiguous() for g in fused]
        return found[0], found[1], found[2], grad.new_empty(0)
    scale = query.shape[-1] ** -0.5
    scaled = query * scale
    weights = _weights(scaled, key, bias, mask)
    of_value = weights.transpose(-2, -1).matmul(grad)
    of_weights = grad.matmul(value.transpose(-2, -1))
    of_scores = aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    of_query = of_scores.matmul(key) * scale
    of_key = of_scores.transpose(-2, -1).matmul(scaled)
    of_bias = grad.new_empty(0) if bias is None else of_scores.sum_to_size(bias.shape)
    return of_query, of_key, of_value, of_bias


def _runs_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's fused kernel for CPUs takes these: it dies of what has no elements."""
    if query.device.type != "cpu" or not (query.numel() and key.numel()):
        return False
    return bool(torch._fused_sdp_choice(query, key, value) == _FLASH)


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
    schema="(Tensor grad, Tensor code, Tensor? query, Tensor? key, Tensor? value, Tensor? bias,"
    " Tensor? mask, SymInt[] shapes, str saves) -> (Tensor, Tensor, Tensor, Tensor)",
)


@attention_backward.register_fake
def _(grad: Tensor, code: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, shapes = rest[3], rest[5]
    of_query, of_key, of_value = (
        grad.new_empty(size) for size in (shapes[:4], shapes[4:], shapes[4:])
    )
    of_bias = grad.new_empty(0 if bias is None else bias.shape)
    return of_query, of_key, of_value, of_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *three, bias, mask, ctx.saves = inputs
    ctx.shapes = (*three[0].shape, *three[1].shape)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    whole = [None] * 3 if ctx.saves in BITS else three
    ctx.save_for_backward(output[1], *whole, bias, mask)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    grads = attention_backward(grad, *ctx.saved_tensors, ctx.shapes, ctx.saves)
    if ctx.saves in BITS:
        grads = once_only(*grads)
    wants = ctx.needs_input_grad[:4]
    return (*(g if want else None for g, want in zip(grads, wants, strict=True)), None, None)


attention.register_autograd(_backward, setup_context=_setup_context)
attention_backward.register_autograd(no_double_backward)
