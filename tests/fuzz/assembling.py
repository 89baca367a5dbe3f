"""The network of a `NetworkCase` as a torch module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fuzz.building import CONVS
from tests.fuzz.networks import SHARED, Do, NetworkCase
from tests.fuzz.plain import NOW


class Network(nn.Module):
    """Operations in order; called on a tensor of the case's shape. Returns what nothing reads."""

    def __init__(self, ops: tuple[Do, ...], single: bool = False) -> None:
        super().__init__()
        self.ops = ops
        self.steps = nn.ModuleList(_module(op) for op in ops)
        read = {source for op in ops for source in op.sources}
        self.ends = [i + 1 for i in range(len(ops)) if i + 1 not in read]
        self.single = single

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for op, part in zip(self.ops, self.steps, strict=True):
            given = [values[i] for i in op.sources]
            if op.name == "again":
                values.append(self.steps[op.options[0]](*given))
            else:
                values.append(part(*given))
        found = [values[i] for i in self.ends]
        return found[0] if self.single or len(found) == 1 else tuple(found)


def network(case: NetworkCase) -> Network:
    """The module of a case."""
    return Network(case.ops)


class Step(nn.Module):
    """An operation without parameters."""

    def __init__(self, name: str, options: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        _watch(self.name, self.options, x)
        return APPLY[self.name](x, y, *self.options)


def _shuffled(x: Tensor, _: Any) -> Tensor:
    n, c, *size = x.shape
    return x.view(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)


def _shared(x: Tensor, _: Any, how: int, first: int) -> Tensor:
    """What a write into `x`, or into another form of it, leaves of the other of the two."""
    other = SHARED[how](x)
    (x if first else other).mul_(0.5)
    if not first:
        return x
    return other.transpose(0, -1) if how == len(SHARED) - 1 else other.reshape(x.shape)


def _pooled(kind: str) -> Any:
    def pool(x: Tensor, _: Any, k: int, stride: int, pad: int) -> Tensor:
        spatial = x.dim() - 2
        return getattr(F, f"{kind}_pool{spatial}d")(x, k, stride, pad)

    return pool


APPLY: dict[str, Any] = {
    "relu": lambda x, _: F.relu(x),
    "relu_": lambda x, _: F.relu(x, inplace=True),
    "hardswish_": lambda x, _: F.hardswish(x, inplace=True),
    "hardtanh_": lambda x, _: F.hardtanh(x, inplace=True),
    "gelu": lambda x, _: F.gelu(x),
    "silu_": lambda x, _: F.silu(x, inplace=True),
    "leaky_": lambda x, _: F.leaky_relu(x, 0.1, inplace=True),
    "add": lambda x, y: x + y,
    "add_": lambda x, y: x.add_(y),
    "sum": lambda x, y: x.flatten(1).sum(1) + y.flatten(1).sum(1),
    "gate": lambda x, y: x * torch.sigmoid(y),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "maxpool": _pooled("max"),
    "avgpool": _pooled("avg"),
    "gap": lambda x, _: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "mean": lambda x, _, *dims: x.mean(dims),
    "flatten": lambda x, _: x.flatten(1),
    "tokens": lambda x, _: x.flatten(2).transpose(1, 2),
    "swap": lambda x, _: x.transpose(1, 2),
    "first": lambda x, _: x.permute(1, 0, 2),
    "shuffle": _shuffled,
    "shared": _shared,
    "up": lambda x, _: F.interpolate(x, scale_factor=2.0, mode="nearest"),
}
_KINKS = {
    "relu": (0.0,),
    "relu_": (0.0,),
    "leaky_": (0.0,),
    "hardswish_": (-3.0, 3.0),
    "hardtanh_": (-1.0, 1.0),
}


def _watch(name: str, options: tuple[int, ...], x: Tensor) -> None:
    """Tell the oracle how near its values are to where a derivative jumps."""
    if x.dtype is not torch.float64:
        return
    for kink in _KINKS.get(name, ()):
        NOW.moment.decides(x - kink, x)
    if name == "maxpool":
        k, stride, pad = options
        wide = x.detach() if x.dim() == 4 else x.detach().unsqueeze(2)
        kernel, pads = ((k, k), (pad, pad)) if x.dim() == 4 else ((1, k), (0, pad))
        strides = (stride, stride) if x.dim() == 4 else (1, stride)
        windows = F.unfold(wide.flatten(0, 1).unsqueeze(1), kernel, 1, pads, strides)
        top = windows.topk(2, dim=1).values
        gaps = top[:, 0] - top[:, 1]
        NOW.moment.decides(gaps[gaps > 0], x)  # equal ones fall alike


class Attention(nn.Module):
    """Self-attention over (N, L, C), by formula or by torch's fused function."""

    def __init__(self, width: int, heads: int, fused: int) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Part(nn.Module):
    """Operations behind a checkpoint, or behind control flow that tracing cannot follow."""

    def __init__(self, op: Do) -> None:
        super().__init__()
        self.name, (self.times,) = op.name, op.options
        self.body = Network(op.body, single=True)
        self.checkpointed = "checkpoint" in op.name

    def forward(self, x: Tensor) -> Tensor:
        if self.name.startswith("eager") and not bool(torch.isfinite(x).all()):
            return x
        for _ in range(self.times):
            if self.checkpointed:
                x = checkpoint(self.body, x, use_reentrant="reentrant" in self.name)
            else:
                x = self.body(x)
        return x


def _module(op: Do) -> nn.Module:
    options = op.options
    if op.name == "conv":
        spatial, *sizes, bias = options
        return CONVS[spatial](*sizes, bool(bias))
    if op.name == "linear":
        return nn.Linear(*options[:2], bias=bool(options[2]))
    if op.name == "upconv":
        return nn.ConvTranspose2d(*options, 2, 2)
    if op.name == "attention":
        return Attention(*options)
    if op.name == "bn":
        return (nn.BatchNorm2d if options[0] == 4 else nn.BatchNorm1d)(options[1])
    if op.name == "layernorm":
        return nn.LayerNorm(options)
    if op.name == "groupnorm":
        return nn.GroupNorm(*options)
    if op.name == "dropout":
        return nn.Dropout(0.0)
    if op.body:
        return Part(op)
    return nn.Identity() if op.name == "again" else Step(op.name, options)
