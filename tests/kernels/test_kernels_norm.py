"""Batch norm in C, with its addition and ReLU, against the plain-torch op that defines it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swatfx import kernels
from swatfx.ops import codes, norm
from swatfx.tensors import bits, layouts
from tests.nets.kernel_calls import threads

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")

OPS = torch.ops.swatfx
LAYOUTS = ["row_major", "channels_last", "batch_innermost"]
# Odd sizes; one image, pixel, channel; fewer channels than threads, long and short; tails of
# vectors and bytes; more than one block of the statistics.
SHAPES = [
    (5, 3, 7, 7),
    (1, 4, 5, 5),
    (16, 8, 6, 6),
    (33, 5, 3, 3),
    (16, 7, 1, 1),
    (6, 1, 9, 9),
    (3, 2, 150, 150),
    (2, 3, 180, 181),
    (4, 6, 31),
    (2, 3, 4, 5, 6),
    (9, 6),
    (70, 48),
    (3, 32, 5, 7),
    (37, 16, 1, 1),
]


def draw(shape: tuple[int, ...], layout: str, seed: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * spread + 3
    return layouts.as_layout(x, layout) if x.dim() > 2 else x


class Case:
    """One batch norm: its tensors, and what comes of them."""

    def __init__(
        self,
        shape: tuple[int, ...],
        layout: str,
        *,
        residual: bool = False,
        relu: bool = False,
        affine: bool = True,
        track: bool = True,
        training: bool = True,
        saves: str = "exact",
    ) -> None:
        channels = shape[1]
        self.x = draw(shape, layout, 1)
        self.residual = draw(shape, "row_major", 2) - 3 if residual else None
        self.weight = draw((channels,), "", 3) - 3 if affine else None
        self.bias = draw((channels,), "", 4) - 3 if affine else None
        track = track or not training
        self.running = [draw((channels,), "", 5), draw((channels,), "", 6).abs() + 1]
        if not track:
            self.running = [None, None]
        self.grad = draw(shape, layout, 7) - 3
        self.training, self.relu, self.saves = training, relu, saves

    @property
    def channels(self) -> list[int]:
        return [1, -1, *[1] * (self.x.dim() - 2)]

    def forward(self, reference: bool = False) -> tuple[Tensor, ...]:
        tensors = (self.x, self.residual, self.weight, self.bias, *self.running)
        args = (*tensors, self.training, 0.1, 1e-5, self.relu, self.saves)
        if not reference:
            return OPS.batch_norm(*args)
        with kernels.reference_only():
            return norm.batch_norm_reference(*args)

    def backward(
        self,
        out: tuple[Tensor, ...],
        wants: list[bool] | None = None,
        reference: bool = False,
        keeps_x: bool = True,
    ) -> tuple[Tensor, ...]:
        _, mean, invstd, _, _, code = out
        if wants is None:
            wants = [True, self.residual is not None, *[self.weight is not None] * 2]
        x = self.x if self.saves == "exact" and keeps_x else None
        layout = layouts.layout_of(self.x)
        options = (self.training, self.relu, self.residual is not None, self.saves)
        tensors = (self.grad, x, code, self.weight, self.bias, mean, invstd)
        args = (*tensors, wants, self.x.shape, layout, *options)
        if not reference:
            return OPS.batch_norm_backward(*args)
        with kernels.reference_only():
            return norm.batch_norm_backward_reference(*args)

    def eager(self, y: Tensor) -> list[Tensor]:
        """Gradients by eager in float64, the mask of the ReLU being that of `y`."""
        given = [self.x, self.residual, self.weight, self.bias]
        t = [None if v is None else v.double().requires_grad_() for v in given]
        assert t[0] is not None
        running = [None if r is None else r.double() for r in self.running]
        out = F.batch_norm(t[0], *running, t[2], t[3], self.training, 0.1, 1e-5)
        out = out if t[1] is None else out + t[1]
        grad = self.grad.double()
        if self.relu:
            grad = grad * torch.logical_not(y <= 0)
        out.backward(grad)
        return [v.grad for v in t if v is not None and v.grad is not None]


def steps(x: Tensor) -> list[int]:
    """Strides of the dimensions that have any."""
    return [step for step, extent in zip(x.stride(), x.shape, strict=True) if extent != 1]


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """To within `tolerance` of the largest."""
    assert found.shape == wanted.shape
    if wanted.numel():
        scale = float(wanted.abs().max()) + 1e-3
        assert float((found.double() - wanted.double()).abs().max()) <= tolerance * scale


OPTIONS = [
    {"residual": r, "relu": u, "training": t, "saves": s, "affine": a}
    for r, u, t, s, a in itertools.product(
        [False, True],
        [False, True],
        [True, False],
        ["exact", "int8", "int4", "nothing"],
        [True, False],
    )
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_references(shape: tuple[int, ...], layout: str) -> None:
    if layout != "row_major" and len(shape) < 3:
        pytest.skip("no such layout")
    for options in OPTIONS:
        case = Case(shape, layout, **options)
        found, wanted = case.forward(), case.forward(reference=True)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and steps(a) == steps(b)
        for a, b in zip(found[:5], wanted[:5], strict=True):
            assert_close(a, b)
        y, code = found[0], found[5]
        masked = case.relu and (case.saves == "exact" or case.residual is not None)
        if masked and code.numel():
            size = (y.numel() + 7) // 8
            active = layouts.flat_view(torch.logical_not(y <= 0), layouts.layout_of(y))
            assert torch.equal(code[-size:], bits.mask_to_bits(active))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_eagers_in_double_precision(shape: tuple[int, ...], layout: str) -> None:
    if layout != "row_major" and len(shape) < 3:
        pytest.skip("no such layout")
    for options in OPTIONS:
        if options["saves"] != "exact" or (layout == "channels_last" and shape[1] % 16):
            continue
        case = Case(shape, layout, **options)
        out = case.forward()
        found = [g for g in case.backward(out) if g.numel()]
        wanted = case.eager(out[0])
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b)
        made = layouts.empty(shape, layouts.layout_of(case.x), dtype=torch.float32)
        assert steps(found[0]) == steps(made)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_references(shape: tuple[int, ...], layout: str) -> None:
    """Either reads the other's: x-hat to within a cell, on the right side of ReLU."""
    if layout != "row_major" and len(shape) < 3:
        pytest.skip("no such layout")
    for options in OPTIONS:
        saves = options["saves"]
        if saves not in codes.BITS:
            continue
        case = Case(shape, layout, **options)
        found, wanted = case.forward(), case.forward(reference=True)
        order = layouts.layout_of(case.x)
        decoded, above = codes.decode(found[5], shape, order, saves)
        mean, invstd = (s.view(case.channels).double() for s in found[1:3])
        normed = (case.x.double() - mean) * invstd
        assert_within_a_cell(decoded, normed, saves)
        assert_within_a_cell(codes.decode(wanted[5], shape, order, saves)[0], normed, saves)
        if case.relu and case.residual is None:
            up = 1 if case.weight is None else case.weight.view(case.channels) >= 0
            assert torch.equal(above, torch.logical_not(found[0] <= 0) == up)
        if case.training:  # where x-hat is of sum 0, but for how its mean was rounded
            centred = codes.decode(found[5], shape, order, saves, centred=True)[0].double()
            others = [d for d in range(len(shape)) if d != 1]
            size = 2.0**-24 * (decoded.double().abs() + normed.abs()).sum(others) + 1e-6
            assert bool((centred.sum(others).abs() <= size).all())
        # One decoder for both: backward in C reads the codes as the reference does.
        for out in (found, wanted):
            for a, b in zip(case.backward(out), case.backward(out, reference=True), strict=True):
                assert a.shape == b.shape
                assert_close(a, b, 1e-4)


