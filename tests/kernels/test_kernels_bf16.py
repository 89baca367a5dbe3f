"""Kernels on bfloat16 activations, against formulas in float64 of the same bfloat16 inputs.

A result is computed in float32 and rounded once: it is off by at most 2^-8 of itself, and by what
float32 lost on the way. That is 2^-24 of each term at each of `STEPS` roundings: a lane's sum of a
block of 1024 in sixteen lanes (csrc/norm.h), the sum of the lanes, and some for the rest; sums of
blocks are double.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from swatfx import kernels
from swatfx.kernels import elementwise, pool
from swatfx.kernels import layout as layout_changes
from swatfx.ops import codes, norm
from swatfx.ops.dropout import dropout_backward_reference, dropout_reference
from swatfx.tensors import bits, layouts
from tests.nets.kernel_calls import threads

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")

OPS = torch.ops.swatfx
BF16 = torch.bfloat16
LAYOUTS = ["row_major", "channels_last", "batch_innermost"]
BATCHES = [1, 2, 15, 16, 17, 32, 33]
HALF_ULP, STEPS = 2.0**-8, 64 + 4 + 12


@pytest.fixture(autouse=True)
def nothing_but_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever falls back to plain torch fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran")

    modules = {
        norm: ("batch_norm_reference", "batch_norm_backward_reference"),
        elementwise: (
            "relu_reference",
            "relu_backward_reference",
            "dropout_reference",
            "dropout_backward_reference",
        ),
        pool: ("max_pool2d_reference", "max_pool2d_backward_reference"),
        layout_changes: ("to_layout_reference",),
    }
    for module, names in modules.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)


def draw(shape: tuple[int, ...], layout: str, seed: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * spread).to(BF16)
    return layouts.as_layout(x, layout) if x.dim() > 2 else x


def assert_within(found: Tensor, wanted: Tensor, terms: Tensor, narrow: bool = True) -> None:
    """Of float64 `wanted`, a sum of float32 terms whose magnitudes are `terms` in all."""
    rounded = HALF_ULP * wanted.abs() + 2.0**-134 if narrow else 0
    bound = rounded + STEPS * 2.0**-24 * terms + 2.0**-126 * STEPS
    off = (found.double() - wanted).abs()
    assert bool((off <= bound * (1 + HALF_ULP)).all()), float((off / bound).max())


def assert_as_faked(op: Callable[..., Any], args: tuple[Any, ...], found: Any) -> None:
    """Of the shapes, dtypes and strides that the op's fake says."""
    if torch.get_num_threads() > 1:
        return  # with one they were looked at
    mode = FakeTensorMode()
    with mode:
        faked = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
    pairs = zip(found, faked, strict=True) if isinstance(found, tuple) else [(found, faked)]
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


# ---- Batch norm ----------------------------------------------------------------------------------


