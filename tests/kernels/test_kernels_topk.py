"""The C kernels of threshold search against the plain-torch definitions, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from swatfx import kernels, selectors
from swatfx.density import Density
from swatfx.errors import InputError
from swatfx.kernels import topk as topk_kernels
from swatfx.kernels.groups import matrices
from swatfx.ops.state import compute_state
from swatfx.selectors import Axes, topk
from swatfx.tensors import bits, layouts
from swatfx.tensors.layouts import BATCH_INNERMOST, CHANNELS_LAST
from tests.nets.topk_data import (
    DTYPES,
    KINDS,
    LAYOUTS,
    SELECTORS,
    SIZES,
    check,
    draw,
    reference_state,
    same,
)

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="no compiled kernels"),
    pytest.mark.usefixtures("threads_as_before"),
]
SETTINGS = settings(deadline=None, max_examples=60)


def search(x: Tensor, selector: str, density: Density, spatial: int = 2) -> Tensor | None:
    """What the kernel finds, None if it was not the kernel that searched."""
    found = selectors.get(selector).search(x, density, Axes.of(x.dim(), spatial, False))
    return None if found is None else found[0]


def check_search(x: Tensor, selector: str, sparsity: float, spatial: int = 2) -> bool:
    """The kernel's thresholds are the reference's; False if it left them to the reference.

    Also where the interval that a sample tells misses, or holds more than there is room for.
    """
    density = Density.from_sparsity(sparsity)
    if search(x, selector, density, spatial) is None:
        return False
    slow = reference_state(x, selector, density, spatial)
    what = f"{x.dtype} {sparsity}"
    check(lambda: search(x, selector, density, spatial), what, slow)
    for deviations in (0.0, 1e9):  # the interval misses; the interval is all there is
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(topk_kernels, "_DEVIATIONS", deviations)
            check(lambda: search(x, selector, density, spatial), f"{what} {deviations}", slow)
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_threshold_of_a_vector(size: int, kind: str) -> None:
    for dtype in DTYPES:
        x = draw(kind, (size,), dtype, size)
        for sparsity in (0.1, 0.5, 0.9, 0.999):
            some = Density.from_sparsity(sparsity).count(size) < size
            assert check_search(x, "nchw", sparsity, 0) == some


@pytest.mark.parametrize("size", [1000, 70000])
def test_every_rank_of_a_vector(size: int) -> None:
    x = draw("normal", (size,), torch.float32)
    ordered = x.abs().sort(descending=True).values
    for k in (1, 2, 3, size // 3, size - 2, size - 1):
        assert search(x, "nchw", Density(k / size), 0) == ordered[k - 1]


@SETTINGS
@given(
    st.tuples(*[st.integers(1, 9)] * 4),
    st.sampled_from(SELECTORS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.integers(1, 99),
)
def test_threshold_of_any_shape(
    shape: tuple[int, ...],
    selector: str,
    layout: str,
    dtype: torch.dtype,
    kind: str,
    dropped: int,
) -> None:
    x = layouts.as_layout(draw(kind, shape, dtype), layout)
    check_search(x, selector, dropped / 100)


@pytest.mark.parametrize("kind", ["normal", "relu", "ties", "wild"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("shape", [(3, 5, 60, 61), (17, 2, 73, 64), (2, 33, 7, 7)])
def test_threshold_of_groups(shape: tuple[int, ...], selector: str, layout: str, kind: str) -> None:
    """Long rows and columns, which take a sample, and short ones, which do not."""
    x = layouts.as_layout(draw(kind, shape, torch.float32), layout)
    assert check_search(x, selector, 0.9)
    assert check_search(x.bfloat16(), selector, 0.3)


@pytest.mark.parametrize("shape", [(70, 300), (5, 7, 300), (3, 70, 5, 30)])
@pytest.mark.parametrize("selector", SELECTORS)
def test_threshold_of_a_linear_input(shape: tuple[int, ...], selector: str) -> None:
    x = draw("relu", shape, torch.float32)
    one_each = selector == "hw" and len(shape) == 2  # groups of one element
    assert check_search(x, selector, 0.8, 0) != one_each


def test_gaps_and_unknown_orders_are_copied_or_left() -> None:
    whole = draw("normal", (6, 4, 10, 11), torch.float32)
    for x in (
        whole[:, ::2],
        whole[1:5, :, 1:, 2:9],
        whole.permute(2, 0, 3, 1),
        whole[:1].expand(6, 4, 10, 11),
        whole.transpose(1, 2),
    ):
        for selector in SELECTORS:
            assert check_search(x, selector, 0.7)


def test_how_groups_lie_in_memory() -> None:
    x = torch.empty(2, 3, 5, 7)
    inner = layouts.as_layout(x, BATCH_INNERMOST)
    last = layouts.as_layout(x, CHANNELS_LAST)

    def of(x: Tensor, *groups: int) -> tuple[int, int, int] | None:
        found = matrices(x, groups)
        return None if found is None else (found.blocks, found.rows, found.columns)

    assert of(x) == of(inner) == of(last) == (1, 210, 1)
    assert of(x, 2, 1, 1, 1) == (2, 105, 1) and of(x, 2, 3, 1, 1) == (6, 35, 1)
    assert of(inner, 2, 1, 1, 1) == (1, 105, 2) and of(inner, 2, 3, 1, 1) == (3, 35, 2)
    assert of(last, 2, 1, 1, 1) == (2, 105, 1) and of(last, 2, 3, 1, 1) == (2, 35, 3)
    assert of(x, 1, 3, 1, 1) is None and of(x[:, :2]) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_tensors_are_left_to_the_reference(dtype: torch.dtype) -> None:
    density = Density.from_sparsity(0.5)
    x = draw("normal", (200,), torch.float32)
    assert search(x, "nchw", density, 0) is not None
    assert search(x.double(), "nchw", density, 0) is None
    assert search(x[:0], "nchw", density, 0) is None
    assert search(x, "nchw", Density(1.0), 0) is None
    assert search(x, "random", density, 0) is None
    assert selectors.get("filter").search(x.view(10, 20), density, Axes(0, 1)) is None
    with kernels.reference_only():
        assert search(x, "nchw", density, 0) is None
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert search(fake, "nchw", density, 0) is None
        assert bits.mask_to_bits(fake > 0).shape == (25,)


# --- NaN


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("selector", [*SELECTORS, "random"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_nan_is_refused_by_name(dtype: torch.dtype, selector: str, layout: str) -> None:
    density = Density.from_sparsity(0.9)
    options: dict[str, Any] = {"layer": "layer1.conv", "spatial": 2, "is_weight": False}
    x = layouts.as_layout(draw("wild", (3, 5, 30, 31), dtype), layout)
    check(lambda: compute_state(x, density, selector, **options))
    flat = layouts.flat_view(x, layout)
    for place in (0, 1000, flat.numel() - 1):
        before = flat[place].clone()
        flat[place] = -torch.nan
        with pytest.raises(InputError, match="layer1.conv") as caught:
            compute_state(x, density, selector, **options)
        assert "1 NaN of 13950" in str(caught.value)
        flat[place] = before


def test_nan_where_a_group_is_kept_whole() -> None:
    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    with pytest.raises(InputError, match="1 NaN of 4"):
        compute_state(x, Density(0.9), "hw", layer="fc", spatial=0, is_weight=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_holds_nan(dtype: torch.dtype, size: int) -> None:
    x = draw("wild", (size,), dtype)
    assert check(lambda: topk.holds_nan(x)) is False
    x[-1] = torch.nan
    assert check(lambda: topk.holds_nan(x)) is True


# --- ranks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 17, 131073, 270000])
def test_digits_are_counted_as_the_other_ranks_count_them(kind: str, size: int) -> None:
    scores = draw(kind, (size,), torch.float32).abs()
    bits_of = scores.view(torch.int32)
    found = int(bits_of[size // 2]) if size else 0
    counter = topk.digit_counter(scores)
    with kernels.reference_only():
        reference = topk.digit_counter(scores)
    for shift, width in topk._DIGITS[torch.float32][1]:
        above = found >> shift + width << shift + width
        assert same(counter(above, shift, width), reference(above, shift, width))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_search_over_one_rank(kind: str, dtype: torch.dtype) -> None:
    scores = draw(kind, (70001,), dtype).abs()
    density = Density.from_sparsity(0.9)
    found = check(lambda: topk.kth_magnitude(scores, density, lambda counts: counts))
    assert same(found, topk.kth_magnitude(scores, density))
