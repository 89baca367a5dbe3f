"""Convolutions and linear layers on bfloat16 activations: against plain formulas in float64.

What may differ is one rounding of the result (2^-8 of it at most, half of a unit in the last of 8
bits, twice for good measure of ties) and what float32 sums lose: 2^-24 a term, of the sum of
magnitudes. Weight gradients are float32, and have the latter alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx import kernels, ops
from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST

pytestmark = pytest.mark.usefixtures("no_references")

BF16 = torch.bfloat16
# batch, groups, channels, filters, height, width, kernel, stride, padding, dilation
CASES = [
    (16, 1, 64, 33, 14, 14, 3, 1, 1, 1),
    (16, 1, 40, 16, 7, 7, 3, 1, 1, 1),  # an odd number of columns
    (16, 1, 300, 20, 7, 7, 3, 1, 1, 1),  # channels in blocks
    (32, 1, 600, 18, 7, 7, 3, 1, 1, 1),
    (16, 1, 2100, 16, 1, 5, 1, 1, 0, 1),
    (16, 1, 64, 128, 1, 28, 1, 1, 0, 1),  # read where it lies
    (16, 1, 64, 17, 1, 27, 1, 1, 0, 1),
    (1, 1, 16, 16, 9, 9, 3, 1, 1, 1),
    (2, 2, 16, 32, 8, 8, 3, 1, 1, 1),
    (15, 1, 16, 20, 8, 8, 3, 1, 1, 1),
    (17, 1, 16, 20, 8, 8, 3, 1, 1, 1),
    (31, 1, 16, 20, 5, 5, 3, 1, 1, 1),
    (33, 1, 16, 20, 5, 5, 3, 1, 1, 1),
    (48, 2, 32, 70, 5, 9, 3, 2, 1, 1),
    (16, 1, 16, 20, 13, 13, 5, 3, 2, 1),
    (16, 1, 16, 20, 13, 13, 3, 1, 2, 2),
    (16, 1, 16, 24, 8, 8, 1, 2, 0, 1),
    (16, 1, 3, 16, 13, 12, 2, 2, 0, 1),
    (64, 1, 16, 16, 1, 1, 1, 1, 0, 1),
    (32, 1, 96, 160, 29, 31, 1, 1, 0, 1),  # written past the caches
    (16, 24, 24, 24, 9, 10, 3, 1, 1, 1),  # depthwise, as the rest
    (33, 7, 7, 7, 5, 5, 5, 2, 2, 1),
    (8, 40, 40, 40, 10, 10, 7, 1, 3, 1),
    (1, 17, 17, 17, 6, 40, 3, 3, 0, 2),
    (16, 5, 5, 5, 3, 4, 1, 1, 0, 1),
]


def top(x: Tensor, density: float) -> Tensor:
    """The least magnitude that is kept."""
    return x.abs().flatten().sort(descending=True)[0][max(0, int(density * x.numel()) - 1)].clone()


def near(got: Tensor, want: Tensor, magnitudes: Tensor, terms: int, roundings: int) -> None:
    bound = want.abs() * 2**-8 * roundings + magnitudes * (terms * 2**-24) + 1e-30
    assert got.shape == want.shape
    excess = (got.double() - want).abs() - bound
    assert bool((excess <= 0).all()), excess.max()


def twice(f: Any, *operands: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(result and gradients, the same of magnitudes) of `f(*operands) * last operand`."""
    found = []
    for convert in (lambda x: x.double(), lambda x: x.double().abs()):
        *inner, grad = [convert(x).requires_grad_() for x in operands]
        out = f(*inner)
        found.append([out.detach(), *torch.autograd.grad(out, inner, grad.detach())])
    return found[0], found[1]


