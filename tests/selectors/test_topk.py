"""The k-th largest magnitude: exact, on small and big tensors, in every dtype, over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swatfx.density import DENSE, Density
from swatfx.selectors import topk
from swatfx.selectors.topk import grouped_kth_magnitude, kth_magnitude

SETTINGS = settings(deadline=None, max_examples=60)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def by_sorting(scores: Tensor, k: int) -> Tensor:
    """The definition, without any cleverness."""
    return scores.reshape(-1).sort(descending=True).values[k - 1]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(params=["small", "radix"])
def switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each of the two searches, whatever the size."""
    monkeypatch.setattr(topk, "_SMALL", 0 if request.param == "radix" else 1 << 40)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_is_the_kth_largest(switch: str, dtype: torch.dtype, sparsity: float) -> None:
    scores = draw((7, 11, 13), dtype).abs()
    density = Density.from_sparsity(sparsity)
    found = kth_magnitude(scores, density)
    assert found.dtype == dtype and found.shape == ()
    assert found == by_sorting(scores, density.count(scores.numel()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_big_tensor_above_the_switch(dtype: torch.dtype) -> None:
    scores = draw((topk._SMALL + 17,), dtype).abs()
    density = Density.from_sparsity(0.93)
    assert kth_magnitude(scores, density) == by_sorting(scores, density.count(scores.numel()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_the_format(switch: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [0.0, info.smallest_normal, info.eps, 1.0, info.max, torch.inf]
    if dtype is not torch.bfloat16:  # torch's own conversion flushes some of these
        values.append(info.smallest_normal / 2)  # a subnormal
    scores = torch.tensor(sorted(values) * 2, dtype=dtype)
    for k in range(1, scores.numel()):
        assert kth_magnitude(scores, Density(k / scores.numel())) == by_sorting(scores, k)


@SETTINGS
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40), st.integers(0, 99))
def test_both_searches_agree_with_sorting(values: list[float], dropped: int) -> None:
    scores = torch.tensor(values)
    density = Density.from_sparsity(dropped / 100)
    k = density.count(len(values))
    expected = by_sorting(scores, k) if k < len(values) else torch.zeros(())
    assert kth_magnitude(scores, density) == expected
    alone = kth_magnitude(scores, density, lambda counts: counts)  # radix, as over one rank
    assert alone == expected


@SETTINGS
@given(
    st.lists(st.lists(st.floats(0, 100, width=32), max_size=20), min_size=2, max_size=4),
    st.integers(0, 99),
)
def test_ranks_find_the_threshold_of_the_whole(parts: list[list[float]], dropped: int) -> None:
    density = Density.from_sparsity(dropped / 100)
    whole = torch.tensor([v for part in parts for v in part])
    k = density.count(whole.numel())
    expected = by_sorting(whole, k) if k < whole.numel() else torch.zeros(())
    for part in parts:
        assert _as_rank(part, parts, density) == expected


def _as_rank(part: list[float], parts: list[list[float]], density: Density) -> Tensor:
    """What one rank finds when the others run in step with it."""
    others = [torch.tensor(p) for p in parts if p is not part]
    known: list[tuple[int, int, int]] = []  # (shift, width, digit) found so far

    def reduce(counts: Tensor) -> Tensor:
        if counts.numel() == 1:
            return counts + sum(o.numel() for o in others)
        shift, width = topk._DIGITS[torch.float32][1][len(known)]
        total = counts.clone()
        for other in others:
            keys = other.view(torch.int32)
            for s, w, digit in known:
                keys = keys[((keys >> s) & ((1 << w) - 1)) == digit]
            digits = (keys >> shift) & ((1 << width) - 1)
            total += torch.bincount(digits, minlength=1 << width)
        known.append((shift, width, _digit_of(total, left)))
        before = total[known[-1][2] + 1 :].sum().item()
        left[0] -= int(before)
        return total

    left = [density.count(sum(len(p) for p in parts))]
    return kth_magnitude(torch.tensor(part), density, reduce)


def _digit_of(counts: Tensor, left: list[int]) -> int:
    seen = 0
    for digit in range(counts.numel() - 1, -1, -1):
        seen += int(counts[digit].item())
        if seen >= left[0]:
            return digit
    raise AssertionError("fewer elements than k")


def test_fewer_nonzeros_than_k_gives_zero(switch: str) -> None:
    scores = torch.zeros(100)
    scores[:10] = torch.arange(1.0, 11.0)
    assert kth_magnitude(scores, Density.from_sparsity(0.8)) == 0
    assert kth_magnitude(scores, Density.from_sparsity(0.9)) == 1


def test_dense_and_empty_give_zero(switch: str) -> None:
    assert kth_magnitude(torch.ones(5), DENSE) == 0
    assert kth_magnitude(torch.ones(0), Density.from_sparsity(0.5)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 5, 1), (4, 5, 1), (1, 1, 1)])
def test_a_threshold_a_group(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores = draw((4, 5, 6), dtype).abs()
    density = Density.from_sparsity(0.6)
    found = grouped_kth_magnitude(scores, density, shape)
    assert found.shape == shape and found.dtype == dtype
    for i in range(shape[0]):
        for j in range(shape[1]):
            group = scores[
                i : i + 1 if shape[0] > 1 else None,
                j : j + 1 if shape[1] > 1 else None,
            ]
            assert found[i, j, 0] == by_sorting(group, density.count(group.numel()))


def test_groups_of_scores_that_are_reduced_already() -> None:
    scores = draw((4, 5, 1, 1), torch.float32).abs()  # L1 of kernel slices
    density = Density.from_sparsity(0.6)
    found = grouped_kth_magnitude(scores, density, (4, 1, 1, 1))
    expected = torch.stack([by_sorting(row, 2) for row in scores])
    assert torch.equal(found.flatten(), expected)


def test_layout_does_not_matter() -> None:
    scores = draw((4, 5, 6, 7), torch.float32).abs()
    density = Density.from_sparsity(0.7)
    last = scores.to(memory_format=torch.channels_last)
    assert kth_magnitude(last, density) == kth_magnitude(scores, density)
    shape = (4, 5, 1, 1)
    expected = grouped_kth_magnitude(scores, density, shape)
    assert torch.equal(grouped_kth_magnitude(last, density, shape), expected)
