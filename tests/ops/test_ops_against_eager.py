"""Our ops in a compiled model against eager: bit for bit at density 1, in values and strides."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import swatfx
from swatfx.density import Density

# Eager says so once a process, when it first pads an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
torch.set_num_threads(1)


def dense_twin(layer: nn.Module) -> tuple[nn.Module, swatfx.pipeline.SwatModule]:
    """A layer, and its copy compiled to our ops at density 1."""
    twin = copy.deepcopy(layer)
    gm = swatfx.compile(twin, swatfx.swat_u(0.0, first_dense=False))
    targets = {str(n.target) for n in gm.graph.nodes}
    assert targets & {"swatfx.conv.default", "swatfx.linear.default"}
    return layer, gm


class One(nn.Module):
    """A model of one layer, with a ReLU before it so that the packed input has zeros."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.relu(x))
        return y


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Output and all gradients, the input's first."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    y = model(x)
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape).to(y).contiguous(memory_format=layout_of(y)))
    return y, [x.grad, *(p.grad for p in model.parameters())]


def layout_of(x: Tensor) -> torch.memory_format:
    if (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def assert_same_run(model: nn.Module, gm: nn.Module, x: Tensor) -> None:
    """Bit for bit the same output and gradients, with the same strides."""
    expected, grads = run(model, x)
    found, found_grads = run(gm, x)
    for i, (a, b) in enumerate(zip([expected, *grads], [found, *found_grads], strict=True)):
        assert a is not None and b is not None
        worst = float((a - b).detach().abs().max()) if a.numel() else 0.0
        assert (i, worst, b.dtype, b.stride()) == (i, 0.0, a.dtype, a.stride())


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 5, 4)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), bias=False), (2, 4, 8, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=(1, 2), padding=2), (2, 4, 8, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 8, 8)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 8, 8)),
    "same_even": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 8, 8)),
    "same_1d": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 16)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2), (2, 4, 8, 8)),
    "same_circular": (
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="circular"),
        (2, 4, 8, 8),
    ),
    **{
        mode: (
            lambda mode=mode: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode=mode),
            (2, 4, 8, 8),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "reflect_1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 8)),
    "circular_3d": (
        lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"),
        (1, 2, 4, 4, 4),
    ),
    "unbatched_1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 8, 8)),
    "unbatched_3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "unbatched_reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (4, 8, 8),
    ),
    "vector": (lambda: nn.Linear(8, 6), (8,)),
    "vector_no_bias": (lambda: nn.Linear(8, 6, bias=False), (8,)),
    "rows": (lambda: nn.Linear(8, 6), (5, 8)),
    "no_bias": (lambda: nn.Linear(8, 6, bias=False), (5, 8)),
    "sequence": (lambda: nn.Linear(8, 6), (3, 5, 8)),
    "sequence_no_bias": (lambda: nn.Linear(8, 6, bias=False), (3, 5, 8)),
    "rank4": (lambda: nn.Linear(8, 6), (2, 3, 4, 8)),
    "empty_conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (0, 4, 8, 8)),
    "empty_rows": (lambda: nn.Linear(8, 6), (0, 8)),
    "empty_sequence": (lambda: nn.Linear(8, 6), (0, 5, 8)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_density_one_is_eager_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    model, gm = dense_twin(One(make()).to(dtype))
    assert_same_run(model, gm, torch.randn(shape).to(dtype))


IMAGES = [n for n, (_, s) in MODULES.items() if len(s) == 4 and n not in ("rank4", "unbatched_3d")]


@pytest.mark.parametrize("name", IMAGES)
def test_channels_last_keeps_values_and_strides(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    model, gm = dense_twin(One(make()))
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    assert_same_run(model, gm, x)
    model = model.to(memory_format=torch.channels_last)
    gm = gm.to(memory_format=torch.channels_last)
    assert_same_run(model, gm, x)
    assert_same_run(model, gm, x.contiguous())


@pytest.mark.parametrize(
    "name", ["conv2d", "grouped", "same_circular", "rows", "sequence", "conv1d"]
)
def test_autocast_at_density_one(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    model, gm = dense_twin(One(make()))
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(x), gm(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    grad = torch.randn(found.shape, dtype=torch.bfloat16)
    expected.backward(grad)
    found.backward(grad)
    for a, b in zip(model.parameters(), gm.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert b.grad.dtype == torch.float32 and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3), nn.Linear(12, 16)])
def test_autocast_decides_the_mask_in_the_weights_own_precision(layer: nn.Module) -> None:
    # All weights round to one bfloat16: cast first, they would tie and all be kept.
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        weight.copy_(1 + torch.rand(weight.shape) * 2**-10)
    gm = swatfx.compile(One(layer), swatfx.swat_u(0.9, first_dense=False))
    x = torch.eye(12) if weight.dim() == 2 else torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gm(x)
    k = Density.from_sparsity(0.9).count(weight.numel())
    threshold = weight.detach().reshape(-1).sort(descending=True).values[k - 1]
    masked = weight.detach() * (weight.detach() >= threshold)
    bias = layer.get_parameter("bias").bfloat16()
    call = nn.functional.linear if weight.dim() == 2 else nn.functional.conv2d
    assert torch.equal(y, call(torch.relu(x).bfloat16(), masked.bfloat16(), bias))
    kept = [n for n in gm.graph.nodes if str(n.target).endswith(".pack")]
    assert len(kept) == 1
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "layer"),
    [
        (torch.ones(2, 8, dtype=torch.int64), nn.Linear(8, 4, bias=False)),
        (torch.ones(2, 3, 5, 5, dtype=torch.int64), nn.Conv2d(3, 4, 3, bias=False)),
        (torch.ones(2, 8, dtype=torch.float64), nn.Linear(8, 4, bias=False)),
        (torch.ones(2, 3, 5, 5, dtype=torch.float64), nn.Conv2d(3, 4, 3, bias=False)),
        (torch.ones(2, 3, 5, 5), nn.Conv2d(4, 4, 3)),
        (torch.ones(2, 3, 2, 2), nn.Conv2d(3, 4, 3)),
    ],
)
def test_what_eager_refuses_is_refused(x: Tensor, layer: nn.Module) -> None:
    gm = swatfx.compile(copy.deepcopy(layer), swatfx.swat_u(0.5, first_dense=False))
    for model in (layer, gm, gm.eval()):
        with pytest.raises(RuntimeError):
            model(x)


def flops(model: nn.Module, x: Tensor, *, frozen: bool = False) -> int:
    x = x.clone().requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_those_of_the_dense_model(name: str, frozen: bool) -> None:
    make, shape = MODULES[name]
    model, gm = dense_twin(One(make()))
    x = torch.randn(shape)
    expected = flops(model, x, frozen=frozen)
    assert flops(gm, x, frozen=frozen) == expected
    assert expected > 0 or 0 in shape


def test_flops_do_not_see_sparsity() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )
    gm = swatfx.compile(copy.deepcopy(net), swatfx.swat_u(0.9, first_dense=False))
    x = torch.randn(2, 3, 8, 8)
    assert flops(gm, x) == flops(net, x) > 0
