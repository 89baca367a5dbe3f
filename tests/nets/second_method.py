"""The method of swatfx/ops/README.md once more, in plain float64 torch.

It shares no code with the library: Top-K by sorting, the input gradient as a transposed
convolution, the weight gradient as a convolution of the transposed activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swatfx.compiled.module import SwatModule
from swatfx.compiled.state import Pack

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_T = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def top(scores: Tensor, sparsity: float) -> Tensor:
    n = scores.numel()
    k = n - int(Fraction(str(sparsity)) * n)
    return scores >= scores.reshape(-1).sort(descending=True).values[k - 1]


def each(x: Tensor, dims: int, sparsity: float) -> Tensor:
    """Top-K in each slice of the first `dims` dimensions."""
    slices = x.abs().flatten(0, dims - 1) if dims > 1 else x.abs()
    return torch.stack([top(part, sparsity) for part in slices]).view(x.shape)


def weight_mask(name: str, w: Tensor, s: float) -> Tensor:
    rest = tuple(range(2, w.dim()))
    slices = w.abs().sum(rest) if rest else w.abs()

    def spread(mask: Tensor) -> Tensor:
        return mask.view(*mask.shape, *[1] * (w.dim() - mask.dim())).expand_as(w)

    if name == "nchw":
        return top(w.abs(), s)
    if name == "chw":
        return each(w, 1, s)
    if name == "hw":
        return each(w, 2, s)
    if name == "channel":
        return spread(top(slices, s))
    if name == "channel-per-filter":
        return spread(torch.stack([top(row, s) for row in slices]))
    if name == "filter":
        return spread(top(slices.sum(1), s))
    if name == "input-channel":
        return spread(top(slices.sum(0), s)[None].expand(w.shape[0], -1))
    assert name == "2:4"
    keep = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], 4):
        group = w[:, start : start + 4].abs()
        rank = group.argsort(dim=1, descending=True).argsort(dim=1)
        keep[:, start : start + 4] = rank < 2
    return keep


def activation_mask(name: str, a: Tensor, s: float, spatial: int) -> Tensor:
    if name == "nchw":
        return top(a.abs(), s)
    if name == "chw":
        return each(a, 1, s)
    assert name == "hw"
    # Of a sequence, what one feature is at every token is its map; a row has maps of one element.
    return each(a, 2, s) if spatial else each(a.movedim(-1, 1), 2, s).movedim(1, -1)


@dataclass
class Shape:
    """What a layer is called with."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1


def forward(a: Tensor, w: Tensor, b: Tensor | None, c: Shape) -> Tensor:
    if w.dim() == 2:
        y = torch.einsum("...i,oi->...o", a, w)
        return y if b is None else y + b
    return CONV[w.dim() - 2](a, w, b, c.stride, c.padding, c.dilation, c.groups)


def input_gradient(g: Tensor, w: Tensor, a: Tensor, c: Shape) -> Tensor:
    if w.dim() == 2:
        return torch.einsum("...o,oi->...i", g, w)
    spatial = range(2, w.dim())
    plain = [(g.shape[d] - 1) * c.stride + c.dilation * (w.shape[d] - 1) + 1 for d in spatial]
    extra = [a.shape[d] + 2 * c.padding - n for d, n in zip(spatial, plain, strict=True)]
    call = CONV_T[w.dim() - 2]
    return call(g, w, None, c.stride, c.padding, extra, c.groups, c.dilation)


def weight_gradient(g: Tensor, a: Tensor, w: Tensor, c: Shape) -> Tensor:
    if w.dim() == 2:
        return torch.einsum("...o,...i->oi", g, a)
    parts = []
    for ga, gg in zip(a.chunk(c.groups, 1), g.chunk(c.groups, 1), strict=True):
        call = CONV[w.dim() - 2]
        full = call(
            ga.transpose(0, 1), gg.transpose(0, 1), None, c.dilation, c.padding, c.stride
        ).transpose(0, 1)
        parts.append(full[tuple(slice(n) for n in (full.shape[0], *w.shape[1:]))])
    return torch.cat(parts)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], Shape]] = {
    "conv2d": (nn.Conv2d(8, 12, 3, 2, 1), (3, 8, 7, 6), Shape(2, 1)),
    "conv1d": (nn.Conv1d(8, 12, 3, dilation=2, bias=False), (3, 8, 9), Shape(dilation=2)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2), (2, 8, 5, 5), Shape(groups=2)),
    "conv3d": (nn.Conv3d(4, 8, 2), (2, 4, 4, 3, 4), Shape()),
    "linear": (nn.Linear(16, 12), (7, 16), Shape()),
    "sequence": (nn.Linear(16, 12, bias=False), (2, 5, 16), Shape()),
}


def as_double(name: str) -> tuple[nn.Module, Tensor, Shape]:
    layer, shape, call = LAYERS[name]
    torch.manual_seed(11)
    layer.double()
    for p in layer.parameters():
        p.data.normal_()
        p.grad = None
    return layer, torch.randn(shape, dtype=torch.float64, requires_grad=True), call


@contextmanager
def packs(gm: SwatModule) -> Iterator[list[Tensor | None]]:
    """What each Pack returned."""
    seen: list[Tensor | None] = []
    hooks = [
        m.register_forward_hook(lambda _, args, out: seen.append(out))
        for m in gm.swat.modules()
        if isinstance(m, Pack)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def assert_close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
