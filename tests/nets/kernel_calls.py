"""Convolutions and linear layers on the C kernels, as calls of their ops."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from swatfx import kernels
from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST

OPS = torch.ops.swatfx


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Sample:
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    bias: bool = False
    channels_last_weight: bool = False
    weight_threshold: float = 0.7
    activation_threshold: float = 0.8
    kept_dtype: torch.dtype | None = None
    sparse: str = "w/wa"
    weight_selector: str = "nchw"

    def run(self, seed: int = 0) -> list[Tensor]:
        """Output and gradients, layouts asserted."""
        torch.manual_seed(seed)
        x = layouts.as_layout(torch.randn(self.input), BATCH_INNERMOST).requires_grad_()
        w = torch.randn(self.weight)
        if self.channels_last_weight:
            w = w.contiguous(memory_format=torch.channels_last)
        w.requires_grad_()
        b = torch.randn(self.weight[0], requires_grad=True) if self.bias else None
        state = torch.tensor(self.weight_threshold)
        if self.weight_selector == "filter":
            state = torch.tensor(self.weight_threshold * w[0].numel())
        spatial = len(self.weight) - 2
        dtype = self.kept_dtype or x.dtype
        a_t = torch.tensor(self.activation_threshold)
        kept = OPS.pack(x.detach(), a_t, spatial, "nchw", dtype, BATCH_INNERMOST)
        options = {
            "sparse": self.sparse,
            "weight_selector": self.weight_selector,
            "layout": BATCH_INNERMOST,
            "kept_dtype": self.kept_dtype,
        }
        if "a" in self.sparse.partition("/")[0]:
            options["activation_state"] = a_t
        if "g" in self.sparse:
            options["gradient_density"] = "1/2"
        steps = (self.stride, self.padding, self.dilation, self.groups)
        y = OPS.conv(x, w, b, state, kept, *steps, **options)
        grad = torch.randn_like(y)
        y.backward(grad)
        assert y.is_contiguous() or layouts.layout_of(y) == BATCH_INNERMOST
        assert x.grad is not None and w.grad is not None
        assert layouts.layout_of(x.grad) == layouts.layout_of(x)
        assert w.grad.stride() == w.stride()
        return [y.detach(), x.grad, w.grad, *([] if b is None else [b.grad])]

    def check(self, seed: int = 0) -> None:
        fast = self.run(seed)
        with kernels.reference_only():
            expected = self.run(seed)
        for one, other in zip(fast, expected, strict=True):
            # Sums of hundreds of products in another order.
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


SAMPLES = {
    "plain": Sample((32, 20, 9, 10), (24, 20, 3, 3), padding=(1, 1)),
    "pointwise": Sample((16, 40, 5, 7), (33, 40, 1, 1)),
    "pointwise_ragged": Sample((5, 40, 5, 7), (33, 40, 1, 1)),
    "pointwise_stride": Sample((16, 24, 9, 8), (32, 24, 1, 1), stride=(2, 2)),
    "stride": Sample((16, 8, 11, 12), (16, 8, 3, 3), stride=(2, 2), padding=(1, 1)),
    "sides": Sample((16, 8, 11, 12), (16, 8, 5, 2), (3, 1), (2, 0), (1, 2)),
    "dilation": Sample((16, 8, 11, 12), (16, 8, 3, 3), padding=(2, 2), dilation=(2, 2)),
    "groups": Sample((16, 32, 6, 6), (64, 8, 3, 3), padding=(1, 1), groups=4),
    "depthwise": Sample((16, 8, 6, 6), (8, 1, 3, 3), padding=(1, 1), groups=8),
    "depthwise_stride": Sample((17, 40, 9, 7), (40, 1, 5, 5), (2, 2), (2, 2), groups=40, bias=True),
    "depthwise_1d": Sample((32, 9, 30), (9, 1, 3), (1,), (1,), (1,), 9),
    "bias": Sample((16, 8, 6, 6), (20, 8, 3, 3), bias=True),
    "last": Sample((16, 8, 6, 6), (20, 8, 3, 3), channels_last_weight=True),
    "large_kernel": Sample((16, 3, 20, 21), (16, 3, 11, 11), stride=(4, 4), padding=(5, 5)),
    "one_image": Sample((1, 8, 9, 9), (16, 8, 3, 3), padding=(1, 1)),
    "one_channel": Sample((16, 1, 9, 9), (1, 1, 3, 3)),
    "odd_batch": Sample((37, 8, 9, 9), (16, 8, 3, 3), padding=(1, 1)),
    "one_position": Sample((16, 8, 3, 3), (16, 8, 3, 3)),
    "deep": Sample((16, 300, 4, 4), (64, 300, 3, 3), padding=(1, 1)),
    "wide": Sample((16, 8, 2, 70), (16, 8, 3, 3), padding=(1, 1)),
    "conv1d": Sample((16, 8, 30), (16, 8, 3), (2,), (1,), (1,)),
    "all_kept": Sample((16, 8, 6, 6), (16, 8, 3, 3), weight_threshold=0, activation_threshold=0),
    "none_kept": Sample((16, 8, 6, 6), (16, 8, 3, 3), weight_threshold=9, activation_threshold=9),
    "bf16": Sample((16, 8, 6, 6), (16, 8, 3, 3), kept_dtype=torch.bfloat16),
    "saw": Sample((16, 8, 6, 6), (16, 8, 3, 3), sparse="/wa"),
    "forward_activation": Sample((16, 8, 6, 6), (16, 8, 3, 3), sparse="wa/wa"),
    "meprop": Sample((16, 8, 6, 6), (16, 8, 3, 3), sparse="w/wag"),
    "active_only": Sample((16, 8, 6, 6), (16, 8, 3, 3), sparse="w/wa!"),
    "filter": Sample((16, 8, 6, 6), (16, 8, 3, 3), weight_selector="filter"),
}


def random_sample(seed: int) -> Sample:
    pick = random.Random(seed)
    groups = pick.choice([1, 1, 1, 2, 4])
    channels, filters = pick.choice([1, 3, 16, 33]), pick.choice([1, 2, 5, 16, 40, 64])
    kernel = (pick.choice([1, 1, 2, 3, 5]), pick.choice([1, 2, 3, 3, 7]))
    dilation = (pick.choice([1, 1, 2]), pick.choice([1, 1, 2, 3]))
    stride, padding = ((pick.randint(1, 3), pick.randint(1, 3)) for _ in range(2))
    size = tuple(d * (k - 1) + pick.randint(1, 12) for d, k in zip(dilation, kernel, strict=True))
    return Sample(
        (pick.choice([1, 2, 5, 8, 15, 16, 17, 32, 40]), channels * groups, *size),
        (filters * groups, channels, *kernel),
        stride,
        padding,
        dilation,
        groups,
        pick.random() < 0.5,
        pick.random() < 0.3,
        pick.choice([0, 0.7, 1.5, 9]),
        pick.choice([0, 0.5, 1.5, 9]),
    )


def run_linear(
    shape: tuple[int, ...],
    outputs: int,
    *,
    bias: bool = True,
    weight_threshold: float = 0.7,
    activation_threshold: float = 0.8,
    kept_dtype: torch.dtype | None = None,
    sparse: str = "w/wa",
    transposed_weight: bool = False,
) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    w = torch.randn(outputs, shape[-1])
    w = (w.t().contiguous().t() if transposed_weight else w).requires_grad_()
    b = torch.randn(outputs, requires_grad=True) if bias else None
    a_t = torch.tensor(activation_threshold)
    kept = OPS.pack(x.detach(), a_t, 0, "nchw", kept_dtype or x.dtype, "row_major")
    options = {"sparse": sparse, "kept_dtype": kept_dtype, "sparse_kernels": True}
    if "a" in sparse.partition("/")[0]:
        options["activation_state"] = a_t
    if "g" in sparse:
        options["gradient_density"] = "1/2"
    y = OPS.linear(x, w, b, torch.tensor(weight_threshold), kept, **options)
    y.backward(torch.randn_like(y))
    assert x.grad is not None and w.grad is not None
    return [y.detach(), x.grad, w.grad, *([] if b is None else [b.grad])]