def assert_within_a_cell(decoded: Tensor, wanted: Tensor, saves: str) -> None:
    """Of the grid of a whole channel, which no group's is coarser than."""
    root, others = wanted.abs().sqrt(), [d for d in range(wanted.dim()) if d != 1]
    signed = root * wanted.sign()
    reach = signed.amax(others, keepdim=True) - signed.amin(others, keepdim=True)
    cell = reach / (2 ** codes.BITS[saves] - 3) * (0.52 if saves == "int8" else 1.01)
    room = cell * (2 * root + cell) + 1e-5 * (1 + wanted.abs())
    assert bool(((decoded.double() - wanted).abs() <= room).all())


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(
        st.integers(1, 40),
        st.integers(1, 9) | st.sampled_from([16, 32, 48]),
        st.integers(1, 12),
        st.integers(1, 12),
    ),
    st.sampled_from(LAYOUTS),
    st.integers(1, 3),
    st.sampled_from(OPTIONS),
)
def test_any_shape(
    shape: tuple[int, int, int, int], layout: str, count: int, options: dict[str, Any]
) -> None:
    if shape[0] * shape[2] * shape[3] < 2:
        return
    with threads(count):
        case = Case(shape, layout, **options)
        out = case.forward()
        for a, b in zip(out[:5], case.forward(reference=True)[:5], strict=True):
            assert steps(a) == steps(b)
            assert_close(a, b, 1e-4)
        if case.saves == "exact":
            # Two values a channel leave a gradient of nothing but rounding.
            found = [g for g in case.backward(out) if g.numel()]
            for a, b in zip(found, case.eager(out[0]), strict=True):
                assert float((a - b).abs().max()) <= 2e-3 * (1 + float(b.abs().max()))


