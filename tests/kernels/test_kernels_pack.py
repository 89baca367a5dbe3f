"""The C kernels of packing and masks against the plain-torch definitions, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swatfx import kernels, ops, selectors
from swatfx.density import Density
from swatfx.kernels import pack as pack_kernels
from swatfx.ops.pack import order_of, unpack
from swatfx.ops.where import active_weight, kept_top
from swatfx.selectors import Axes
from swatfx.tensors import bits, layouts
from swatfx.tensors.layouts import ROW_MAJOR
from tests.nets.topk_data import (
    DTYPES,
    KINDS,
    LAYOUTS,
    SELECTORS,
    SIZES,
    check,
    draw,
    reference_state,
)

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="no compiled kernels"),
    pytest.mark.usefixtures("threads_as_before"),
]
SETTINGS = settings(deadline=None, max_examples=60)


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing may not fall back to the reference while kernels are on."""
    real = pack_kernels.pack_reference

    def guarded(*args: Any) -> Tensor:
        assert not kernels.available(), "the reference ran"
        return real(*args)

    monkeypatch.setattr(pack_kernels, "pack_reference", guarded)


def pack(
    x: Tensor, threshold: Tensor, selector: str, dtype: torch.dtype, layout: str = ""
) -> Tensor:
    packed: Tensor = ops.pack(x, threshold, 2, selector, dtype, layout)
    return packed


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_pack_and_unpack_of_a_vector(kind: str, stored: torch.dtype, only_kernels: None) -> None:
    for dtype in DTYPES:
        for size in SIZES:
            x = draw(kind, (size,), dtype, size)
            threshold = reference_state(x, "nchw", Density.from_sparsity(0.8), 0)

            def run(x: Tensor = x, threshold: Tensor = threshold) -> Tensor:
                return ops.pack(x, threshold, 0, "nchw", stored)  # type: ignore[no-any-return]

            packed = check(run, f"{dtype} {size}")

            def back(packed: Tensor = packed, size: int = size) -> Tensor:
                return bits.unpack(packed, size, stored)

            check(back, f"{dtype} {size}")


