"""Networks wide enough for sparse kernels, and how two compilations of one are compared.

Inputs are (N, 3, 8, 8) unless said. Each has a first layer that SWAT-U keeps dense.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx.compiled.layers import all_plans
from swatfx.compiled.module import SwatModule
from swatfx.compiled.parts import all_parts
from swatfx.kernels import conv as conv_kernels
from swatfx.kernels import linear as linear_kernels
from swatfx.ops.layout import laid_out
from tests.nets.small_nets import loss_of


def forbid_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no reference of a layer may run."""

    def fail(*args: Any) -> None:
        raise AssertionError("a reference ran")

    for module, name in ((conv_kernels, "conv"), (linear_kernels, "linear")):
        monkeypatch.setattr(module, f"{name}_reference", fail)
        monkeypatch.setattr(module, f"{name}_backward_reference", fail)


def block(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    conv = nn.Conv2d(inputs, outputs, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def chain() -> nn.Sequential:
    return nn.Sequential(
        block(3, 16),
        block(16, 16),
        nn.MaxPool2d(2),
        block(16, 32, stride=2),
        nn.Conv2d(32, 24, 1),
        nn.AvgPool2d(2),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


class WideBlock(nn.Module):
    """A residual block whose shortcut and first convolution share one packed input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


def residual() -> nn.Sequential:
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(block(3, 16), WideBlock(16, 16, 1), WideBlock(16, 32, 2), *tail)


class Separable(nn.Module):
    """Depthwise and pointwise, grouped, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.depthwise = block(16, 16, groups=16)
        self.pointwise = block(16, 32, kernel_size=1, padding=0)
        self.grouped = block(32, 64, groups=2)
        self.squeeze = nn.Conv2d(64, 16, 1)
        self.excite = nn.Conv2d(16, 64, 1)
        self.last = nn.Conv2d(64, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.pointwise(self.depthwise(self.stem(x))))
        scale = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = x * torch.sigmoid(self.excite(scale))
        return self.fc(self.last(x).mean((2, 3)))


class Dilated(nn.Module):
    """Dilation, a reflecting layer among the others, and a kernel of two extents."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.dilated = block(16, 16, dilation=2, padding=2)
        self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.uneven = nn.Conv2d(16, 20, (1, 5), padding=(0, 2), stride=(2, 1))
        self.same = nn.Conv2d(20, 16, 2, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.reflect(self.dilated(self.stem(x))))
        return self.same(torch.tanh(self.uneven(x)))


class OneDimensional(nn.Module):
    """(N, 3, 8, 8), read as (N, 3, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm1d(16)
        self.b = nn.Conv1d(16, 32, 5, stride=2)
        self.c = nn.Conv1d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.a(x.flatten(2))).relu()
        return self.c(F.gelu(self.b(x))).transpose(1, 2)


class ThreeDimensional(nn.Module):
    """(N, 3, 8, 8), read as (N, 1, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(1, 16, 3, padding=1)
        self.b = nn.Conv3d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x[:, None]).relu()).mean(2)


class Functional(nn.Module):
    """Weights that are parameters of the module, one of them computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.plain = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.direction = nn.Parameter(torch.randn(16, 16, 3, 3))
        self.length = nn.Parameter(torch.rand(16, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.relu(self.stem(x)), self.plain, padding=1)
        norm = self.direction.square().sum((1, 2, 3), keepdim=True).sqrt()
        weight = self.length * self.direction / norm
        return F.conv2d(F.relu(x), weight, padding=1)


def parametrized() -> nn.Sequential:
    net = nn.Sequential(block(3, 16), block(16, 16), block(16, 16), nn.Conv2d(16, 16, 3))
    nn.utils.parametrizations.weight_norm(net[1][0])
    nn.utils.parametrizations.spectral_norm(net[3])
    return net


class Island(nn.Module):
    """Looks at values, and at strides: `view` merges image and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        if bool(torch.isfinite(x).all()):
            x = self.a(x).relu()
        n, c, h, w = x.shape
        x = x.view(n * c, h, w).mul(2).view(n, c, h, w)
        return self.b(x)


class Islands(nn.Module):
    """Eager modules between sparse layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.before = block(16, 16)
        self.island = Island()
        self.after = block(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.island(self.before(self.stem(x))))


class Shuffled(nn.Module):
    """Reads sizes and views, as channel shuffling does, and concatenates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.a = block(16, 16)
        self.b = block(32, 16)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.c = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * (self.scale * 2)
        y = self.a(x) * x.size(2)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        y = self.b(torch.cat([x, y], 1)) + x.mean()
        return self.c(y).view(n * 16, -1).view(n, 16 * h * w)


class Overwritten(nn.Module):
    """Writes into tensors that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x * 1)
        x.add_(0.1)
        F.relu(x, inplace=True)
        z = self.b(x)
        z += x
        return self.c(z.relu_()) + x + y


def ending() -> nn.Sequential:
    """Ends in a convolution, whose result the caller views."""
    return nn.Sequential(block(3, 16), block(16, 16), nn.Conv2d(16, 16, 1), nn.ReLU())


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "residual": residual,
    "separable": Separable,
    "dilated": Dilated,
    "conv1d": OneDimensional,
    "conv3d": ThreeDimensional,
    "functional": Functional,
    "parametrized": parametrized,
    "islands": Islands,
    "shuffled": Shuffled,
    "overwritten": Overwritten,
    "ending": ending,
}


def pair(
    build: Callable[[], nn.Module],
    policy: str | swatfx.Policy = "swat-u:0.8,period=4",
    kernels: str = "sparse",
    seed: int = 0,
) -> tuple[SwatModule, SwatModule]:
    """The same network compiled for sparse and for dense kernels, parameters not shared."""
    torch.manual_seed(seed)
    model = build()
    twin = copy.deepcopy(model)
    sparse = swatfx.compile(model, policy, kernels=kernels)
    return sparse, swatfx.compile(twin, policy, kernels="dense")


def chosen(gm: SwatModule) -> dict[str, str]:
    """Layer -> its kernels, of layers that take part."""
    return {name: plan.kernels for name, plan in all_plans(gm).items() if plan.takes_part}


def conversions(gm: SwatModule) -> list[tuple[str, str]]:
    """(tensor, layout) of every conversion, in order."""
    return [
        (str(node.args[0]), str(node.args[1]))
        for _, part in all_parts(gm)
        for node in part.graph.nodes
        if node.target is laid_out
    ]


def assert_close(one: Tensor, other: Tensor, what: str, some_may_differ: bool) -> None:
    """Equal up to sums in another order; a few elements not even so, if `some_may_differ`."""
    if some_may_differ:
        error = float((one - other).norm())
        assert error <= 0.02 * float(other.norm()) + 1e-6, f"{what}: {error}"
        return
    scale = float(other.abs().max()) if other.numel() else 0.0
    torch.testing.assert_close(
        one, other, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=lambda text: f"{what}: {text}"
    )


def assert_equal_training(
    sparse: SwatModule, dense: SwatModule, data: Sequence[Tensor], backward: bool = True
) -> None:
    """Outputs, gradients of parameters and input, parameters and buffers, at every step.

    Rounding may lift another activation over the threshold, and a weight's gradient then lacks one
    product of many and has another.
    """
    plans = all_plans(dense).values()
    exact = all(plan.activation_density.is_dense for plan in plans)
    pairs = [
        (gm, torch.optim.SGD(gm.parameters(), lr=0.02, momentum=0.9)) for gm in (sparse, dense)
    ]
    for step, x in enumerate(data):
        seen: list[dict[str, Tensor]] = []
        for gm, optimizer in pairs:
            optimizer.zero_grad()
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = gm(given)
            found = {"output": y.detach().clone()}
            if backward:
                loss_of(y).backward()
                assert given.grad is not None
                found["input gradient"] = given.grad
                grads = {n: p.grad for n, p in gm.named_parameters() if p.grad is not None}
                found |= {f"gradient of {name}": grad.clone() for name, grad in grads.items()}
                optimizer.step()
            found |= {name: p.detach().clone() for name, p in gm.named_parameters()}
            found |= {name: b.clone() for name, b in gm.named_buffers()}
            seen.append(found)
        assert list(seen[0]) == list(seen[1])
        for name, value in seen[0].items():
            assert value.shape == seen[1][name].shape, name
            some_may_differ = not exact and value.is_floating_point() and name != "output"
            assert_close(value, seen[1][name], f"step {step}, {name}", some_may_differ)
