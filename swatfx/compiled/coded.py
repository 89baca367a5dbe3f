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
from swatfx.ops.coded import RULES
from swatfx.ops.codes import GROUP
from swatfx.ops.norm import EXACT


def _pays(x: Any) -> bool:
    """Whether the codes of `x` are smaller than it is."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() >= GROUP


class Elementwise(Saver):
    """A function of one element."""

    def __init__(self, rule: str, saves: str) -> None:
        super().__init__()
        self.rule, self.saves = rule, saves

    def forward(self, x: Tensor) -> Tensor:
        """Keep the codes of the derivative."""
        if not (wanted(x) and _pays(x)):
            return self.plain(x)
        y: Tensor = ops.elementwise(x, self.rule, self.saves)[0]
        return y

    def plain(self, x: Tensor) -> Tensor:
        """As in eager, but not in place."""
        rule = RULES[self.rule]
        y: Tensor = rule.functions[0](x, **rule.options)
        return y


class LayerNorm(Saver):
    """Layer norm as a function."""

    def __init__(self, saves: str) -> None:
        super().__init__()
        self.saves = saves

    def forward(
        self, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
    ) -> Tensor:
        """Keep the codes of the normalised input."""
        if not (wanted(x, weight, bias) and _fits(x, shape, weight, bias)):
            return self.plain(x, shape, weight, bias, eps)
        y: Tensor = ops.layer_norm(x, weight, bias, shape, eps, self.saves)[0]
        return y

    def plain(self, x: Tensor, *args: Any) -> Tensor:
        """As in eager."""
        return F.layer_norm(x, *args)


def _fits(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the op may be asked: eager's own errors tell of what does not fit."""
    shape = tuple(shape)
    given = [p for p in (weight, bias) if p is not None]
    fits = x.dim() >= len(shape) and tuple(x.shape[x.dim() - len(shape) :]) == shape
    same = {p.dtype for p in given} <= {x.dtype}
    return _pays(x) and fits and same and all(tuple(p.shape) == shape for p in given)


class LayerNormOf(Bound):
    """A layer norm module of the model."""

    def __init__(self, owner: nn.Module, name: str, path: str, saves: str) -> None:
        super().__init__(owner, name, path)
        self.saves = saves

    def forward(self, x: Tensor) -> Tensor:
        """Keep the codes of the normalised input."""
        norm = self.module
        if is_changed(norm, (nn.LayerNorm,)) or not wanted(x, norm.weight, norm.bias):
            return self.plain(x)
        shape = tuple(norm.normalized_shape)
        if not _fits(x, shape, norm.weight, norm.bias):
            return self.plain(x)
        y: Tensor = ops.layer_norm(x, norm.weight, norm.bias, shape, norm.eps, self.saves)[0]
        return y

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


@dataclass(frozen=True)
class Heads:
    """What a form of attention is as `swatfx::attention`.

    Attributes:
        query: (N, H, L, D).
        key: (N, H, S, D).
        value: likewise.
        bias: learned, added to scores; or None.
        mask: (W, L, S), added in turn; or None.
        finish: makes the form's result of the op's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    finish: Callable[[Tensor], Any]


class Attention(Saver):
    """A form of attention: a function, and one that tells its heads for the arguments, or None."""

    def __init__(
        self, function: Callable[..., Any], heads: Callable[..., Heads | None], saves: str
    ) -> None:
        super().__init__()
        self.plain = function
        self.heads, self.saves = heads, saves

    def forward(self, *args: Any) -> Any:
        """Keep query, key and value, or their codes."""
        if not wanted(*(a for a in args if isinstance(a, Tensor))):
            return self.plain(*args)
        heads = self.heads(*args)
        if heads is None:
            return self.plain(*args)
        three, device = (heads.query, heads.key, heads.value), heads.query.device.type
        # Autocast casts within; elsewhere than on a CPU nobody runs the fused kernel twice.
        if torch.is_autocast_enabled(device) or (self.saves == EXACT and device != "cpu"):
            return self.plain(*args)
        out = ops.attention(*three, heads.bias, heads.mask, self.saves)[0]
        return heads.finish(out)