@SETTINGS
@given(
    st.tuples(*[st.integers(1, 9)] * 4),
    st.sampled_from(SELECTORS),
    st.sampled_from(LAYOUTS),
    st.sampled_from([*LAYOUTS, ""]),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.integers(0, 99),
)
def test_pack_of_any_shape(
    shape: tuple[int, ...],
    selector: str,
    lies: str,
    layout: str,
    dtype: torch.dtype,
    kind: str,
    dropped: int,
) -> None:
    x = layouts.as_layout(draw(kind, shape, dtype), lies)
    threshold = reference_state(x, selector, Density.from_sparsity(dropped / 100))
    packed = check(lambda: pack(x, threshold, selector, dtype, layout))
    order = layout or layouts.layout_of(x)
    assert order_of(packed) == order
    check(lambda: unpack(packed, shape, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("shape", [(3, 5, 60, 61), (17, 2, 73, 64), (20, 33, 7, 7)])
def test_pack_of_groups(
    shape: tuple[int, ...], selector: str, layout: str, only_kernels: None
) -> None:
    for kind in ("normal", "relu", "wild"):
        x = layouts.as_layout(draw(kind, shape, torch.float32), layout)
        threshold = reference_state(x, selector, Density.from_sparsity(0.9))
        check(lambda: pack(x, threshold, selector, x.dtype))  # noqa: B023
        check(lambda: pack(x, threshold, selector, torch.bfloat16, ROW_MAJOR))  # noqa: B023


@pytest.mark.parametrize("selector", ["random", "chw"])
def test_pack_by_a_mask(selector: str) -> None:
    x = draw("relu", (4, 3, 130, 140), torch.float32)
    axes = Axes.of(4, 2, False)
    state = selectors.get(selector).state(x, Density.from_sparsity(0.7), axes, 3)
    for dtype in (torch.float32, torch.bfloat16):
        check(lambda: pack(x, state, selector, dtype))  # noqa: B023
    keep = selectors.get(selector).keep(x, state, axes).expand_as(x).reshape(-1)
    check(lambda: bits.pack(x.reshape(-1), keep, torch.float32))
    check(lambda: bits.pack(x.reshape(-1).double(), keep, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, -0.0, -1.0, torch.nan, -torch.nan, torch.inf, 1.0])
def test_pack_under_odd_thresholds(
    threshold: float, dtype: torch.dtype, only_kernels: None
) -> None:
    x = draw("wild", (2, 3, 40, 41), dtype)
    x[0, 0, 0, :5] = torch.nan
    check(lambda: pack(x, torch.tensor(threshold, dtype=dtype), "nchw", dtype))
    whole = torch.full((2, 1, 1, 1), threshold, dtype=dtype)
    check(lambda: pack(x, whole, "chw", dtype))


def test_pack_of_nothing_and_of_what_has_no_kernel() -> None:
    for x in (torch.empty(0, 3, 4, 4), draw("normal", (2, 3, 4, 5), torch.float64)):
        check(lambda: pack(x, torch.zeros((), dtype=x.dtype), "nchw", x.dtype))  # noqa: B023
    x = draw("normal", (2, 3, 4, 5), torch.bfloat16)
    check(lambda: pack(x, torch.tensor(0.30001), "nchw", x.dtype))  # a threshold of another dtype


def test_unpack_of_a_wrong_size_is_an_error() -> None:
    packed = bits.pack(torch.ones(100), torch.ones(100).bool(), torch.float32)
    for wrong in (packed[:-4], packed[:-1], torch.cat([packed, packed[:4]])):
        with pytest.raises((RuntimeError, IndexError)):
            bits.unpack(wrong, 100, torch.float32)
    stray = bits.pack(torch.ones(64), torch.ones(64).bool(), torch.float32)
    with pytest.raises((RuntimeError, IndexError)):
        bits.unpack(stray, 60, torch.float32)  # bits are set behind the last element


@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_masks(size: int, density: float) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < density
    packed = check(lambda: bits.mask_to_bits(mask))
    assert torch.equal(check(lambda: bits.bits_to_mask(packed, size)), mask)
    check(lambda: bits.mask_to_bits(mask.view(-1, 1).expand(-1, 3)))


# --- masked weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_top_weights_as_a_dense_tensor(kind: str, layout: str) -> None:
    for dtype in (*DTYPES, torch.float64):
        weight = layouts.as_layout(draw(kind, (8, 5, 3, 3), dtype), layout)
        for selector in ("nchw", "hw", "channel"):
            axes = Axes(0, 1)
            state = selectors.get(selector).state(weight, Density(0.3), axes, 0)
            for seen in (dtype, torch.bfloat16):
                check(lambda: active_weight(weight, state, selector, seen))  # noqa: B023
            check(lambda: kept_top(weight, state, selector, axes))  # noqa: B023


@pytest.mark.parametrize("threshold", [0.0, -0.0, -1.0, torch.nan, torch.inf, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_weights_under_odd_thresholds(dtype: torch.dtype, threshold: float) -> None:
    weight = draw("wild", (200, 1000), dtype)
    weight[0, :3] = torch.nan
    state = torch.tensor(threshold, dtype=dtype)
    check(lambda: kept_top(weight, state, "nchw", Axes(0, 1)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 70_001])
def test_weights_under_a_mask(size: int, dtype: torch.dtype) -> None:
    """NaN outside of it is zero; what lies behind the mask, as of old, is not read."""
    weight = draw("wild", (size, 1), dtype) if size else torch.empty(0, 1, dtype=dtype)
    weight[: size // 2] = torch.nan
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(size)) < 0.3
    for state in (
        bits.mask_to_bits(keep),
        torch.cat([bits.mask_to_bits(keep), torch.ones(1).byte()]),
    ):
        found = check(lambda: kept_top(weight, state, "held:nchw", Axes(0, 1)))  # noqa: B023
        expected = torch.where(keep, weight, torch.zeros_like(weight))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    turned = weight.expand(size, 3).t()
    mask = bits.mask_to_bits(torch.ones(turned.shape, dtype=torch.bool))
    check(lambda: kept_top(turned, mask, "held:nchw", Axes(0, 1)))


def test_gradients_go_through_the_reference() -> None:
    weight = draw("normal", (6, 4), torch.float32).requires_grad_()
    kept_top(weight, torch.tensor(0.5), "nchw", Axes(0, 1)).sum().backward()
    assert torch.equal(weight.grad, (weight.abs() >= 0.5).float())
    weight.grad = None
    keep = torch.rand(6, 4) < 0.5
    kept_top(weight, bits.mask_to_bits(keep), "held:nchw", Axes(0, 1)).sum().backward()
    assert torch.equal(weight.grad, keep.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selector", ["nchw", "chw", "hw"])
def test_thresholds_of_a_wider_dtype(
    selector: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast: what reaches a float32 threshold, between two values of the narrow dtype."""
    if not kernels.available():
        pytest.skip("no compiled kernels")
    torch.manual_seed(0)
    x = torch.randn(3, 8, 5, 7).to(dtype)
    shape = {"nchw": (), "chw": (3, 1, 1, 1), "hw": (3, 8, 1, 1)}[selector]
    for value in (0.5, 0.50001, 0.49999, 0.0, -1.0, float("nan"), 1e-30, 7e4, float("inf")):
        threshold = torch.full(shape, value)
        keep = ~(x.float().abs() < threshold.clamp(min=0)) & (x != 0)
        with monkeypatch.context() as patch:
            patch.setattr("swatfx.kernels.pack.pack_reference", None)
            packed = ops.pack(x, threshold, 2, selector, dtype)
        found = unpack(packed, tuple(x.shape), dtype)
        assert torch.equal(found, x.masked_fill(~keep, 0)), value
