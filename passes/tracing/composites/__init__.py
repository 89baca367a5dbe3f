"""Modules and functions that hide linear layers, taken apart while tracing.

They call `F.linear` behind control flow on shapes, masks or modes. Each is split here into its
projections, which become linear nodes of the graph, and what stands between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from passes.tracing.composites.attention import multihead_attention
from passes.tracing.composites.padded import CONVOLUTIONS, convolution
from passes.tracing.composites.transformer import (
    avoid_fused_path,
    decoder,
    encoder,
    encoder_layer,
    transformer,
)
from passes.tracing.composites.window import shifted_window_attention, shifted_window_attention_3d
from passes.tracing.module_kinds import is_patched

__all__ = ["avoid_fused_path", "find", "find_function", "takes_any"]

_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: multihead_attention,
    nn.TransformerEncoderLayer: encoder_layer,
    nn.TransformerEncoder: encoder,
    nn.TransformerDecoder: decoder,
    nn.Transformer: transformer,
    **dict.fromkeys(CONVOLUTIONS, convolution),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torchvision.models.swin_transformer.shifted_window_attention": shifted_window_attention,
    "torchvision.models.video.swin_transformer.shifted_window_attention_3d": (
        shifted_window_attention_3d
    ),
}


def find(m: nn.Module) -> Callable[..., Any] | None:
    """What makes the graph of `m`, if its forward is one of those above; or None."""
    for kind, expand in _MODULES.items():
        if isinstance(m, kind) and type(m).forward is kind.forward and not is_patched(m):
            return expand
    return None


def find_function(target: object) -> Callable[..., Any] | None:
    """What makes the graph of a call of the function `target`, or None."""
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    return _FUNCTIONS.get(name)


def takes_any(m: nn.Module) -> bool:
    """Whether the optional arguments of `m` may be left open: no Python of a user reads them."""
    whole = find(m) is not None or isinstance(m, nn.TransformerDecoderLayer)
    return whole and all(type(x).__module__.startswith("torch.nn.") for x in m.modules())
