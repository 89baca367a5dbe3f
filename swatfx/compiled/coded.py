"""Leaf modules that keep codes for backward, by the rules of `swatfx.ops.coded`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swatfx import ops
from swatfx.compiled.saves import Bound, Saver, is_changed, wanted
from swatfx.ops.autocast import autocast_dtype
from swatfx.ops.calls import AttentionCall
from swatfx.ops.coded import RULES
from swatfx.ops.codes import GROUP
from swatfx.ops.norm import EXACT
from swatfx.tensors import layouts

_DTYPES = (torch.float32, torch.bfloat16)  # of activations that our own layer norm takes
_HALVES = (torch.bfloat16, torch.float16)


def _pays(x: Any) -> bool:
    """Whether the codes of `x` are smaller than it is."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() >= GROUP


class Elementwise(Saver):
    """A function of one element; with exact saves it keeps what eager keeps."""

    def __init__(self, rule: str, saves: str) -> None:
        super().__init__()
        self.rule, self.saves = rule, saves

    def forward(self, x: Tensor) -> Tensor:
        """Keep the codes of the derivative."""
        if self.saves == EXACT or not (wanted(x) and _pays(x)):
            return self.plain(x)
        y: Tensor = ops.elementwise(x, self.rule, self.saves)[0]
        return y

    def plain(self, x: Tensor) -> Tensor:
        """As in eager, but not in place."""
        return layouts.of_each(RULES[self.rule].of_elements, x)