@pytest.mark.parametrize("saves", ["exact", "int8", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_lets_through_what_forward_did(layout: str, saves: str) -> None:
    # Most values lie within a few roundings of where ReLU starts.
    case = Case((8, 16, 12, 12), layout, relu=True, saves=saves)
    generator = torch.Generator().manual_seed(1)
    near = torch.rand(case.x.shape, generator=generator) < 0.8
    off = torch.randint(-9, 10, case.x.shape, generator=generator) * 2.0**-23
    case.x[near] = 0.7 * (1 + off[near])
    wide = case.x.double()
    mean = wide.mean((0, 2, 3))
    scale = (wide.var((0, 2, 3), correction=0) + 1e-5).rsqrt()
    assert case.weight is not None
    case.bias = (-(0.7 - mean) * scale * case.weight).float()
    out = case.forward()
    active = torch.logical_not(out[0] <= 0)
    assert 0.2 < float(active[near].float().mean()) < 0.8
    assert not out[5].numel() if saves == "exact" else out[5].numel()
    passed = case.backward(out, wants=[True, True, True, True])[1]
    assert torch.equal(passed, torch.where(active, case.grad, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saves", ["exact", "int8", "int4"])
@pytest.mark.parametrize("shape", [(3, 2, 150, 150), (16, 24, 10, 10)], ids=str)
def test_threads_change_nothing_but_rounding(shape: Any, saves: str, layout: str) -> None:
    results = []
    for count in (1, 2, 3, 3):
        with threads(count):
            case = Case(shape, layout, relu=True, residual=True, saves=saves)
            out = case.forward()
            results.append([*out, *case.backward(out)])
    for a, b in zip(results[2], results[3], strict=True):
        assert torch.equal(a, b)
    for other in results[1:3]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            if i == 8 and saves == "int4":
                # A statistic that rounds otherwise draws other noise: four deviations of two sums.
                assert float((b - a).abs().max()) <= 4 * _deviation(case)
            elif i != 5:
                assert_close(b, a, {"exact": 1e-5, "int8": 2e-3, "int4": 0.5}[saves])


def _deviation(case: Case) -> float:
    """Of the difference of two weight gradients under `int4`, at most, in the mean over phases.

    A code is rounded up or down by chance: a sixth of a step squared is its variance.
    """
    x, grad = (t.double().transpose(0, 1).flatten(1) for t in (case.x, case.grad))
    step = (x.amax(1) - x.amin(1)) / x.std(1) / 15
    return float((step * grad.norm(dim=1)).max()) / 3**0.5


def test_statistics_survive_a_mean_far_from_zero() -> None:
    # Also where the first values are unlike the others, of which the first guess is made.
    for layout in LAYOUTS:
        x = draw((8, 16, 64, 64), layout, 1, spread=1.0) + 1000
        x[0, :, :2, :16] = -5000
        out = OPS.batch_norm(x, None, None, None, None, None, True, 0.1, 1e-5, False, "nothing")
        wide = x.double()
        assert_close(out[1], wide.mean((0, 2, 3)), 1e-7)
        variance = wide.var((0, 2, 3), correction=0)
        torch.testing.assert_close(out[2].double(), (variance + 1e-5).rsqrt(), rtol=3e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_go_where_torch_lets_them(layout: str) -> None:
    case = Case((4, 16, 5, 5), layout, relu=True, residual=True)
    case.x[1, 1, 2, 2] = torch.nan
    assert case.residual is not None
    case.residual[0, 0, 0, 0] = torch.nan
    case.residual[0, 2, 0, 0] = -torch.inf
    out, wanted = case.forward(), case.forward(reference=True)
    assert torch.equal(out[0].isnan(), wanted[0].isnan()) and out[0].isnan().sum() == 101
    assert torch.equal(out[5], wanted[5])
    found, expected = case.backward(out), case.backward(wanted, reference=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saves", ["exact", "int8", "int4"])
def test_only_what_is_wanted(layout: str, saves: str) -> None:
    case = Case((5, 16, 7, 7), layout, relu=True, residual=True, saves=saves)
    out = case.forward()
    everything = case.backward(out)
    for wants in itertools.product([False, True], repeat=4):
        found = case.backward(out, list(wants))
        for wanted, a, b in zip(wants, found, everything, strict=True):
            assert torch.equal(a, b) if wanted else a.numel() == 0
    frozen = Case((5, 16, 7, 7), layout, relu=True, training=False)
    out = frozen.forward()
    wants = [True, False, False, True]  # nothing of x is needed, so it was not kept
    with_x = frozen.backward(out, wants)
    for a, b in zip(frozen.backward(out, wants, keeps_x=False), with_x, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 3, 0, 2), (1, 3, 1, 1)], ids=str)
def test_degenerate_shapes_are_the_references(shape: tuple[int, ...]) -> None:
    for layout in LAYOUTS:
        case = Case(shape, layout, relu=True, training=shape[0] != 1)
        found, wanted = case.forward(), case.forward(reference=True)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b) and steps(a) == steps(b)
    if shape[0] == 1:
        with pytest.raises(ValueError, match="more than 1 value"):
            F.batch_norm(case.x, None, None, training=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference(dtype: torch.dtype) -> None:
    x = draw((4, 3, 5, 5), "batch_innermost", 1).to(dtype)
    args = (x, None, None, None, None, None, True, 0.1, 1e-5, True, "exact")
    for a, b in zip(OPS.batch_norm(*args), norm.batch_norm_reference(*args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("channels", [17, 40, 1003])
def test_one_value_a_channel_in_any_layout(channels: int) -> None:
    """As an op may be called: a batch of one pixel has its channels side by side."""
    x = torch.randn(1, channels, 1, 1)
    weight, bias, mean = (torch.randn(channels) for _ in range(3))
    invstd = torch.rand(channels) + 0.5
    code = torch.empty(0, dtype=torch.uint8)
    told = (x.shape, layouts.BATCH_INNERMOST, False, False, False, "exact")
    args = (torch.randn_like(x), x, code, weight, bias, mean, invstd, [True] * 4, *told)
    found = OPS.batch_norm_backward(*args)
    with kernels.reference_only():
        wanted = norm.batch_norm_backward_reference(*args)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
