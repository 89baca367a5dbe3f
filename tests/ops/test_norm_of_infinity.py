"""Norms on running statistics: their input gradient is of the output gradient alone."""

import pytest
import torch

from swatfx.ops.norm import batch_norm
from swatfx.tensors import layouts


@pytest.mark.parametrize(
    "layout", [layouts.ROW_MAJOR, layouts.CHANNELS_LAST, layouts.BATCH_INNERMOST]
)
@pytest.mark.parametrize("saves", ["exact", "int8", "int4"])
@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
def test_an_infinite_input_has_a_finite_gradient(odd: float, saves: str, layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 16, 5, 4)
    x[3, 2, 1, 1] = odd
    weight, mean, var = torch.rand(16) + 0.5, torch.randn(16), torch.rand(16) + 0.5
    weight.requires_grad_()
    given = layouts.as_layout(x, layout).requires_grad_()
    out = batch_norm(given, None, weight, None, mean, var, False, 0.1, 1e-5, False, saves)[0]
    grad = torch.randn(x.shape)
    found = torch.autograd.grad(out, (given, weight), layouts.as_layout(grad, layout))[0]
    scale = (weight / (var + 1e-5).sqrt()).detach().view(-1, 1, 1)
    torch.testing.assert_close(found, grad * scale)
