"""What rounding to single precision may do to a network's gradients, seen in double precision.

What one run of plain PyTorch is off by says little: it is nothing, by luck, where all elements of
a channel are alike, and of another size in another memory order. Here what every module gives, and
the gradient that it gets back, is moved by half a unit of single precision; and the gradient that a
norm hands on by half a unit of what it subtracts from itself, which may be all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HALF_UNIT = 2.0**-24


class _Rounding:
    """One way to round: at random, or all upwards, as it is where all elements are alike."""

    def __init__(self, seed: int | None) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def of(self, size: Tensor) -> Tensor:
        """Errors of values of these sizes."""
        if self.generator is None:
            return size * _HALF_UNIT
        draws = torch.rand(size.shape, generator=self.generator, dtype=size.dtype)
        return size * (draws * 2 - 1) * _HALF_UNIT


class _Rounded(torch.autograd.Function):
    """A value and its gradient, rounded."""

    @staticmethod
    def forward(ctx, x, rounding, norm):  # type: ignore[no-untyped-def]
        ctx.rounding, ctx.norm = rounding, norm
        return x + rounding.of(x.abs())

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if ctx.norm is not None:
            ctx.norm.above(g)
        return g + ctx.rounding.of(g.abs()), None, None


class _Below(torch.autograd.Function):
    """The input of a norm, whose gradient is what is left of a subtraction."""

    @staticmethod
    def forward(ctx, x, norm):  # type: ignore[no-untyped-def]
        ctx.norm = norm
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        norm = ctx.norm
        return g + norm.rounding.of(torch.full_like(g, norm.size)), None


class _Norm:
    """One call of a norm: by how much it scales, and the size of the gradient that it got."""

    def __init__(self, module: nn.Module, x: Tensor, rounding: _Rounding) -> None:
        self.rounding, self.size = rounding, 0.0
        x = x.detach()
        if isinstance(module, nn.GroupNorm):
            rows = x.reshape(x.shape[0] * module.num_groups, -1)
        elif isinstance(module, nn.LayerNorm):
            rows = x.reshape(-1, x.shape[-1])
        else:
            rows = x.movedim(1, 0).flatten(1)
        deviation = (rows.var(1, correction=0) + module.eps).sqrt()  # type: ignore[operator]
        weight = module.weight
        self.scale = float((1 / deviation).max()) if x.numel() else 0.0
        self.scale *= float(weight.detach().abs().max()) if isinstance(weight, Tensor) else 1.0

    def above(self, g: Tensor) -> None:
        self.size = self.scale * float(g.abs().max()) if g.numel() else 0.0


class _Coarse(torch.autograd.Function):
    """A batch norm whose backward sees normalised values off by up to half a step of a byte."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, generator):  # type: ignore[no-untyped-def]
        dims = [d for d in range(x.dim()) if d != 1]
        column = [-1 if d == 1 else 1 for d in range(x.dim())]
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        scale = 1 / (var + eps).sqrt()
        seen = (x - mean) * scale
        y = seen * weight.view(column) + bias.view(column)
        step = (seen.amax(dims, keepdim=True) - seen.amin(dims, keepdim=True)) / 254
        draws = torch.ones_like(x)
        if generator is not None:
            draws = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        ctx.save_for_backward(seen + (draws - 0.5) * step, weight.view(column) * scale)
        ctx.dims = dims
        return y

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        seen, scale = ctx.saved_tensors
        along = (g * seen).mean(ctx.dims, keepdim=True)
        dx = scale * (g - g.mean(ctx.dims, keepdim=True) - seen * along)
        return dx, (g * seen).sum(ctx.dims), g.sum(ctx.dims), None, None


@contextmanager
def kept_in_bytes(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Inside, batch norms keep a byte an element, rounded at random, or without a seed upwards."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def after(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        found: Tensor = _Coarse.apply(args[0], module.weight, module.bias, module.eps, generator)
        return found

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    hooks = [m.register_forward_hook(after) for m in norms if m.training]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


@contextmanager
def rounded_anywhere(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Inside, `model` rounds: at random, or without a seed upwards."""
    rounding = _Rounding(seed)
    calls: dict[nn.Module, _Norm] = {}

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls[module] = _Norm(module, args[0], rounding)
        return (_Below.apply(args[0], calls[module]), *args[1:])

    def after(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        found: Tensor = _Rounded.apply(y, rounding, calls.get(module))
        return found

    hooks = []
    for module in model.modules():
        if isinstance(module, _NORMS) and module.training:
            hooks.append(module.register_forward_pre_hook(before))
        if not any(module.children()):
            hooks.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
