"""Who keeps elements as bits, bytes or packed values, and who reads them, agree on their order."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx

OPS = torch.ops.swatfx
# Activations (16, 16, 6, 5) by how they lie: dense in some order, or with gaps that a cast closes.
ORDERS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(16, 16, 6, 5),
    "channels last": lambda: torch.randn(16, 6, 5, 16).permute(0, 3, 1, 2),
    "batch innermost": lambda: torch.randn(16, 6, 5, 16).permute(3, 0, 1, 2),
    "turned": lambda: torch.randn(5, 6, 16, 16).permute(3, 2, 1, 0),
    "channels last with gaps": lambda: torch.randn(16, 6, 5, 32)[..., ::2].permute(0, 3, 1, 2),
    "part of channels last": lambda: torch.randn(16, 8, 5, 16).permute(0, 3, 1, 2)[:, :, 1:-1],
    "batch innermost with gaps": lambda: torch.randn(16, 6, 5, 32)[..., ::2].permute(3, 0, 1, 2),
    "rows with gaps": lambda: torch.randn(16, 16, 6, 10)[..., ::2],
    "expanded batch": lambda: torch.randn(1, 16, 6, 5).expand(16, 16, 6, 5),
    "expanded channels last": lambda: (
        torch.randn(1, 6, 5, 16).permute(0, 3, 1, 2).expand(16, -1, -1, -1)
    ),
    "expanded channels": lambda: torch.randn(16, 1, 6, 5).expand(16, 16, 6, 5),
}


def off(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm() / (other.norm() + 1e-6))


def gradients(model: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    leaf = x.detach().requires_grad_()  # lies as x does
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(leaf)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *model.parameters()], grad)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kernels", ["dense", "sparse", "auto"])
@pytest.mark.parametrize("order", ORDERS)
def test_layers_read_what_was_packed(order: str, kernels: str, autocast: bool) -> None:
    """The sum of a tensor read by two convolutions, one of which pads by itself."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
            self.c = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
            self.d = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.d(self.a(x) + self.b(x) + self.c(x)) * self.d(x)
            return y

    torch.manual_seed(0)
    net, x = Net(), ORDERS[order]()
    gm = swatfx.compile(copy.deepcopy(net), "swat-u:0.0,first_dense=False", kernels=kernels)
    for one, other in zip(gradients(gm, x, autocast), gradients(net, x, autocast), strict=True):
        assert off(one, other) < (3e-2 if autocast else 1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_bits_and_bytes_are_read_as_they_were_kept(order: str) -> None:
    torch.manual_seed(0)
    weight, bias = torch.rand(16) + 0.5, torch.randn(16)
    pairs: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "relu": (lambda x: OPS.relu(x)[0], torch.relu),
        "max_pool2d": (
            lambda x: OPS.max_pool2d(x, [3, 2], [2, 1], [1, 1], [1, 1], False)[0],
            lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 1)),
        ),
        "avg_pool2d": (
            lambda x: OPS.avg_pool2d(x, [3, 2], [2, 1], [1, 1], False, True, None),
            lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 1)),
        ),
        "to_layout": (lambda x: OPS.to_layout(x, "batch_innermost"), torch.clone),
    }
    for saves in ("exact", "int8"):
        for residual in (False, True):

            def ours(x: Tensor, saves: str = saves, residual: bool = residual) -> Tensor:
                plus = x.detach() if residual else None
                options = (None, None, True, 0.1, 1e-5, True, saves)
                y: Tensor = OPS.batch_norm(x, plus, weight, bias, *options)[0]
                return y

            def theirs(x: Tensor, residual: bool = residual) -> Tensor:
                y = F.batch_norm(x, None, None, weight, bias, True)
                return torch.relu(y + x.detach() if residual else y)

            pairs[f"batch_norm {saves} {residual}"] = ours, theirs
    for name, (op, eager) in pairs.items():
        x = ORDERS[order]()
        found, wanted = x.detach().requires_grad_(), x.detach().requires_grad_()
        y, expected = op(found), eager(wanted)
        grad = torch.randn(expected.shape)
        y.backward(grad)
        expected.backward(grad)
        assert found.grad is not None and wanted.grad is not None
        assert off(y, expected) < 1e-5, name
        assert off(found.grad, wanted.grad) < (0.05 if "int8" in name else 1e-5), name


@pytest.mark.parametrize("order", ORDERS)
def test_dropout_keeps_what_it_says(order: str) -> None:
    torch.manual_seed(0)
    x = ORDERS[order]().detach().requires_grad_()
    y = OPS.dropout(x, 0.4)[0]
    grad = torch.randn(y.shape)
    y.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(y != 0, grad / 0.6, torch.zeros(())))


@pytest.mark.parametrize("saves", ["exact", "int8"])
@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_saved_tensors_may_come_back_in_another_order(kernels: str, saves: str) -> None:
    """As with `torch.autograd.graph.save_on_cpu(pin_memory=True)`, which forgets strides."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    )
    gm = swatfx.compile(net, "swat-u:0.8", kernels=kernels, norm_saves=saves)
    x, results = torch.randn(16, 3, 12, 12), []
    for forget in (False, True):
        keep = torch.Tensor.contiguous if forget else torch.Tensor.clone
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = gm(x)
        results.append(torch.autograd.grad(y.square().sum(), list(gm.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
