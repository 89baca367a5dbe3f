"""Weight gradients at active weights alone: against plain formulas in float64.

Float32 sums of n products lose 2^-24 a term at most, of the sum of magnitudes; bfloat16 operands
are exact in float32, and so are their products.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import swatfx
from swatfx import kernels, ops
from swatfx.compiled.layers import sparse_layers
from swatfx.kernels import conv as conv_kernels
from swatfx.tensors import bits, layouts
from swatfx.tensors.layouts import BATCH_INNERMOST
from tests.kernels.test_kernels_products_bf16 import CASES as PRODUCTS
from tests.nets.kernel_calls import threads
from tests.nets.masked_twin import assert_masked_gradients, network, step

OPS = torch.ops.swatfx
BF16 = torch.bfloat16
CASES = [
    # Groups, channels and filters of a group.
    *((n, g, c // g, f // g, *rest) for n, g, c, f, *rest in PRODUCTS),
    (16, 1, 64, 32, 4, 4, 3, 1, 1, 1),
    (128, 1, 96, 16, 4, 4, 3, 1, 1, 1),  # several blocks of images in a tile
    (40, 1, 24, 16, 3, 3, 3, 1, 1, 1),
    (2, 1, 8, 16, 40, 300, 3, 1, 1, 1),  # rows wider than a tile
    (16, 3, 8, 5, 9, 8, 4, 3, 3, 2),
    (1, 1, 700, 20, 5, 5, 5, 1, 2, 1),
    (32, 20, 1, 1, 4, 4, 3, 1, 1, 1),  # depthwise
    (17, 3, 1, 1, 70, 80, 5, 1, 2, 1),
    (3, 3, 7, 5, 4, 4, 3, 1, 1, 1),  # groups whose bits begin within a byte
]


def conv_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, keep: Tensor, steps: Any, opened: Tensor | None = None
) -> Tensor:
    call = ops.calls.ConvCall(
        *steps, sparse="w/w!", weight_selector="held:nchw", layout=BATCH_INNERMOST, open=opened
    )
    lain = [layouts.as_layout(t, BATCH_INNERMOST) for t in (grad, x)]
    saved = (*lain, None, weight, bits.mask_to_bits(keep), list(x.shape), [False, True, False])
    _, found, _ = OPS.conv_backward(*saved, *call.options)
    return found


def dense_gradient(x: Tensor, grad: Tensor, weight: Tensor, steps: Any) -> Tensor:
    return torch.nn.grad.conv2d_weight(x, list(weight.shape), grad, *steps)


@pytest.mark.usefixtures("no_references")
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    "density",
    [pytest.param(0.0, marks=pytest.mark.slow), 0.1, pytest.param(1.0, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(case: tuple[int, ...], density: float, dtype: torch.dtype) -> None:
    batch, groups, channels, filters, height, width, kernel, stride, padding, dilation = case
    torch.manual_seed(sum(case))
    x = torch.randn(batch, channels * groups, height, width).to(dtype)
    weight = torch.randn(filters * groups, channels, kernel, kernel)
    keep = torch.rand_like(weight) < density
    steps = (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups
    grad = torch.nn.functional.conv2d(x.float(), weight, None, *steps)
    grad = torch.randn_like(grad).to(dtype)
    found = conv_gradient(x, grad, weight, keep, steps)
    wide = [t.double() for t in (x, grad, weight)]
    wanted = dense_gradient(*wide, steps) * keep
    most = dense_gradient(wide[0].abs(), wide[1].abs(), wide[2], steps)
    terms = grad[:, 0].numel()
    assert ((found - wanted).abs() <= terms * 2**-24 * most).all()
    assert (found[~keep] == 0).all()
    with threads(3):
        assert torch.equal(conv_gradient(x, grad, weight, keep, steps), found)


@pytest.mark.usefixtures("no_references")
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_weights_in_several_blocks(order: torch.memory_format) -> None:
    """Forward and input gradient: a filter's weights lie by channel, or by position."""
    torch.manual_seed(0)
    x, grad = torch.randn(16, 700, 5, 5), torch.randn(16, 20, 5, 5)
    weight = torch.randn(20, 700, 3, 3).contiguous(memory_format=order)
    keep = torch.rand(weight.shape) < 0.2
    call = ops.calls.ConvCall(
        *((1, 1), (1, 1), (1, 1), 1),
        sparse="w/w!",
        weight_selector="held:nchw",
        layout=BATCH_INNERMOST,
        open=torch.tensor(0.0),
    )
    x, grad = (layouts.as_layout(t, BATCH_INNERMOST) for t in (x, grad))
    state, wants = bits.mask_to_bits(keep), [True, False, False]
    out = OPS.conv(x, weight, None, state, None, *call.options)
    saved = (grad, x, None, weight, state, list(x.shape), wants)
    back, _, _ = OPS.conv_backward(*saved, *call.options)
    wide = weight.double() * keep
    wanted = torch.nn.functional.conv2d(x.double(), wide, padding=1)
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-4)
    wanted = torch.nn.grad.conv2d_input(x.shape, wide, grad.double(), padding=1)
    torch.testing.assert_close(back.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_references")
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(16, 40), (17, 1), (33, 300), (3, 11, 70), (2, 3, 8, 9)])
def test_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(21, shape[-1])
    keep = torch.rand_like(weight) < 0.2
    x, grad = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 21).to(dtype)
    call = ops.calls.LinearCall(
        sparse="w/w!", weight_selector="held:nchw", sparse_kernels=True, open=torch.tensor(0.0)
    )
    saved = (grad, x, None, weight, bits.mask_to_bits(keep), list(shape), [False, True, False])
    _, found, _ = OPS.linear_backward(*saved, *call.options)
    rows, grads = x.double().reshape(-1, shape[-1]), grad.double().reshape(-1, 21)
    bound = len(rows) * 2**-24 * (grads.abs().t() @ rows.abs())
    assert ((found - grads.t() @ rows * keep).abs() <= bound).all()
    assert (found[~keep] == 0).all()


