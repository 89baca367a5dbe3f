"""Whatever sizes an op is called with: it raises as plain PyTorch does, or computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import kernels
from swatfx.errors import InputError
from swatfx.kernels import fitting
from swatfx.ops.pack import order_of
from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST
from tests.nets.kernel_builds import python

OPS = torch.ops.swatfx
pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
DRIVER = ["-m", "tests.nets.malformed_calls"]


def test_no_call_kills_the_process_or_computes_something_else() -> None:
    result = python(*DRIVER, "10", kernels=None, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert int(result.stdout.split()[-4]) > 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx512bf16", "avx512", "avx2", "generic"])
def test_more_calls_on_every_instruction_set(name: str) -> None:
    if not kernels.library._built(name):
        pytest.skip(f"{name} does not run here")
    result = python(*DRIVER, "400", kernels=name, OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


# --- models, as a user meets them

CONV = "swat-u:0.9"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(32, 64, 3), (2, 2)),
        (nn.Conv2d(32, 64, (5, 1)), (4, 9)),
        (nn.Conv2d(32, 64, 3, dilation=4), (8, 8)),
        (nn.Conv2d(64, 64, 3), (8, 8)),
        (nn.Conv2d(64, 64, 3, groups=2), (8, 8)),
        (nn.Conv2d(16, 64, 1), (8, 8)),
        (nn.BatchNorm2d(48), (8, 8)),
        (nn.BatchNorm2d(16), (8, 8)),
        (nn.MaxPool2d(5), (3, 3)),
        (nn.MaxPool2d(3, padding=2), (8, 8)),
        (nn.Linear(33, 64), (8, 32)),
    ],
    ids=str,
)
def test_models_raise_what_eager_raises(
    layer: nn.Module, size: tuple[int, int], training: bool
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), layer).train(training)
    x = torch.randn(16, 3, *size)
    with pytest.raises(Exception) as eager:
        net(x)
    with pytest.raises(type(eager.value)) as ours:
        swatfx.compile(net, CONV, kernels="sparse").train(training)(x).sum().backward()
    assert "should contain" in str(ours.value) or str(eager.value)[:30] in str(ours.value)


@pytest.mark.parametrize("batch", [0, 1, 16])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_empty_sizes_compute_what_eager_computes(batch: int, kind: str) -> None:
    for empty in (False, True):
        if kind == "conv":
            net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, (1, 3)))
            x = torch.randn(0 if empty else batch, 3, 4, 5)
        else:
            net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 16))
            x = torch.randn(batch, 0 if empty else 4, 5)
        gm = swatfx.compile(net, "swat-u:0.0", kernels="sparse")
        found, wanted = gm(x), net(x)
        torch.testing.assert_close(found, wanted)
        parameters = list(net.parameters())
        for one, other in zip(
            torch.autograd.grad(found.sum(), parameters),
            torch.autograd.grad(wanted.sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def gaps(x: Tensor) -> nn.Parameter:
    """The same values, every other element of a tensor twice as long."""
    return nn.Parameter(x.detach().repeat_interleave(2, 0)[::2])


@pytest.mark.parametrize("batch", [16, 17, 64])
def test_parameters_with_gaps(batch: int) -> None:
    """Weights and biases that are slices of longer ones, in every kind of layer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 32),
    )
    x = torch.randn(batch, 3, 7, 7)
    wanted = net(x)
    parameters = [p for _, p in net.named_parameters()]
    expected = torch.autograd.grad(wanted.square().sum(), parameters)
    for module in net:
        for name, p in list(module.named_parameters()):
            setattr(module, name, gaps(p))
    for kind in ("sparse", "dense"):
        gm = swatfx.compile(net, "swat-u:0.0", kernels=kind)
        y = gm(x)
        torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
        found = torch.autograd.grad(y.square().sum(), [p for _, p in net.named_parameters()])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-3)


# --- limits of what C is given


def test_a_tile_with_too_large_a_halo_is_left_to_torch() -> None:
    x = layouts.as_layout(torch.randn(16, 16, 1, 70_001), BATCH_INNERMOST).requires_grad_()
    w = torch.randn(16, 16, 1, 2, requires_grad=True)
    kept = OPS.pack(x.detach(), torch.tensor(0.0), 2, "nchw", x.dtype, BATCH_INNERMOST)
    steps = ([1, 1], [0, 0], [1, 70_000], 1)
    y = OPS.conv(x, w, None, torch.tensor(0.0), kept, *steps, layout=BATCH_INNERMOST)
    wanted = torch.nn.functional.conv2d(x, w, None, *steps)
    torch.testing.assert_close(y, wanted, atol=1e-3, rtol=1e-3)
    found = torch.autograd.grad(y.sum(), (x, w))
    for one, other in zip(found, torch.autograd.grad(wanted.sum(), (x, w)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-3)


def test_steps_and_filters_beyond_the_kernels_do_not_fit() -> None:
    w = torch.empty(1).expand(1, 2**16, 2**15, 1)
    assert fitting.convolution((16, 2**16, 2**15, 1), w, (1, 1), (0, 0), (1, 1), 1) is None
    w = torch.empty(16, 16, 1, 1)
    for padding in (2**20 + 1, 2**62):
        assert fitting.convolution((16, 16, 5, 5), w, (1, 1), (padding, 0), (1, 1), 1) is None
    assert fitting.convolution((16, 16, 5, 5), w, (1, 1), (1, 0), (1, 1), 1) is not None


def test_an_empty_slice_may_lie_past_the_end() -> None:
    gm = swatfx.compile(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), "swat-u:0.5")
    x = torch.randn(4, 3, 2, 2)[4:]
    assert x.storage_offset() == 48 and gm(x).shape == (0, 8, 2, 2)
    gm(torch.randn(8, 3, 4, 4)[8:, :, ::2]).sum().backward()


def test_a_tensor_whose_storage_was_taken_away() -> None:
    x = layouts.as_layout(torch.randn(16, 16, 5, 5), BATCH_INNERMOST)
    w = torch.randn(16, 16, 1, 1)
    w.untyped_storage().resize_(0)
    args = (torch.tensor(0.5), None, [1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(InputError, match="storage"):
        OPS.conv(x, w, None, *args, layout=BATCH_INNERMOST)


def test_what_was_packed_says_in_which_order() -> None:
    x = torch.randn(3, 4, 5, 6)
    spatial = (layouts.ROW_MAJOR, layouts.CHANNELS_LAST, BATCH_INNERMOST)
    for layout in (*spatial, *layouts.FEATURES_OUTERMOST):
        among = 2 if layout in spatial else 0
        packed = OPS.pack(x, torch.tensor(0.5), among, "nchw", x.dtype, layout)
        assert order_of(packed) == layout and not packed._is_view()
    for wrong in (packed.float(), packed.view(-1, *[1] * 5), packed.new_empty(())):
        with pytest.raises(InputError, match="bytes in one to five dimensions"):
            order_of(wrong)
