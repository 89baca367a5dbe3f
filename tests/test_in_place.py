"""Whatever writes in place behind a layer: values and gradients are eager's, where kernels run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx

BATCH = 16  # a vector's lanes: from here on sparse kernels are taken
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "hardsigmoid": lambda: nn.Hardsigmoid(inplace=True),
    "hardtanh": lambda: nn.Hardtanh(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "mish": lambda: nn.Mish(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "selu": lambda: nn.SELU(inplace=True),
    "celu": lambda: nn.CELU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.1, inplace=True),
    "rrelu": lambda: nn.RReLU(0.2, 0.2, inplace=True),
    "threshold": lambda: nn.Threshold(0.1, 0.5, inplace=True),
    "dropout": lambda: nn.Dropout(0.3, inplace=True),
    "alpha_dropout": lambda: nn.AlphaDropout(0.3, inplace=True),
    "relu_": lambda: Writes(torch.relu_),
    "tanh_": lambda: Writes(torch.tanh_),
    "sigmoid_": lambda: Writes(lambda x: x.sigmoid_()),
    "add_": lambda: Writes(lambda x: x.add_(1)),
    "mul_": lambda: Writes(lambda x: x.mul_(2)),
    "iadd": lambda: Writes(_iadd),
    "slice": lambda: Writes(_into_a_slice),
    "functional": lambda: Writes(lambda x: F.leaky_relu(x, 0.2, inplace=True)),
}


class Writes(nn.Module):
    """A function that writes into its input."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x)


def _iadd(x: Tensor) -> Tensor:
    x += 1
    x *= 0.5
    return x


def _into_a_slice(x: Tensor) -> Tensor:
    x[:, :2] *= 3
    return x


# Behind a layer of 24 channels, its input of 16.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 24), (16,)),
    "linear of a sequence": (lambda: nn.Linear(16, 24), (5, 16)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3), (16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (16, 6, 5)),
    "pointwise": (lambda: nn.Conv2d(16, 24, 1), (16, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(16, 24, 2), (16, 3, 4, 3)),
    # Without a bias: a norm takes it out again, so that its gradient is nothing but rounding.
    "norm": (
        lambda: nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)),
        (16, 4, 4),
    ),
    "norm of vectors": (
        lambda: nn.Sequential(nn.Linear(16, 24, bias=False), nn.BatchNorm1d(24)),
        (16,),
    ),
    "pool": (lambda: nn.Sequential(nn.Conv2d(16, 24, 1), nn.MaxPool2d(2)), (16, 4, 4)),
    "mean": (lambda: nn.Sequential(nn.Conv2d(16, 24, 1), nn.AvgPool2d(2)), (16, 4, 4)),
}


class Net(nn.Module):
    """A layer, what writes into its result, and a reader of that."""

    def __init__(self, layer: str, activation: str) -> None:
        super().__init__()
        self.layer, self.act = LAYERS[layer][0](), ACTIVATIONS[activation]()
        self.size = LAYERS[layer][1]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.layer(x))
        return y * y


@pytest.mark.parametrize(
    "autocast",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["float32", "autocast"],
)
@pytest.mark.parametrize(
    "kernels", ["sparse", "dense", pytest.param("auto", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_activations_that_write_in_place(layer: str, kernels: str, autocast: bool) -> None:
    for activation in ACTIVATIONS:
        torch.manual_seed(0)
        net = Net(layer, activation)
        x = torch.randn(BATCH, *net.size)
        results = []
        compiled = swatfx.compile(
            copy.deepcopy(net), "swat-u:0.0,first_dense=False", kernels=kernels
        )
        for model in (net, compiled):
            torch.manual_seed(1)  # dropout draws alike
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = model(leaf)
            parameters = list(model.parameters())
            # Not of a plain sum, whose gradient a norm takes out.
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
            results.append([y, *torch.autograd.grad(y, [leaf, *parameters], grad)])
        if "dropout" in activation and kernels == "sparse":
            continue  # drawn in memory order, which sparse kernels choose; that it trains is all
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype, activation
            # Density 1 at float32 is another order of summation; autocast rounds sums to bf16.
            limit = 3e-2 if autocast else 1e-5
            off = (one.float() - other.float()).norm() / (other.float().norm() + 1e-6)
            assert off < limit, f"{activation}: off by {off:.2g}"