def _layer_norm(
    saves: str,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """Layer norm by an op of ours; None where eager's is to be called.

    What lies with features outermost goes on so. With exact saves the input is kept, else the codes
    of the normalised input.
    """
    y: Tensor
    if not _agree(x, weight, bias):
        return None
    if saves != EXACT and wanted(x, weight, bias):
        if not _fits(x, shape, weight, bias):
            return None
        y = ops.layer_norm(x, weight, bias, shape, eps, saves)[0]
    else:
        if not _lies_outermost(x, shape):
            return None
        y = ops.features_norm(x, weight, bias, eps)[0]
    return y


def _agree(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether eager takes these dtypes, forward and backward: parameters of x's, or float32."""
    own = x.dtype if weight is None else weight.dtype
    known = own is x.dtype or (own is torch.float32 and x.dtype in _HALVES)
    return known and (bias is None or bias.dtype is own)


def _lies_outermost(x: Tensor, shape: Sequence[int]) -> bool:
    """Whether features do, and `swatfx::features_norm` is for them."""
    if x.is_contiguous() or len(shape) != 1 or tuple(x.shape[-1:]) != tuple(shape):
        return False
    if x.dtype not in _DTYPES:
        return False
    return layouts.elementwise_layout_of(x) in layouts.FEATURES_OUTERMOST


class LayerNorm(Saver):
    """Layer norm as a function."""

    def __init__(self, saves: str) -> None:
        super().__init__()
        self.saves = saves

    def forward(
        self, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
    ) -> Tensor:
        """Keep the codes of the normalised input, or with exact saves the input."""
        y = _layer_norm(self.saves, x, shape, weight, bias, eps)
        return self.plain(x, shape, weight, bias, eps) if y is None else y

    def plain(self, x: Tensor, *args: Any) -> Tensor:
        """As in eager."""
        return F.layer_norm(x, *args)


def _fits(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the op may be asked: eager's own errors tell of what does not fit."""
    shape = tuple(shape)
    given = [p for p in (weight, bias) if p is not None]
    fits = x.dim() >= len(shape) and tuple(x.shape[x.dim() - len(shape) :]) == shape
    return _pays(x) and fits and all(tuple(p.shape) == shape for p in given)


class LayerNormOf(Bound):
    """A layer norm module of the model."""

    def __init__(self, owner: nn.Module, name: str, path: str, saves: str) -> None:
        super().__init__(owner, name, path)
        self.saves = saves

    def forward(self, x: Tensor) -> Tensor:
        """Keep the codes of the normalised input, or with exact saves the input."""
        norm = self.module
        if is_changed(norm, (nn.LayerNorm,)):
            return self.plain(x)
        shape = tuple(norm.normalized_shape)
        y = _layer_norm(self.saves, x, shape, norm.weight, norm.bias, norm.eps)
        return self.plain(x) if y is None else y

    def plain(self, x: Tensor) -> Tensor:
        """As in eager."""
        y: Tensor = self.module(x)
        return y


class Multiply(Saver):
    """A product of elements."""

    def __init__(self, saves: str) -> None:
        super().__init__()
        self.saves = saves

    def forward(self, a: Any, b: Any) -> Any:
        """Keep the codes of what is as large as the product, and the rest as it is."""
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype
        if not (tensors and wanted(a, b) and (_pays(a) or _pays(b))):
            return self.plain(a, b)
        return ops.multiply(a, b, self.saves, [a.requires_grad, b.requires_grad])[0]

    def plain(self, a: Any, b: Any) -> Any:
        """As in eager."""
        return a * b


def _as_it_is(out: Tensor) -> Any:
    return out


@dataclass(frozen=True)
class Heads:
    """What a form of attention is as `swatfx::attention`.

    Attributes:
        query: (N, H, L, D).
        key: (N, H, S, D).
        value: likewise.
        bias: learned, added to scores; or None.
        mask: as the op takes it, or None.
        finish: makes the form's result of the op's.
        causal: as in `swatfx.ops.calls.AttentionCall`; so are scale and dropout.
        scale: likewise.
        dropout: likewise; 0 outside of training.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    finish: Callable[[Tensor], Any] = _as_it_is
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0

    @property
    def is_fused(self) -> bool:
        """Whether torch's own kernel computes it without keeping weights."""
        return self.bias is None and not self.dropout

    @property
    def fits(self) -> bool:
        """Whether the op is for these; eager's own errors tell of what is for nobody."""
        query, key, value, mask = self.query, self.key, self.value, self.mask
        if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
            return False
        if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
            return False
        if not query.shape[3]:  # there is nothing to keep, and no scale
            return False
        given = [query, key, value]
        if mask is not None:
            if mask.requires_grad or (self.causal and self.bias is None):
                return False
            given += [mask] if mask.is_floating_point() and self.bias is None else []
        dtypes = {autocast_dtype(x) for x in given}
        return len(dtypes) == 1 and 0 <= self.dropout < 1


def scaled_dot_product_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Heads | None:
    """What `F.scaled_dot_product_attention` is as one op; None where it is another."""
    if enable_gqa or (attn_mask is not None and attn_mask.dim() not in (2, 4)):
        return None
    return Heads(
        *(query, key, value, None, attn_mask),
        causal=is_causal,
        scale=scale,
        dropout=dropout_p,
    )


class Attention(Saver):
    """A form of attention: a function, and one that tells its heads for the arguments, or None."""

    def __init__(
        self, function: Callable[..., Any], heads: Callable[..., Heads | None], saves: str
    ) -> None:
        super().__init__()
        self.plain = function
        self.heads, self.saves = heads, saves

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep query, key and value, or their codes, and a bit a weight where there is dropout."""
        if not wanted(*(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))):
            return self.plain(*args, **kwargs)
        heads = self.heads(*args, **kwargs)
        if heads is None or not heads.fits:
            return self.plain(*args, **kwargs)
        device = heads.query.device.type
        # Elsewhere than on a CPU nobody runs the fused kernel twice, or has tried autocast.
        if device != "cpu" and (self.saves == EXACT or torch.is_autocast_enabled(device)):
            return self.plain(*args, **kwargs)
        # Of bfloat16 the result, which torch's fused kernel keeps besides, is less than the time
        # that it takes anew: a twentieth of a step of ViT-B.
        if self.saves == EXACT and torch.is_autocast_enabled(device) and heads.is_fused:
            return self.plain(*args, **kwargs)
        call = AttentionCall(self.saves, heads.causal, heads.scale, heads.dropout)
        three = heads.query, heads.key, heads.value
        return heads.finish(ops.attention(*three, heads.bias, heads.mask, *call.options)[0])
