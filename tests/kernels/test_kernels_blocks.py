"""Products with weights in blocks, whose rows run in groups: against plain formulas in float64.

What may differ is one rounding of the result to its dtype, and what float32 sums lose: 2^-24 a
term, of the sum of magnitudes. `SWATFX_KERNELS=avx2 pytest` runs the other instruction set.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx import ops, selectors
from swatfx.density import Density
from swatfx.ops.where import active_weight
from swatfx.selectors import Axes
from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST

pytestmark = pytest.mark.usefixtures("no_references")

DTYPES = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
# batch, groups, channels, filters, height, width, kernel, stride, padding, sparsity
CASES = [
    (16, 1, 12, 16, 7, 7, 3, 1, 1, 0.7),
    (32, 1, 9, 18, 5, 13, 3, 1, 1, 0.5),  # no multiples of four; an odd number of columns
    (16, 1, 16, 33, 1, 29, 1, 1, 0, 0.6),  # read where it lies, more than one call a row
    (16, 1, 16, 16, 6, 28, 1, 1, 0, 0.0),  # everything
    (1, 1, 8, 16, 9, 9, 3, 1, 1, 0.7),
    (15, 2, 16, 24, 6, 6, 3, 1, 1, 0.5),
    (17, 2, 24, 40, 6, 6, 3, 1, 1, 0.5),
    (33, 1, 8, 16, 5, 5, 3, 2, 1, 0.5),
    (16, 1, 600, 12, 4, 4, 3, 1, 1, 0.95),  # channels in blocks, some empty
    (16, 24, 24, 24, 5, 5, 3, 1, 1, 0.5),  # depthwise
    (48, 1, 8, 70, 5, 9, 5, 3, 2, 0.8),
]


def near(got: Tensor, want: Tensor, magnitudes: Tensor, terms: int) -> None:
    bound = want.abs() * DTYPES[got.dtype] + magnitudes * (terms * 2**-24) + 1e-30
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= bound).all())


def magnitude(x: Tensor) -> Tensor:
    return x.double().abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["block-4x1", "block-1x4", "block-4x4", "block-8x3"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case: tuple[float, ...], name: str, dtype: torch.dtype) -> None:
    batch, groups, channels, filters, height, width, kernel, stride, padding = map(int, case[:9])
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width).to(dtype)
    x = layouts.as_layout(x, BATCH_INNERMOST).requires_grad_()
    w = torch.randn(filters, channels // groups, kernel, kernel).requires_grad_()
    b = torch.randn(filters).to(dtype) if batch % 2 else None
    density = Density.from_sparsity(case[9])
    state = selectors.get(name).state(w.detach(), density, Axes(0, 1), 0)
    steps = [stride] * 2, [padding] * 2, [1, 1], groups
    kept = ops.pack(x.detach(), torch.zeros((), dtype=dtype), 2, "nchw", dtype, BATCH_INNERMOST)
    out = ops.conv(x, w, b, state, kept, *steps, weight_selector=name, layout=BATCH_INNERMOST)
    grad = layouts.as_layout(torch.randn(out.shape).to(dtype), BATCH_INNERMOST)
    out.backward(grad)
    used = active_weight(w.detach(), state, name, dtype).double()
    found = []
    for convert in (Tensor.double, magnitude):
        inner = convert(x.detach()).requires_grad_()
        bias = None if b is None else convert(b)
        y = F.conv2d(inner, convert(used), bias, stride, padding, 1, groups)
        found.append((y.detach(), torch.autograd.grad(y, inner, convert(grad))[0]))
    terms = 4 + max(channels, filters) * kernel * kernel // groups
    near(out.detach(), found[0][0], found[1][0], terms)
    assert x.grad is not None
    near(x.grad, found[0][1], found[1][1], terms)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_image(value: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 5, 5).bfloat16()
    x[3, 2] = value
    x = layouts.as_layout(x, BATCH_INNERMOST)
    w, state = torch.randn(16, 8, 3, 3), torch.zeros(())
    steps = [1, 1], [1, 1], [1, 1], 1
    out = ops.conv(
        x, w, None, state, None, *steps, weight_selector="block-4x1", layout=BATCH_INNERMOST
    )
    others = torch.arange(16) != 3
    assert out[others].isfinite().all() and not out[3].isfinite().any()
