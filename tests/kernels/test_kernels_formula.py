"""The C kernels against the paper's formulas in float64, where shapes reach their special cases."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
import torch

from swatfx import kernels
from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST
from tests.nets import formulas

OPS = torch.ops.swatfx
pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
BATCHES = (1, 15, 16, 17, 31, 32, 33)  # about the lanes of a vector, and about two of them


@dataclass(frozen=True)
class Conv:
    """One call of `swatfx::conv` and its backward."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    weight_threshold: float = 0.7
    activation_threshold: float = 0.8
    weight_order: torch.memory_format = torch.contiguous_format

    def check(self, seed: int = 0) -> None:
        """Compare output and all gradients with the formula."""
        torch.manual_seed(seed)
        x = layouts.as_layout(torch.randn(self.input), BATCH_INNERMOST).requires_grad_()
        w = torch.randn(self.weight).contiguous(memory_format=self.weight_order).requires_grad_()
        b = torch.randn(self.weight[0], requires_grad=True) if self.bias else None
        spatial, state = w.dim() - 2, torch.tensor(self.activation_threshold)
        kept = OPS.pack(x.detach(), state, spatial, "nchw", x.dtype, BATCH_INNERMOST)
        steps = (self.stride, self.padding, self.dilation, self.groups)
        weight_state = torch.tensor(self.weight_threshold)
        y = OPS.conv(x, w, b, weight_state, kept, *steps, layout=BATCH_INNERMOST)
        grad = torch.randn_like(y)
        y.backward(grad)
        found = [y, x.grad, w.grad, *([] if b is None else [b.grad])]
        call = formulas.conv_of(w, *steps)
        wanted = formulas.layer(
            call, x, w, b, grad, self.weight_threshold, self.activation_threshold
        )
        formulas.assert_equal([t.detach() for t in found if t is not None], wanted)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("filters", [15, 16, 33])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_weights_in_channels_last(
    channels: int, filters: int, kernel: tuple[int, int], stride: int
) -> None:
    """Their gradients are written sixteen channels by sixteen filters at a time."""
    steps = ((stride, stride), (1, 0), (1, 1))
    weight = (filters, channels, *kernel)
    Conv((17, channels, 5, 6), weight, *steps, weight_order=torch.channels_last).check()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_vectors(batch: int, stride: int) -> None:
    """1d: of height 1, so that a phase of the input gradient may be a shifted pointwise product."""
    for kernel, padding, dilation in itertools.product((1, 2, 3, 4), (0, 1, 3), (1, 2)):
        steps = (stride,), (padding,), (dilation,)
        Conv((batch, 8, 24), (16, 8, kernel), *steps).check()


@pytest.mark.parametrize("batch", BATCHES)
def test_images_of_which_one_row_is_read(batch: int) -> None:
    for height, stride in itertools.product((1, 2, 3, 5), ((1, 1), (1, 2), (5, 1), (2, 2))):
        for padding in ((0, 0), (0, 2), (1, 0)):
            Conv((batch, 8, height, 11), (16, 8, 1, 1), stride, padding, (1, 1)).check()
        if height > 1:  # a result of height 1
            steps = stride, (0, 1), (1, 2)
            Conv((batch, 8, height, 11), (16, 8, height, 2), *steps).check()
            Conv((batch, 8, height, 11), (16, 8, height, 1), *steps).check()


def random_conv(seed: int) -> Conv:
    """Strided, padded, dilated and grouped, in 1d or 2d."""
    pick = random.Random(seed)
    dims, groups = pick.choice([1, 2]), pick.choice([1, 1, 1, 2, 3])
    channels, filters = pick.choice([1, 3, 8, 17, 33]), pick.choice([1, 5, 16, 24])
    kernel = [pick.choice([1, 1, 2, 3, 4]) for _ in range(dims)]
    stride = tuple(pick.choice([1, 1, 2, 3, 5]) for _ in range(dims))
    dilation = tuple(pick.choice([1, 1, 2, 3]) for _ in range(dims))
    padding = tuple(pick.choice([0, 0, 1, 2, 4]) for _ in range(dims))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + pick.choice([0, 0, 1, 4, 9])
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    return Conv(
        (pick.choice(BATCHES), channels * groups, *size),
        (filters * groups, channels, *kernel),
        stride,
        padding,
        dilation,
        groups,
        pick.random() < 0.5,
        pick.choice([0.0, 0.7, 1.5]),
        pick.choice([0.0, 0.8, 1.5]),
    )


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_convolutions(first: int) -> None:
    for seed in range(first, first + 100):
        random_conv(seed).check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(400, 10_000, 400))
def test_more_random_convolutions(first: int) -> None:
    for seed in range(first, first + 400):
        random_conv(seed).check(seed)
