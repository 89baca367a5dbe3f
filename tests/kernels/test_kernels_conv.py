"""The C kernels of convolution against the plain-torch definition."""

from __future__ import annotations

import pytest
import torch

from swatfx import kernels
from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST
from tests.nets.kernel_calls import SAMPLES, Sample, random_sample, threads

OPS = torch.ops.swatfx
pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_kernel_equals_reference(name: str, count: int) -> None:
    with threads(count):
        SAMPLES[name].check()


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed: int) -> None:
    random_sample(seed).check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 1000))
def test_more_random_shapes(seed: int) -> None:
    random_sample(seed).check(seed)


@pytest.mark.parametrize("name", ["plain", "groups", "odd_batch"])
def test_same_bits_whatever_the_threads(name: str) -> None:
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(SAMPLES[name].run())
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_empty_batch() -> None:
    fast = Sample((0, 8, 6, 6), (16, 8, 3, 3)).run()
    assert fast[0].shape == (0, 16, 4, 4) and not fast[2].any()


def test_ties_at_the_threshold_stay() -> None:
    w = torch.tensor([0.5, -0.5, 0.25, 0.0]).view(1, 4, 1, 1)
    x = layouts.as_layout(
        torch.ones(16, 4, 1, 1) * torch.tensor([1.0, 10, 100, 1000]).view(4, 1, 1), BATCH_INNERMOST
    )
    args = ((1, 1), (0, 0), (1, 1), 1)
    y = OPS.conv(x, w, None, torch.tensor(0.5), None, *args, layout=BATCH_INNERMOST)
    assert torch.equal(y, torch.full((16, 1, 1, 1), 0.5 - 5.0))


def test_nan_weights_reach_the_output() -> None:
    w = torch.full((2, 1, 1, 1), torch.nan)
    x = layouts.as_layout(torch.ones(16, 1, 2, 2), BATCH_INNERMOST)
    args = ((1, 1), (0, 0), (1, 1), 1)
    y = OPS.conv(x, w, None, torch.tensor(0.5), None, *args, layout=BATCH_INNERMOST)
    assert y.isnan().all()


# opcheck looks at the gradients of its own copies, which are no leaves in this layout.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["plain", "stride", "bias", "one_image", "conv1d"])
def test_opcheck(name: str) -> None:
    sample = SAMPLES[name]
    strides = layouts.as_layout(torch.empty(sample.input), BATCH_INNERMOST).stride()
    x = torch.empty_strided(sample.input, strides).normal_().requires_grad_()  # not a view
    w = torch.randn(sample.weight, requires_grad=True)
    b = torch.randn(sample.weight[0], requires_grad=True) if sample.bias else None
    kept = OPS.pack(x.detach(), torch.tensor(0.8), w.dim() - 2, "nchw", x.dtype, BATCH_INNERMOST)
    steps = (sample.stride, sample.padding, sample.dilation, sample.groups)
    args = (x, w, b, torch.tensor(0.7), kept, *steps)
    torch.library.opcheck(OPS.conv, args, {"layout": BATCH_INNERMOST})


@pytest.mark.parametrize("batch", [16, 24, 32])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (1, 1, 1), (1, 2, 0)])
def test_results_that_are_written_around_the_caches(
    batch: int, kernel: int, stride: int, padding: int
) -> None:
    """Large ones of a tap: whole vectors are stored at once, which have to lie at whole ones."""
    torch.manual_seed(0)
    side = 64
    x = layouts.as_layout(torch.randn(batch, 64, side, side), BATCH_INNERMOST).requires_grad_()
    w = torch.randn(64, 64, kernel, kernel, requires_grad=True)
    steps = ([stride] * 2, [padding] * 2, [1, 1], 1)
    with threads(2):
        out = OPS.conv(x, w, None, torch.tensor(1.5), None, *steps, layout=BATCH_INNERMOST)
        grad = layouts.as_layout(torch.randn(out.shape), BATCH_INNERMOST)
        (found,) = torch.autograd.grad(out, x, grad)
    masked = w.detach() * (w.detach().abs() >= 1.5)
    wanted = torch.nn.functional.conv2d(x.detach(), masked, None, stride, padding)
    torch.testing.assert_close(out.detach(), wanted, atol=1e-3, rtol=1e-4)
    back = torch.nn.grad.conv2d_input(x.shape, masked, grad, stride, padding)
    torch.testing.assert_close(found, back, atol=1e-3, rtol=1e-4)
