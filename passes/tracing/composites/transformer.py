"""torch.nn's transformer stacks while tracing: the layers they hold, and never their fused path.

In evaluation without gradients torch.nn runs an encoder layer as one fused kernel that reads the
dense weights, and a padded batch as a nested tensor. The graphs made here call the layers one by
one. Masks may be None or tensors at run time.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.tracing.composites.common import additive, call
from swatfx.errors import InputError


def is_causal_mask(mask: Tensor | None, hint: bool | None, x: Tensor, batch_first: bool) -> bool:
    """Whether `mask` is the causal one: what the caller says, or else what the mask shows."""
    if hint is not None or mask is None:
        return hint is True
    length = x.shape[1] if batch_first and x.dim() == 3 else x.shape[0]
    if tuple(mask.shape) != (length, length) or torch.compiler.is_compiling():
        return False  # the mask itself will do: what it holds is not for a compiler to ask
    causal = torch.full((length, length), float("-inf"), dtype=x.dtype, device=mask.device)
    return bool((additive(mask, x.dtype) == causal.triu(1)).all())


def zero_padding(
    output: Tensor, src: Tensor, mask: Tensor | None, padding: Tensor | None, training: bool
) -> Tensor:
    """Zero the padded positions where torch.nn would: where it would have used nested tensors."""
    nested = not training and padding is not None and mask is None and src.dim() == 3
    if not nested or output.requires_grad or torch.is_autocast_enabled():
        return output
    if torch.compiler.is_compiling():
        return output  # as torch.nn does
    assert padding is not None  # said by `nested`
    valid = additive(padding, src.dtype).logical_not()
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        return output  # not left aligned
    return output.masked_fill(~valid.unsqueeze(-1), 0.0)


def check_batches(src: Tensor, tgt: Tensor, batch_first: bool, width: int) -> None:
    """Raise InputError if an nn.Transformer cannot take these together."""
    batch = 0 if batch_first else 1
    if src.dim() == 3 and src.shape[batch] != tgt.shape[batch]:
        raise InputError(
            "the batch sizes of src and tgt differ", value=(tuple(src.shape), tuple(tgt.shape))
        )
    if src.shape[-1] != width or tgt.shape[-1] != width:
        raise InputError(
            f"src and tgt want {width} features", value=(tuple(src.shape), tuple(tgt.shape))
        )


def avoid_fused_path(m: nn.Module) -> None:
    """Keep an encoder that stays eager (a user's subclass) from reading the dense weights."""
    if isinstance(m, nn.TransformerEncoderLayer):
        m.activation_relu_or_gelu = 0
    elif isinstance(m, nn.TransformerEncoder):
        m.use_nested_tensor = False


def encoder_layer(
    tracer: Any,
    m: nn.TransformerEncoderLayer,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: Any = False,
) -> Any:
    """The graph of nn.TransformerEncoderLayer."""
    masks = (src_mask, src_key_padding_mask)
    if m.norm_first:
        x = src + m._sa_block(m.norm1(src), *masks, is_causal=is_causal)
        return x + m._ff_block(m.norm2(x))
    x = m.norm1(src + m._sa_block(src, *masks, is_causal=is_causal))
    return m.norm2(x + m._ff_block(x))


def encoder(
    tracer: Any,
    m: nn.TransformerEncoder,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: Any = None,
) -> Any:
    """The graph of nn.TransformerEncoder."""
    first: Any = m.layers[0]
    if is_causal is None or isinstance(is_causal, fx.Proxy):
        if mask is None:
            is_causal = False
        else:
            batch_first = first.self_attn.batch_first
            is_causal = call(tracer, is_causal_mask, mask, is_causal, src, batch_first)
    output: Any = src
    for layer in m.layers:
        output = layer(
            output,
            src_mask=mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=is_causal,
        )
    if getattr(m, "use_nested_tensor", False) and src_key_padding_mask is not None:
        masks = (mask, src_key_padding_mask)
        output = call(tracer, zero_padding, output, src, *masks, first.training)
    return output if m.norm is None else m.norm(output)


def decoder(
    tracer: Any,
    m: nn.TransformerDecoder,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: Any = False,
) -> Any:
    """The graph of nn.TransformerDecoder."""
    if tgt_is_causal is None or isinstance(tgt_is_causal, fx.Proxy):
        if tgt_mask is None:
            tgt_is_causal = False
        else:
            first: Any = m.layers[0]
            batch_first = first.self_attn.batch_first
            tgt_is_causal = call(tracer, is_causal_mask, tgt_mask, tgt_is_causal, tgt, batch_first)
    output: Any = tgt
    for layer in m.layers:
        output = layer(
            output,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
    return output if m.norm is None else m.norm(output)


def transformer(
    tracer: Any, m: nn.Transformer, src: Any, tgt: Any, *args: Any, **named: Any
) -> Any:
    """The graph of nn.Transformer, called as its forward is."""
    call(tracer, check_batches, src, tgt, m.batch_first, m.d_model)
    bound = inspect.signature(nn.Transformer.forward).bind(m, src, tgt, *args, **named)
    bound.apply_defaults()
    given = bound.arguments
    memory = m.encoder(
        src,
        mask=given["src_mask"],
        src_key_padding_mask=given["src_key_padding_mask"],
        is_causal=given["src_is_causal"],
    )
    _, _, _, *masks = inspect.signature(nn.TransformerDecoder.forward).parameters
    return m.decoder(tgt, memory, **{name: given[name] for name in masks})
