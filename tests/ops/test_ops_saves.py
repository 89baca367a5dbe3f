"""ReLU, pooling and dropout that save less: eager's values and gradients bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from swatfx.errors import SwatError
from swatfx.ops.saved import active_bits, mask_from
from swatfx.tensors import bits, layouts
from tests.nets.saving_ops import leaf, saved_by

# Compiled kernels are compared with the references elsewhere.
pytestmark = pytest.mark.usefixtures("reference_kernels")
torch.set_num_threads(1)
OPS = torch.ops.swatfx
LAYOUTS = ["row_major", "channels_last", "batch_innermost"]
NO_RANDOM = ("test_schema", "test_autograd_registration", "test_faketensor")


# ---- ReLU ----------------------------------------------------------------------------------------

RELUS = {
    "vector": leaf((13,)),
    "rows": leaf((5, 7)),
    "image": leaf((2, 3, 5, 5)),
    "last": leaf((2, 16, 5, 5), "channels_last"),
    "innermost": leaf((4, 3, 5, 5), "batch_innermost"),
    "scalar": torch.tensor(2.0, requires_grad=True),
    "empty": leaf((0, 3, 5, 5)),
    "transposed": leaf((4, 6, 5)).detach().transpose(1, 2).requires_grad_(),
    "half": leaf((2, 3, 5, 5), dtype=torch.bfloat16),
    "sliced": leaf((4, 6, 5, 5)).detach()[:, ::2].requires_grad_(),
    "expanded": leaf((4, 6, 1, 1)).detach().expand(4, 6, 5, 5).requires_grad_(),
}


@pytest.mark.parametrize("name", RELUS)
def test_relu_is_eager_bit_for_bit(name: str) -> None:
    x = RELUS[name]
    y, _ = OPS.relu(x)
    expected = F.relu(x)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    grad = torch.randn(y.shape).to(y.dtype)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(dx, torch.autograd.grad(expected, x, grad)[0])
    (kept,) = saved_by(lambda: OPS.relu(x))
    assert kept.dtype == torch.uint8 and kept.numel() == (x.numel() + 7) // 8


def test_relu_keeps_zero_and_nan_as_torch_does() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, torch.nan, 2.0, -torch.inf, torch.inf], requires_grad=True)
    y, packed = OPS.relu(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones(7))
    (expected,) = torch.autograd.grad(F.relu(x), x, torch.ones(7))
    assert torch.equal(dx, expected) and packed.tolist() == [0b1011000]
    assert torch.equal(torch.signbit(y), torch.signbit(F.relu(x)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", RELUS)
def test_relu_opcheck(name: str) -> None:
    x = RELUS[name]
    torch.library.opcheck(OPS.relu, (x,))
    y, packed = OPS.relu(x.detach())
    torch.library.opcheck(OPS.relu_backward, (torch.randn_like(y), packed, layouts.layout_of(x)))


def test_relu_gradcheck() -> None:
    x = leaf((3, 4, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: OPS.relu(x)[0], (x,))


# ---- Pooling -------------------------------------------------------------------------------------

POOLS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "resnet": ((2, 16, 11, 12), ([3, 3], [2, 2], [1, 1], [1, 1], False)),
    "plain": ((2, 5, 8, 8), ([2, 2], [2, 2], [0, 0], [1, 1], False)),
    "ceil": ((2, 5, 7, 7), ([2, 2], [2, 2], [0, 0], [1, 1], True)),
    "oblong": ((2, 5, 9, 8), ([3, 2], [1, 3], [1, 0], [1, 1], False)),
    "dilated": ((2, 5, 9, 9), ([3, 3], [2, 1], [1, 1], [2, 3], False)),
    "whole": ((2, 5, 16, 16), ([16, 16], [16, 16], [0, 0], [1, 1], False)),
    "single": ((1, 1, 4, 4), ([2, 2], [1, 1], [1, 1], [1, 1], False)),
    "empty": ((0, 5, 8, 8), ([2, 2], [2, 2], [0, 0], [1, 1], False)),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POOLS)
def test_max_pool_is_eager_bit_for_bit(name: str, layout: str, ties: bool) -> None:
    shape, args = POOLS[name]
    x = leaf(shape, layout)
    if ties:
        x.data.round_()
        x.data[..., 2, 3] = torch.nan
        x.data[:, :1] = -torch.inf
    plain = x.detach() if layout != "batch_innermost" else x.detach().contiguous()
    plain.requires_grad_()
    y, index = OPS.max_pool2d(x, *args)
    expected = F.max_pool2d(plain, *args)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn(expected.shape)
    (dx,) = torch.autograd.grad(y, x, grad)
    (want,) = torch.autograd.grad(expected, plain, grad)
    assert torch.equal(dx, want)
    for one, other in ((y, layouts.as_layout(expected, layout)), (dx, x)):
        assert layouts.layout_of(one) == layouts.layout_of(other)
    (kept,) = saved_by(lambda: OPS.max_pool2d(x, *args))
    assert kept.dtype == torch.uint8 and kept.numel() == index.numel() == y.numel()
    assert OPS.max_pool2d(x, *args, False)[1].numel() == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POOLS)
def test_pool_opcheck(name: str, layout: str) -> None:
    shape, args = POOLS[name]
    x = leaf(shape, layout)
    torch.library.opcheck(OPS.max_pool2d, (x, *args))
    y, index = OPS.max_pool2d(x.detach(), *args)
    torch.library.opcheck(
        OPS.max_pool2d_backward, (torch.randn_like(y), index, list(shape), layout, *args)
    )


AVERAGES: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "plain": ((2, 5, 8, 8), ([2, 2], [2, 2], [0, 0], False, True, None)),
    "padded": ((2, 16, 9, 7), ([3, 3], [2, 2], [1, 1], True, False, None)),
    "divided": ((2, 5, 9, 7), ([3, 2], [1, 2], [1, 1], False, True, 4)),
    "empty": ((0, 5, 8, 8), ([2, 2], [2, 2], [0, 0], False, True, None)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", AVERAGES)
def test_avg_pool_is_eager_and_keeps_nothing(name: str, layout: str) -> None:
    shape, args = AVERAGES[name]
    x = leaf(shape, layout)
    plain = x.detach() if layout != "batch_innermost" else x.detach().contiguous()
    plain.requires_grad_()
    y, expected = OPS.avg_pool2d(x, *args), F.avg_pool2d(plain, *args)
    assert torch.equal(y, expected)
    grad = torch.randn(expected.shape)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(dx, torch.autograd.grad(expected, plain, grad)[0])
    assert layouts.layout_of(dx) == layouts.layout_of(x)
    assert saved_by(lambda: OPS.avg_pool2d(x, *args)) == []
    torch.library.opcheck(OPS.avg_pool2d, (x, *args))
    torch.library.opcheck(OPS.avg_pool2d_backward, (grad, list(shape), layout, *args))


# ---- Dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("name", ["rows", "image", "last", "innermost", "transposed", "sliced"])
def test_dropout_draws_as_eager_does(name: str, p: float, dtype: torch.dtype) -> None:
    x = RELUS[name].detach().to(dtype).requires_grad_()
    torch.manual_seed(5)
    y, _ = OPS.dropout(x, p)
    after = torch.rand(())
    torch.manual_seed(5)
    expected = F.dropout(x, p)
    assert torch.equal(y, expected) and torch.equal(after, torch.rand(()))
    grad = torch.randn(y.shape).to(dtype)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(dx, torch.autograd.grad(expected, x, grad)[0])
    (kept,) = saved_by(lambda: OPS.dropout(x, p))
    assert kept.dtype == torch.uint8 and kept.numel() == (x.numel() + 7) // 8


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", [n for n in RELUS if n != "scalar"])
def test_dropout_opcheck(name: str) -> None:
    x = RELUS[name]
    torch.library.opcheck(OPS.dropout, (x, 0.5), test_utils=NO_RANDOM)
    y, packed = OPS.dropout(x.detach(), 0.5)
    args = (torch.randn_like(y), packed, 0.5, layouts.layout_of(x))
    torch.library.opcheck(OPS.dropout_backward, args)


# ---- All -----------------------------------------------------------------------------------------


def test_bits_round_trip_in_every_layout() -> None:
    y = torch.randn(3, 4, 5, 6)
    for layout in LAYOUTS:
        packed = active_bits(layouts.as_layout(y, layout), layout)
        assert torch.equal(mask_from(packed, y.shape, layout), y > 0)
        assert torch.equal(packed, bits.mask_to_bits(layouts.flat_view(y > 0, layout)))


def test_double_backward_says_no() -> None:
    x = leaf((2, 3, 4, 4))
    for y in (
        OPS.batch_norm(x, None, None, None, None, None, True, 0.1, 1e-5, True)[0],
        OPS.relu(x)[0],
        OPS.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False)[0],
        OPS.avg_pool2d(x, [2, 2], [2, 2], [0, 0], False, True, None),
        OPS.dropout(x, 0.5)[0],
    ):
        (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        with pytest.raises(SwatError, match="policy 'dense'"):
            grad.pow(2).sum().backward()


def test_flops_are_counted_as_none() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = leaf((2, 3, 4, 4))
    with FlopCounterMode(display=False) as counter:
        y = OPS.batch_norm(x, None, None, None, None, None, True, 0.1, 1e-5, True)[0]
        y = OPS.dropout(OPS.relu(y)[0], 0.5)[0]
        OPS.max_pool2d(y, [2, 2], [2, 2], [0, 0], [1, 1], False)[0].sum().backward()
    assert counter.get_total_flops() == 0