@pytest.mark.parametrize("weights", [torch.float32, BF16], ids=["autocast", "pure"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolutions(
    case: tuple[int, ...], threads: int, weights: torch.dtype, threads_as_before: None
) -> None:
    batch, groups, channels, filters, height, width, kernel, stride, padding, dilation = case
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width).relu().to(BF16)
    x = layouts.as_layout(x, BATCH_INNERMOST).requires_grad_()
    w = torch.randn(filters, channels // groups, kernel, kernel).to(weights).requires_grad_()
    b = torch.randn(filters).to(BF16).requires_grad_() if batch % 2 else None
    state, threshold = top(w.detach(), 0.2), top(x.detach(), 0.3)
    kept = ops.pack(x.detach(), threshold, 2, "nchw", BF16, BATCH_INNERMOST)
    steps = [stride] * 2, [padding] * 2, [dilation] * 2, groups
    out = ops.conv(x, w, b, state, kept, *steps, layout=BATCH_INNERMOST)
    assert out.dtype == BF16
    grad = layouts.as_layout(torch.randn(out.shape).to(BF16), BATCH_INNERMOST)
    out.backward(grad)
    active = torch.where(w.abs() >= state, w, 0).detach().to(BF16)
    seen = torch.where(x.abs() >= threshold, x, 0).detach()

    def product(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, stride, padding, dilation, groups)

    terms = 4 + channels * kernel * kernel // groups
    (want, dx, _), (size, dx_size, _) = twice(product, x.detach(), active, grad)
    if b is not None:
        want, size = (v + t.view(1, -1, 1, 1) for v, t in ((want, b), (size, b.abs())))
        assert b.grad is not None and b.grad.dtype == BF16
        total = grad.double().sum((0, 2, 3))
        near(b.grad, total, grad.double().abs().sum((0, 2, 3)), out.numel(), 1)
    near(out.detach(), want, size, terms, 1)
    assert x.grad is not None and w.grad is not None
    near(x.grad, dx, dx_size, 4 + filters * kernel * kernel, 1)
    (_, _, dw), (_, _, dw_size) = twice(product, seen, active, grad)
    near(w.grad, dw, dw_size, 4 + out.numel() // filters, int(weights is BF16))


@pytest.mark.parametrize("weights", [torch.float32, BF16], ids=["autocast", "pure"])
@pytest.mark.parametrize(
    "shape", [(16, 40, 33), (17, 64, 16), (2, 31, 48, 80), (200, 1100, 24), (48, 16, 300)], ids=str
)
def test_linear_layers(shape: tuple[int, ...], weights: torch.dtype) -> None:
    torch.manual_seed(0)
    *rows, inputs, outputs = shape
    x = torch.randn(*rows, inputs).to(BF16).requires_grad_()
    w = torch.randn(outputs, inputs).to(weights).requires_grad_()
    b = torch.randn(outputs).to(BF16).requires_grad_()
    state, threshold = top(w.detach(), 0.2), top(x.detach(), 0.3)
    kept = ops.pack(x.detach(), threshold, 0, "nchw", BF16)
    out = ops.linear(x, w, b, state, kept, sparse_kernels=True)
    grad = torch.randn(out.shape).to(BF16)
    out.backward(grad)
    active = torch.where(w.abs() >= state, w, 0).detach().to(BF16)
    seen = torch.where(x.abs() >= threshold, x, 0).detach()
    (want, dx, _), (size, dx_size, _) = twice(F.linear, x.detach(), active, grad)
    near(out.detach(), want + b.double(), size + b.double().abs(), inputs + 4, 1)
    assert x.grad is not None and w.grad is not None
    near(x.grad, dx, dx_size, outputs + 4, 1)
    (_, _, dw), (_, _, dw_size) = twice(F.linear, seen, active, grad)
    near(w.grad, dw, dw_size, 4 + torch.Size(rows).numel(), int(weights is BF16))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("height", [1, 7])
def test_what_is_not_finite_stays_in_its_image_and_filter(height: int, value: float) -> None:
    """The processor's dot product would carry it to the image, or the filter, beside it."""
    torch.manual_seed(0)
    x = torch.randn(16, 20, height, 7).to(BF16)
    x[4, :, 0, 0] = value
    x = layouts.as_layout(x, BATCH_INNERMOST).requires_grad_()
    w = torch.randn(32, 20, 1, 1).requires_grad_()
    state, threshold = top(w.detach(), 0.5), torch.tensor(0.5, dtype=BF16)
    kept = ops.pack(x.detach(), threshold, 2, "nchw", BF16, BATCH_INNERMOST)
    out = ops.conv(x, w, None, state, kept, [1, 1], [0, 0], [1, 1], 1, layout=BATCH_INNERMOST)
    sound = out.detach().isfinite()
    assert not sound[4, :, 0, 0].any() and int((~sound).sum()) == 32
    grad = torch.randn(out.shape).to(BF16)
    grad[5, 3, 0, 1] = value
    out.backward(layouts.as_layout(grad, BATCH_INNERMOST))
    assert x.grad is not None and w.grad is not None
    assert set((~x.grad.isfinite()).nonzero()[:, 0].tolist()) == {5}
    kept_there = (x.detach()[4, :, 0, 0].abs() >= 0.5) | x.detach()[4, :, 0, 0].isnan()
    wrong = ~w.grad.isfinite().view(32, 20)
    assert wrong[:, kept_there].all()  # all filters met the image's position
    others = [f for f in range(32) if f != 3]
    assert not wrong[others][:, ~kept_there].any()


def test_autocast_runs_them() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(16, 32, 8, 8), torch.randn(32, 32, 3, 3)
    state = top(w, 0.2)
    args = [1, 1], [1, 1], [1, 1], 1
    with torch.autocast("cpu", BF16):
        out = ops.conv(x, w, None, state, None, *args, layout=BATCH_INNERMOST)
    assert out.dtype == BF16 and kernels.instruction_set() != "reference"
    active = torch.where(w.abs() >= state, w, 0).to(BF16).double()
    want = F.conv2d(x.to(BF16).double(), active, padding=1)
    size = F.conv2d(x.to(BF16).double().abs(), active.abs(), padding=1)
    near(out, want, size, 300, 1)
