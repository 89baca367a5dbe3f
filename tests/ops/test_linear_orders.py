"""Linear layers whose input lies in any memory order: what is packed is read back as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from tests.nets import formulas

FEATURES = 24
KERNELS = ("dense", "sparse", "auto")
# Inputs (*any, FEATURES) of 16 rows and more, by how they lie in memory.
ORDERS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(5, 7, FEATURES),
    "matrix": lambda: torch.randn(33, FEATURES),
    "transposed matrix": lambda: torch.randn(FEATURES, 33).t(),
    "features outermost": lambda: torch.randn(FEATURES, 5, 7).permute(1, 2, 0),
    "sequence first": lambda: torch.randn(5, 7, FEATURES).transpose(0, 1),
    "batch innermost": lambda: torch.randn(7, FEATURES, 5).permute(2, 0, 1),
    "channels last": lambda: torch.randn(4, FEATURES, 3, 5).permute(0, 2, 3, 1),
    "features innermost but one": lambda: torch.randn(4, 3, FEATURES, 5).transpose(2, 3),
    "windows": lambda: torch.randn(2, 4, 3, 5, FEATURES).permute(0, 3, 1, 2, 4),
    "batch innermost of five": lambda: torch.randn(2, 3, 2, FEATURES, 4).permute(4, 0, 1, 2, 3),
    "expanded": lambda: torch.randn(1, 7, FEATURES).expand(5, 7, FEATURES),
    "expanded features": lambda: torch.randn(5, 7, 1).expand(5, 7, FEATURES),
    "every other row": lambda: torch.randn(10, 7, FEATURES)[::2],
    "every other feature": lambda: torch.randn(5, 7, 2 * FEATURES)[..., ::2],
    "part of a row": lambda: torch.randn(5, 7, FEATURES + 3)[..., 1:-2],
    "batch of vectors": lambda: torch.randn(16, FEATURES, 1).transpose(1, 2),
    "one row": lambda: torch.randn(FEATURES),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_gradients_are_those_of_the_formula(order: str, kernels: str, sparsity: float) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(FEATURES, 20), ORDERS[order]().requires_grad_()
    gm = swatfx.compile(layer, f"swat-u:{sparsity},first_dense=False", kernels=kernels)
    y = gm(x)
    grad = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)]
    thresholds = (kept_from(layer.weight, sparsity), kept_from(x, sparsity))
    wanted = formulas.layer(F.linear, x, layer.weight, layer.bias, grad, *thresholds)
    formulas.assert_equal([t.detach() for t in found], wanted)


@pytest.mark.parametrize("selector", ["chw", "hw"])
@pytest.mark.parametrize("order", ORDERS)
def test_scopes_of_activations_do_not_matter_at_full_density(order: str, selector: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(FEATURES, 20), ORDERS[order]()
    if selector == "chw" and x.dim() < 2:
        pytest.skip("one sample has no batch")
    policy = f"swat-u:0.0,first_dense=False,activation_selector={selector}"
    y = swatfx.compile(layer, policy, kernels="sparse")(x)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, layer.weight, grad)
    wanted = formulas.layer(F.linear, x, layer.weight, None, grad, 0.0, 0.0)[2]
    formulas.assert_equal([found], [wanted])


def kept_from(x: Tensor, sparsity: float) -> float:
    """The magnitude from which on an element is among the Top-K."""
    flat = x.detach().abs().flatten()
    k = flat.numel() - int(sparsity * flat.numel())
    return 0.0 if k == flat.numel() else float(flat.sort(descending=True).values[k - 1])


@pytest.mark.parametrize("kernels", KERNELS)
def test_two_layers_share_what_was_packed(kernels: str) -> None:
    """Two readers of one permuted tensor."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv1d(8, FEATURES, 1)
            self.a, self.b = nn.Linear(FEATURES, 16), nn.Linear(FEATURES, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).permute(2, 0, 1)
            y: Tensor = self.a(x) * self.b(x)
            return y

    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 8, 10)
    wanted = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    gm = swatfx.compile(net, "swat-u:0.0", kernels=kernels)
    found = torch.autograd.grad(gm(x).sum(), list(net.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
