"""Sizes of one, whose stride says nothing: norms and convolutions read right, however they lie.

A view after a transpose gives the dimension of size 1 a stride of its own choice, and the batch
norm of PyTorch 2.14 goes by it in backward. Its convolution dies on a width of one in
channels_last under a dilated kernel of one tap.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx.ops.norm import batch_norm

SHAPES = [(1, 32, 4, 3), (1, 16, 1, 5), (1, 8, 6), (1, 32, 4, 4, 2), (1, 16, 7, 1), (2, 8, 3, 3)]


def lying(x: Tensor) -> list[Tensor]:
    """`x` in every order, and with odd strides where a dimension is of size 1."""
    orders = [x.contiguous(), x.movedim(1, -1).contiguous().movedim(-1, 1)]
    orders.append(x.movedim(0, -1).contiguous().movedim(-1, 0))
    found = []
    for y in orders:
        pairs = list(zip(y.shape, y.stride(), strict=True))
        for odd in (None, 1, 3, y.shape[1], 1000):
            strides = [s if n > 1 or odd is None else odd for n, s in pairs]
            found.append(y.as_strided(y.shape, strides))
    return found


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_reads_what_lies_oddly(shape: tuple[int, ...], relu: bool) -> None:
    torch.manual_seed(0)
    x0, g0 = torch.randn(shape), torch.randn(shape)
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    x = x0.double().requires_grad_()
    exact = [x, weight.double().requires_grad_(), bias.double().requires_grad_()]
    dims = [d for d in range(x.dim()) if d != 1]
    column = [-1 if d == 1 else 1 for d in range(x.dim())]
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    y = (x - mean) / (var + 1e-5).sqrt() * exact[1].view(column) + exact[2].view(column)
    y = y.relu() if relu else y
    wanted = [y, *torch.autograd.grad(y, exact, g0.double())]
    parameters = weight.requires_grad_(), bias.requires_grad_()
    for x in lying(x0):
        x = x.detach().requires_grad_()
        out = batch_norm(x, None, *parameters, None, None, True, 0.1, 1e-5, relu)[0]
        for g in lying(g0):
            found = [out, *torch.autograd.grad(out, (x, *parameters), g, retain_graph=True)]
            for mine, right in zip(found, wanted, strict=True):
                assert (mine.double() - right).abs().max() <= 1e-5 * right.abs().max() + 1e-6


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Eager(nn.Module):
    """Control flow that tracing leaves to Python."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool(torch.isfinite(x).all()) else x  # type: ignore[no-any-return]


class Twofold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)


@pytest.mark.filterwarnings("ignore:.*eager Python:UserWarning")
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "sparse", "dense"])
def test_norms_before_tokens(
    kernels: str, eager: bool, twice: bool, batch: int, sparsity: float
) -> None:
    torch.manual_seed(0)
    width = 32 if twice else 16
    linear: nn.Module = nn.Linear(width, 12)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        *([Twofold()] if twice else []),
        Tokens(),
        Eager(linear) if eager else linear,
    )
    policy = f"swat-u:0.0,activation_sparsity={sparsity}"  # reaches weight gradients only
    exact = copy.deepcopy(model).double()
    gm = swatfx.compile(model, policy, kernels=kernels)
    gradients = []
    grad = torch.randn(batch, 12, 12)
    x = torch.randn(batch, 3, 8, 6)
    for m in (gm, exact):
        given = x.clone().to(next(m.parameters()).dtype).requires_grad_()
        y = m(given)
        y.backward(grad.to(y.dtype))
        norm = m.get_submodule("2").parameters()
        gradients.append([t.grad for t in (given, *norm) if t.grad is not None])
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-4)
    assert len(gradients[0]) == 3


ONE_TAP = [  # input, weight, stride, padding, dilation; the first three died in channels_last
    ((2, 2, 1), (1, 2, 1), [2], [1], [2]),
    ((16, 3, 3, 1), (2, 3, 3, 1), [1, 2], [2, 1], [1, 2]),
    ((16, 16, 3, 1), (16, 16, 3, 1), [1, 2], [2, 1], [2, 2]),
    ((1, 4, 1, 1), (3, 4, 1, 1), [2, 2], [1, 1], [3, 2]),
    ((2, 2, 2, 1, 1), (2, 2, 1, 1, 1), [1, 2, 2], [1, 1, 1], [2, 2, 2]),
]


@pytest.mark.parametrize("sizes", ONE_TAP, ids=str)
@pytest.mark.parametrize("layout", ["", "row_major", "channels_last", "batch_innermost"])
def test_a_dilated_tap_of_one(sizes: tuple[Any, ...], layout: str) -> None:
    shape, weight_shape, *options = sizes
    torch.manual_seed(0)
    w, b = torch.randn(weight_shape, requires_grad=True), torch.randn(weight_shape[0])
    b.requires_grad_()
    conv = [F.conv1d, F.conv2d, F.conv3d][len(shape) - 3]
    x0 = torch.randn(shape)
    exact = [t.detach().double().requires_grad_() for t in (x0, w, b)]
    y = conv(*exact, *options)  # type: ignore[operator]
    g = torch.randn(y.shape)
    wanted = [y, *torch.autograd.grad(y, exact, g.double())]
    state = torch.zeros(())
    for x in lying(x0):
        leaf = x.detach().requires_grad_()
        out = torch.ops.swatfx.conv(leaf, w, b, state, None, *options, 1, layout=layout)
        for grad in lying(g):
            found = [out, *torch.autograd.grad(out, (leaf, w, b), grad, retain_graph=True)]
            for mine, right in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)