class Norm:
    """A batch norm, and what it and its gradients are in float64."""

    def __init__(
        self,
        shape: tuple[int, ...],
        layout: str,
        *,
        residual: bool = False,
        relu: bool = True,
        training: bool = True,
        saves: str = "exact",
        parameters: torch.dtype | None = torch.float32,
        spread: float = 2.0,
        offset: float = 1.0,
    ) -> None:
        self.x = draw(shape, layout, 1, spread) + offset * spread
        self.layout = layouts.layout_of(self.x)
        self.residual = draw(shape, "row_major", 2) if residual else None
        self.grad = draw(shape, layout, 3)
        four = [draw(shape[1:2], "", seed, 1.0).float() for seed in range(4, 8)]
        four[3] = four[3].abs() + 0.5
        self.four: list[Tensor | None] = [None] * 4
        if parameters is not None:
            self.four = [p.to(parameters) for p in four]
        self.relu, self.training, self.saves = relu, training, saves
        self.args = (self.x, self.residual, *self.four, training, 0.1, 1e-5, relu, saves)

    def each(self, vector: Tensor | None, otherwise: float) -> Tensor:
        if vector is None:
            vector = torch.full(self.x.shape[1:2], otherwise)
        return vector.double().view(1, -1, *[1] * (self.x.dim() - 2))

    @property
    def others(self) -> list[int]:
        return [d for d in range(self.x.dim()) if d != 1]

    def check_forward(self) -> tuple[Tensor, ...]:
        """Returns what the op returned."""
        found = OPS.batch_norm(*self.args)
        assert_as_faked(OPS.batch_norm, self.args, found)
        y, mean, invstd, new_mean, new_var, code = found
        x = self.x.double()
        weight, bias, running_mean, running_var = (
            self.each(p, otherwise) for p, otherwise in zip(self.four, (1, 0, 0, 1), strict=True)
        )
        center, variance = running_mean, running_var
        if self.training:
            center = x.mean(self.others, keepdim=True)
            variance = x.var(self.others, correction=0, keepdim=True)
        deviation = (variance + 1e-5).rsqrt()
        scale = deviation * weight
        wanted = (x - center) * scale + bias
        terms = x.abs() * scale.abs() + (center * scale).abs() + bias.abs()
        if self.residual is not None:
            wanted = wanted + self.residual.double()
            terms = terms + self.residual.double().abs()
        assert_within(y, wanted.relu() if self.relu else wanted, terms)
        spread = x.abs().mean(self.others, keepdim=True) + center.abs()
        assert_within(self.each(mean, 0), center, spread, mean.dtype is BF16)
        assert_within(self.each(invstd, 0), deviation, deviation, invstd.dtype is BF16)
        if self.training and self.four[2] is not None:
            count = x.numel() // x.shape[1]
            moved = 0.9 * running_mean + 0.1 * center
            assert_within(self.each(new_mean, 0), moved, moved.abs() + spread, mean.dtype is BF16)
            moved = 0.9 * running_var + 0.1 * variance * count / (count - 1)
            assert_within(self.each(new_var, 0), moved, moved, mean.dtype is BF16)
        if self.relu and (self.saves == "exact" or self.residual is not None):
            active = layouts.flat_view(torch.logical_not(y <= 0), self.layout)
            assert torch.equal(code[-((x.numel() + 7) // 8) :], bits.mask_to_bits(active))
        if self.saves in codes.BITS:
            xhat = (x - self.each(mean, 0)) * self.each(invstd, 0)
            # Codes are of what float32 made of it, and of statistics that were not rounded yet.
            slack = 2.0**-18 * (terms + 1) / weight.abs().clamp(min=0.05)
            if mean.dtype is BF16:
                slack = slack + HALF_ULP * (xhat.abs() + (self.each(mean, 0) * deviation).abs())
            root = (xhat.abs() + slack).sqrt()
            signed = root * xhat.sign()
            reach = signed.amax(self.others, keepdim=True) - signed.amin(self.others, keepdim=True)
            cell = reach / (2 ** codes.BITS[self.saves] - 3)
            cell = cell * (0.52 if self.saves == "int8" else 1.01)
            room = cell * (2 * root + cell) + slack
            assert bool(((self.decoded(code, False) - xhat).abs() <= room).all())
        return found

    def decoded(self, code: Tensor, centred: bool) -> Tensor:
        """Normalised input as the codes tell it."""
        return codes.decode(code, self.x.shape, self.layout, self.saves, centred)[0].double()

    def check_backward(self, forward: tuple[Tensor, ...]) -> None:
        y, mean, invstd, _, _, code = forward
        weight, bias = self.four[:2]
        wants = [True, self.residual is not None, weight is not None, bias is not None]
        options = (self.training, self.relu, self.residual is not None, self.saves)
        seen = self.x if self.saves == "exact" else None
        args = (self.grad, seen, code, weight, bias, mean, invstd, wants)
        args += (self.x.shape, self.layout, *options)
        found = OPS.batch_norm_backward(*args)
        assert_as_faked(OPS.batch_norm_backward, args, found)
        g = self.grad.double()
        if self.relu:
            g = g * torch.logical_not(y <= 0)
        deviation, w = self.each(invstd, 1), self.each(weight, 1)
        xhat = (self.x.double() - self.each(mean, 0)) * deviation
        if self.saves in codes.BITS:
            xhat = self.decoded(code, self.training)
        count = g.numel() // g.shape[1]
        both, alone = ((t).sum(self.others, keepdim=True) for t in (g * xhat, g))
        both_abs, alone_abs = (
            t.abs().sum(self.others, keepdim=True) for t in (g * (xhat.abs() + 1), g)
        )
        dx, terms = g, g.abs()
        if self.training:
            dx = g - (alone + xhat * both) / count
            terms = terms + (alone_abs + (xhat.abs() + 1) * both_abs) / count
        scale = w * deviation
        assert_within(found[0], dx * scale, terms * scale.abs())
        if self.residual is not None:
            assert torch.equal(found[1].double(), g)
        if weight is not None and bias is not None:
            narrow = weight.dtype is BF16
            assert_within(self.each(found[2], 0), both, both_abs, narrow)
            assert_within(self.each(found[3], 0), alone, alone_abs, narrow)


OPTIONS = [
    {"residual": r, "relu": u, "training": t, "saves": s}
    for r, u, t, s in itertools.product(
        [False, True], [False, True], [True, False], ["exact", "int8", "int4"]
    )
]


def shapes_of(layout: str) -> list[tuple[int, ...]]:
    """Where the kernel is taken: vectors are filled; sizes off a vector's where they may be."""
    if layout == "channels_last":
        rest: list[tuple[int, ...]] = [(16, 3, 5), (48, 2, 2)]
    elif layout == "row_major":
        rest = [(3, 5, 7), (1, 4, 4), (2, 33), (16,), (32,)]  # the last two: matrices
    else:
        rest = [(3, 5, 7), (5, 1, 2), (2, 33)]
    # Of one image, "batch_innermost" is row-major.
    few = {(1, 5, 1, 2)}
    return [shape for b in BATCHES for size in rest if (shape := (b, *size)) not in few]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("parameters", [torch.float32, BF16, None], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms(layout: str, parameters: torch.dtype | None, count: int) -> None:
    thin = count > 1 or parameters is not torch.float32  # sums are the same, of what else is given
    shapes = shapes_of(layout)[:: 4 if thin else 1]
    with threads(count):
        for shape, options in itertools.product(shapes, OPTIONS):
            if options["training"] and shape[0] * torch.Size(shape[2:]).numel() < 2:
                continue
            if not options["training"] and parameters is None:
                continue
            case = Norm(shape, layout, parameters=parameters, **options)
            case.check_backward(case.check_forward())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [(3, 16, 150, 151), pytest.param((32, 16, 130, 128), marks=pytest.mark.slow)],
    ids=str,
)
def test_norms_of_long_channels(shape: tuple[int, ...], layout: str, count: int) -> None:
    """Channels that threads share; results that are written past the caches."""
    with threads(count):
        for saves, residual in (
            ("exact", True),
            ("exact", False),
            ("int8", False),
            ("int4", False),
        ):
            case = Norm(shape, layout, residual=residual, saves=saves)
            case.check_backward(case.check_forward())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spread", [1e15, 1e-3, 1e-20, 1e-38], ids=str)
def test_norms_of_huge_and_tiny_values(spread: float, layout: str) -> None:
    for options in OPTIONS:
        if options["saves"] == "exact":
            case = Norm((16, 16, 4, 5), layout, spread=spread, **options)
            case.check_backward(case.check_forward())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_of_nan_and_inf(layout: str) -> None:
    case = Norm((16, 16, 4, 5), layout, residual=True)
    clean = OPS.batch_norm(*case.args)
    assert case.residual is not None
    case.x[1, 1, 2, 2] = torch.nan
    case.x[2, 2, 0, 1] = torch.inf
    case.residual[0, 3, 0, 0] = torch.nan
    case.residual[0, 4, 0, 0] = torch.inf
    case.residual[0, 5, 0, 0] = -torch.inf
    y, _, _, _, _, code = OPS.batch_norm(*case.args)
    # NaN or infinity in a channel's mean, or its deviation, is NaN everywhere in it.
    assert y[:, 1:3].isnan().all() and y[0, 3, 0, 0].isnan()
    assert y[0, 4, 0, 0] == torch.inf and y[0, 5, 0, 0] == 0
    y[:, 1:3] = clean[0][:, 1:3]
    for channel in (3, 4, 5):
        y[0, channel, 0, 0] = clean[0][0, channel, 0, 0]
    assert torch.equal(y, clean[0])
    passed = layouts.from_flat(
        bits.bits_to_mask(code, y.numel()), y.shape, layouts.layout_of(case.x)
    )
    assert passed[:, 1:3].all() and passed[0, 3:5, 0, 0].all() and not passed[0, 5, 0, 0]


def test_a_result_that_is_rounded_to_zero_lets_nothing_through() -> None:
    """As its ReLU, which sees what is stored, has it."""
    half = 2.0**-134  # of the least there is: halfway, to even
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]).repeat(16, 1).to(BF16)
    x = x.t().contiguous()  # (5, 16)
    zero, one = torch.zeros(16), torch.ones(16)
    weight = torch.full((16,), half)
    y, *_, code = OPS.batch_norm(x, None, weight, zero, zero, one, False, 0.1, 0.0, True, "exact")
    if kernels.instruction_set() == "avx512bf16":  # the processor rounds, and flushes
        assert not y.any()
    else:
        assert y[:, 0].tolist() == [0, 0, 2 * half, 4 * half, 0]  # 3 halves: halfway, to even
    assert torch.equal(code, bits.mask_to_bits((y > 0).reshape(-1)))


# ---- ReLU and dropout ----------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.38e38, -3.38e38, 1e-40, -1e-40, 1e-30]
LENGTHS = [1, 7, 8, 15, 16, 17, 31, 33, 1000]
LARGE = 2**23 + 5  # is written past the caches


def values(n: int) -> Tensor:
    x = draw((n,), "", n)
    x[: min(n, len(SPECIAL))] = torch.tensor(SPECIAL[:n])
    return x


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("n", [*LENGTHS, 2**16 + 3, LARGE])
def test_relu_is_exact(n: int, count: int) -> None:
    x, grad = values(n), values(n).flip(0)
    with threads(count):
        y, kept = OPS.relu(x)
        dx = OPS.relu_backward(grad, kept, "row_major")
    active = torch.logical_not(x <= 0)
    assert torch.equal(kept, bits.mask_to_bits(active))
    for found, seen in ((y, x), (dx, grad)):
        wanted = torch.where(active, seen, 0)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert found.dtype is BF16
    assert not (y.signbit() & (y == 0)).any()
    torch.testing.assert_close(y, torch.relu(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_relu_in_each_layout(batch: int, layout: str) -> None:
    x = draw((batch, 5, 3, 7), layout, 1)
    found = OPS.relu(x)
    assert_as_faked(OPS.relu, (x,), found)
    assert torch.equal(found[0], torch.relu(x))
    args = (draw((batch, 5, 3, 7), "row_major", 2), found[1], layouts.layout_of(x))
    dx = OPS.relu_backward(*args)
    assert_as_faked(OPS.relu_backward, args, dx)
    assert torch.equal(dx, args[0] * (x > 0))


@pytest.mark.parametrize("p", [0.1, 0.25, 0.3, 0.5, 1 / 3, 0.9, 0.999])
@pytest.mark.parametrize("n", [*LENGTHS, 2**16 + 3])
def test_dropout_is_torchs_bit_for_bit(n: int, p: float) -> None:
    """The noise in bfloat16, and its product with an element, are rounded once each by both."""
    x, grad = values(n), values(n).flip(0)
    torch.manual_seed(1)
    y, kept = OPS.dropout(x, p)
    torch.manual_seed(1)
    wanted = dropout_reference(x, p)
    torch.manual_seed(1)
    eager = torch.nn.functional.dropout(x, p)
    dx = OPS.dropout_backward(grad, kept, p, "row_major")
    assert torch.equal(kept, wanted[1]) and y.dtype is dx.dtype is BF16
    for found, other in (
        (y, wanted[0]),
        (y, eager),
        (dx, dropout_backward_reference(grad, kept, p, "row_major")),
    ):
        torch.testing.assert_close(found, other, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit(), other.signbit()) or bool(found.isnan().any())
    keep = bits.bits_to_mask(kept, n)
    noise = keep.double() * float((1 / torch.tensor(1 - p).double()).to(BF16))
    finite = x.double().isfinite() & ((x.double() * noise).abs() < 3.39e38)
    assert_within(y[finite], (x.double() * noise)[finite], 0 * noise[finite])


# ---- Max pooling ---------------------------------------------------------------------------------

WINDOWS = [
    ([3, 3], [2, 2], [1, 1], [1, 1], False),
    ([2, 2], [2, 2], [0, 0], [1, 1], True),
    ([3, 2], [1, 3], [1, 0], [1, 2], False),
    ([3, 3], [1, 1], [1, 1], [1, 1], False),
]


def pool_by_hand(x: Tensor, windows: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(greatest, place of the first that is greatest) of the windows, NaN being above all.

    `y.shape` is that of torch's pooling in float64, which has every bfloat16.
    """
    kernel, stride, padding, dilation, _ = windows
    shape = torch.nn.functional.max_pool2d(x.double(), *windows).shape
    best = torch.full(shape, -torch.inf, dtype=torch.float64)
    place = torch.full(shape, -1)
    for i, j in itertools.product(*map(range, kernel)):
        seen = torch.full(shape, -torch.inf, dtype=torch.float64)
        inside = torch.zeros(shape, dtype=torch.bool)
        for r, c in itertools.product(*map(range, shape[2:])):
            row = r * stride[0] - padding[0] + i * dilation[0]
            column = c * stride[1] - padding[1] + j * dilation[1]
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                seen[:, :, r, c] = x[:, :, row, column].double()
                inside[:, :, r, c] = True
        wins = inside & ((place < 0) | (seen > best) | seen.isnan())
        best, place = torch.where(wins, seen, best), torch.where(wins, i * kernel[1] + j, place)
    return best, place


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_max_pools(batch: int, layout: str, windows: tuple[Any, ...]) -> None:
    x = (draw((batch, 17, 9, 11), layout, 1) * 2).round() / 2  # ties in most windows
    x[0, 0, 2, 2], x[0, 1, 3, 3], x[0, 2] = torch.nan, torch.inf, -torch.inf
    best, place = pool_by_hand(x, windows)
    for count in (1, 2):
        with threads(count):
            found = y, index = OPS.max_pool2d(x, *windows, True)
            alone = OPS.max_pool2d(x, *windows, False)
        assert_as_faked(OPS.max_pool2d, (x, *windows, True), found)
        assert_as_faked(OPS.max_pool2d, (x, *windows, False), alone)
        torch.testing.assert_close(y.double(), best, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(alone[0], y, rtol=0, atol=0, equal_nan=True)
        where = layouts.from_flat(index, y.shape, layouts.layout_of(x))
        assert torch.equal(where.long(), place)
    grad = draw(tuple(y.shape), "row_major", 2)
    kernel, stride, padding, dilation, _ = windows
    wanted = torch.zeros(x.shape, dtype=torch.float64)
    terms = torch.zeros_like(wanted)
    n, c = (torch.arange(size) for size in x.shape[:2])
    for r, col in itertools.product(*map(range, y.shape[2:])):
        won = place[:, :, r, col]
        row = r * stride[0] - padding[0] + won // kernel[1] * dilation[0]
        column = col * stride[1] - padding[1] + won % kernel[1] * dilation[1]
        at = (n[:, None].expand_as(won), c.expand_as(won), row, column)
        wanted.index_put_(at, grad[:, :, r, col].double(), accumulate=True)
        terms.index_put_(at, grad[:, :, r, col].double().abs(), accumulate=True)
    for count in (1, 2):
        with threads(count):
            args = (grad, index, x.shape, layouts.layout_of(x), *windows)
            dx = OPS.max_pool2d_backward(*args)
        assert_as_faked(OPS.max_pool2d_backward, args, dx)
        assert_within(dx, wanted, terms)


# ---- Changes of layout ---------------------------------------------------------------------------

CHANGES = list(itertools.permutations(LAYOUTS, 2))


@pytest.mark.parametrize(("source", "target"), CHANGES)
@pytest.mark.parametrize("batch", [*BATCHES, 40, 64])
def test_changes_of_layout_move_every_element(batch: int, source: str, target: str) -> None:
    for rest in [(5, 3, 7), (32, 4, 8), (17, 16, 1), (48, 5, 9), (7, 8, 8), (3, 1, 1), (1, 2, 33)]:
        n = batch * torch.Size(rest).numel()
        # Every pattern of bits in turn, which are not all numbers.
        x = torch.arange(n).to(torch.int16).view(BF16).view(batch, *rest)
        x = layouts.as_layout(x, source)
        if layouts.layout_of(x) == target:
            continue
        for count in (1, 2):
            with threads(count):
                found = OPS.to_layout(x, target)
            assert_as_faked(OPS.to_layout, (x, target), found)
            assert torch.equal(found.view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize(("source", "target"), CHANGES)
@pytest.mark.parametrize("shape", [(16, 48, 60, 50), (32, 64, 40, 40), (48, 33, 40, 41)], ids=str)
def test_changes_of_layout_past_the_caches(shape: Any, source: str, target: str) -> None:
    n = torch.Size(shape).numel()
    x = (torch.arange(n) * 7919).to(torch.int16).view(BF16).view(shape)
    x = layouts.as_layout(x, source)
    found = OPS.to_layout(x, target)
    assert torch.equal(found.view(torch.int16), x.view(torch.int16))