@pytest.mark.usefixtures("no_references")
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_what_no_weight_meets_is_not_seen(dtype: torch.dtype) -> None:
    """NaN where weights are inactive, or behind the last image of a vector, leaves zeros zero."""
    torch.manual_seed(0)
    steps = (1, 1), (1, 1), (1, 1), 1
    x, grad = torch.randn(17, 8, 5, 5).to(dtype), torch.randn(17, 16, 5, 5).to(dtype)
    keep = torch.rand(16, 8, 3, 3) < 0.3
    keep[3], keep[:, 2] = False, False
    weight = torch.randn(keep.shape)
    clean = conv_gradient(x, grad, weight, keep, steps)
    x[:, 2], grad[:, 3] = torch.nan, torch.inf
    assert torch.equal(conv_gradient(x, grad, weight, keep, steps), clean)
    x[16, 0] = torch.nan  # the odd image: of channel 0 alone
    found = conv_gradient(x, grad, weight, keep, steps)
    assert found[:, 0][keep[:, 0]].isnan().all()
    assert torch.equal(found[:, 1:], clean[:, 1:])


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_gradient_lies_as_the_weight_does(
    order: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    steps = (1, 1), (1, 1), (1, 1), 1
    x, grad = torch.randn(16, 8, 5, 5).to(dtype), torch.randn(16, 16, 5, 5).to(dtype)
    weight = torch.randn(16, 8, 3, 3).to(dtype).contiguous(memory_format=order)
    keep = torch.rand(weight.shape) < 0.3
    found = conv_gradient(x, grad, weight, keep, steps)
    assert found.dtype is dtype and found.stride() == weight.stride()
    wanted = dense_gradient(x.double(), grad.double(), weight.double(), steps) * keep
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=2**-8)


def test_open_weights_receive_theirs() -> None:
    """At the steps that grow, inactive weights have gradients, too."""
    torch.manual_seed(0)
    steps = (1, 1), (1, 1), (1, 1), 1
    x, grad = torch.randn(16, 8, 5, 5), torch.randn(16, 16, 5, 5)
    weight = torch.randn(16, 8, 3, 3)
    keep = torch.rand(weight.shape) < 0.3
    wanted = dense_gradient(x, grad, weight, steps)
    for flag, expected in ((1.0, wanted), (0.0, wanted * keep)):
        opened = torch.tensor(flag, dtype=torch.float64)
        found = conv_gradient(x, grad, weight, keep, steps, opened)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_tile_that_does_not_fit_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    steps = (1, 1), (0, 0), (100, 100), 1
    x, grad = torch.randn(16, 16, 101, 101), torch.randn(16, 16, 1, 1)
    weight = torch.randn(16, 16, 2, 2)
    keep = torch.rand(weight.shape) < 0.3
    wanted = dense_gradient(x.double(), grad.double(), weight.double(), steps) * keep
    torch.testing.assert_close(
        conv_gradient(x, grad, weight, keep, steps).double(), wanted, atol=1e-4, rtol=1e-4
    )
    monkeypatch.setattr(conv_kernels, "run_sampled", lambda *args: None)
    torch.testing.assert_close(
        conv_gradient(x, grad, weight, keep, steps).double(), wanted, atol=1e-4, rtol=1e-4
    )


# ---- Whole networks ------------------------------------------------------------------------------

POLICIES = (
    "static:0.9,distribution=uniform",
    "set:0.9,distribution=uniform",
    "rigl:0.9",
    "dsr:0.9",
)


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_is_that_of_the_masked_network(policy: str, half: bool) -> None:
    """Every gradient is the dense network's on masked weights, masked: in float64, or as near to
    it as dense autocast is. Over updates of the masks, by a grown weight that is zero, too.
    """
    gm = swatfx.compile(network(), f"{policy},update_every=2", kernels="sparse")
    chosen = [layer.plan.kernels for layer in sparse_layers(gm)]
    assert chosen.count("sparse") == len(chosen) >= 4
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
    swatfx.attach(gm, optimizer, steps_per_epoch=2, total_steps=12)
    grown = 0
    for number in range(7):
        torch.manual_seed(number)
        x = torch.randn(32, 3, 9, 10)
        step(gm, x, half)
        grown += assert_masked_gradients(gm, x, half)
        optimizer.step()
    assert grown or policy.startswith("static")


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
def test_fast_and_plain_kernels_train_alike() -> None:
    """RigL's masks stay the same ones over four updates, and the losses with them."""
    losses = {}
    for kind in ("sparse", "dense"):
        gm = swatfx.compile(network(), "rigl:0.9,update_every=3", kernels=kind)
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
        swatfx.attach(gm, optimizer, steps_per_epoch=5, total_steps=20)
        losses[kind] = []
        for number in range(13):
            torch.manual_seed(number)
            optimizer.zero_grad()
            loss = (gm(torch.randn(16, 3, 9, 10)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[kind].append(float(loss.detach()))
    assert losses["sparse"] == pytest.approx(losses["dense"], rel=1e-3)
