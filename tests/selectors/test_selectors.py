"""Selectors: which elements are kept, against a few lines of plain Python each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import swatfx
from swatfx import selectors
from swatfx.density import DENSE, Density
from swatfx.errors import PolicyError, UnknownNameError
from swatfx.selectors import SELECTORS, Axes, NofM, Selector
from swatfx.tensors import bits

SETTINGS = settings(deadline=None, max_examples=60)
WEIGHT = Axes(0, 1)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ALL = [*SELECTORS, "2:4", "1:3"]
# Structured selectors drop whole slices; n:m and random are not a threshold.
SCORED = [name for name in SELECTORS if name != "random"]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def mask_of(name: str, x: Tensor, sparsity: float, axes: Axes = WEIGHT, seed: int = 0) -> Tensor:
    selector = selectors.get(name)
    state = selector.state(x, Density.from_sparsity(sparsity), axes, seed)
    assert state.shape == selector.state_shape(tuple(x.shape), axes)
    assert state.dtype == selector.state_dtype(x.dtype)
    return selector.keep(x, state, axes).expand_as(x)


def top(scores: Tensor, sparsity: float) -> Tensor:
    """Mask of the k largest, by sorting."""
    k = Density.from_sparsity(sparsity).count(scores.numel())
    return scores >= scores.reshape(-1).sort(descending=True).values[k - 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 30), (8, 6, 3, 3), (4, 3, 5), (4, 3, 2, 2, 2)])
def test_nchw_is_topk_of_the_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    assert torch.equal(mask_of("nchw", x, 0.8), top(x.abs(), 0.8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chw_is_topk_of_each_sample(dtype: torch.dtype) -> None:
    x = draw(8, 6, 3, 3, dtype=dtype)
    expected = torch.stack([top(sample.abs(), 0.8) for sample in x])
    assert torch.equal(mask_of("chw", x, 0.8), expected)


def test_hw_is_topk_of_each_map() -> None:
    x = draw(3, 4, 5, 5)
    maps = [top(m.abs(), 0.8) for sample in x for m in sample]
    assert torch.equal(mask_of("hw", x, 0.8), torch.stack(maps).view(3, 4, 5, 5))


def test_channel_ranks_all_kernel_slices_of_the_layer() -> None:
    w = draw(8, 6, 3, 3)
    expected = top(w.abs().sum((2, 3)), 0.75)[:, :, None, None].expand_as(w)
    found = mask_of("channel", w, 0.75)
    assert torch.equal(found, expected) and int(found.sum()) == 12 * 9


def test_channel_per_filter_ranks_the_slices_of_each_filter() -> None:
    w = draw(8, 6, 3, 3) * torch.arange(1, 9).view(8, 1, 1, 1)  # late filters are larger
    slices = w.abs().sum((2, 3))
    expected = torch.stack([top(row, 0.5) for row in slices])[:, :, None, None].expand_as(w)
    assert torch.equal(mask_of("channel-per-filter", w, 0.5), expected)
    # The other reading takes most from the large filters.
    assert not torch.equal(mask_of("channel", w, 0.5), expected)


def test_filter_and_input_channel_rank_whole_slabs() -> None:
    w = draw(8, 6, 3, 3)
    filters = top(w.abs().sum((1, 2, 3)), 0.5)
    assert torch.equal(mask_of("filter", w, 0.5), filters.view(8, 1, 1, 1).expand_as(w))
    inputs = top(w.abs().sum((0, 2, 3)), 0.5)
    assert torch.equal(mask_of("input-channel", w, 0.5), inputs.view(1, 6, 1, 1).expand_as(w))


def test_channel_on_1x1_is_unstructured() -> None:
    for w in (draw(16, 12, 1, 1), draw(16, 12)):
        assert torch.equal(mask_of("channel", w, 0.9), mask_of("nchw", w, 0.9))
        assert torch.equal(mask_of("channel-per-filter", w, 0.9), mask_of("chw", w, 0.9))


@pytest.mark.parametrize("channels", [4, 8, 6, 3, 1])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (1, 4)])
def test_n_of_m_keeps_the_n_largest_of_each_group(n: int, m: int, channels: int) -> None:
    w = draw(5, channels, 3, 2)
    keep = mask_of(f"{n}:{m}", w, 1 - n / m)
    for f in range(5):
        for y in range(3):
            for x in range(2):
                for start in range(0, channels, m):
                    group = w[f, start : start + m, y, x].abs()
                    kept = keep[f, start : start + m, y, x]
                    assert int(kept.sum()) == min(n, group.numel())
                    if not kept.all():
                        assert group[kept].min() >= group[~kept].max()


def test_n_of_m_mask_outlives_moving_weights() -> None:
    w = draw(4, 8)
    selector = selectors.get("2:4")
    state = selector.state(w, Density.from_sparsity(0.5), WEIGHT, 0)
    assert torch.equal(selector.keep(-w.flip(1), state, WEIGHT), mask_of("2:4", w, 0.5))


@pytest.mark.parametrize(
    ("name", "sparsity"), [("2:4", 0.9), ("1:4", 0.5), ("1:3", 0.66), ("4:8", 0.25)]
)
def test_sparsity_that_disagrees_with_n_of_m(name: str, sparsity: float) -> None:
    with pytest.raises(PolicyError, match="use sparsity") as caught:
        selectors.get(name).check(Density.from_sparsity(sparsity), "features.3")
    assert "features.3" in str(caught.value) and f"{sparsity:g}" in str(caught.value)


def test_compile_refuses_such_a_sparsity() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.raises(PolicyError, match="layer '1'.*use sparsity 0.5"):
        swatfx.compile(model, swatfx.swat_u(0.9, weight_selector="2:4"))
    with pytest.raises(PolicyError, match="weights only"):
        swatfx.compile(model, swatfx.swat_u(0.5, activation_selector="channel"))


@pytest.mark.parametrize(("name", "sparsity"), [("2:4", 0.5), ("1:3", 2 / 3), ("2:4", 0.0)])
def test_sparsity_that_agrees_with_n_of_m(name: str, sparsity: float) -> None:
    density = Density.from_sparsity(sparsity)
    selectors.get(name).check(density, "layer")
    kept = mask_of(name, draw(4, 12), sparsity).double().mean().item()
    assert kept == pytest.approx(1 - sparsity)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_random_keeps_the_density_in_expectation(sparsity: float) -> None:
    x = draw(100, 400)
    kept = mask_of("random", x, sparsity, seed=3).double().mean().item()
    spread = (sparsity * (1 - sparsity) / x.numel()) ** 0.5
    assert abs(kept - (1 - sparsity)) < 5 * spread


def test_random_follows_its_seed_and_not_the_global_one() -> None:
    x = draw(50, 50)
    torch.manual_seed(0)
    first = mask_of("random", x, 0.5, seed=1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(mask_of("random", x, 0.5, seed=1), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(mask_of("random", x, 0.5, seed=2), first)
    last = x.t().contiguous().t()
    assert torch.equal(mask_of("random", last, 0.5, seed=1), first)


@pytest.mark.parametrize("name", SCORED)
@SETTINGS
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    sparsity=st.integers(0, 99).map(lambda i: i / 100),
    seed=st.integers(0, 1000),
)
def test_keeps_at_least_what_was_asked_in_every_group(
    name: str, shape: tuple[int, ...], sparsity: float, seed: int
) -> None:
    w = draw(*shape, seed=seed)
    selector = SELECTORS[name]
    scores = selector.score(w, WEIGHT)
    state = selector.state(w, Density.from_sparsity(sparsity), WEIGHT, 0)
    kept = selector.keep(w, state, WEIGHT)
    assert kept.shape == scores.shape
    grouped = {"sample": 0, "channel": 1}
    dims = [d for d in range(4) if d not in {grouped[g] for g in selector.groups}]
    count = Density.from_sparsity(sparsity).count(torch.Size(scores.shape[d] for d in dims).numel())
    # Scores of normal draws have no ties, so this is exact.
    assert torch.equal(kept.sum(dims), torch.full_like(kept.sum(dims), count))
    dropped = scores.masked_fill(kept, -1).amax(dims)
    least = scores.masked_fill(~kept, torch.inf).amin(dims)
    assert bool((dropped < least).all())


@pytest.mark.parametrize("name", SCORED)
def test_ties_are_all_kept(name: str) -> None:
    w = torch.ones(4, 4, 3, 3)
    w[1::2] *= -1  # signs do not count
    assert mask_of(name, w, 0.9).all()


def test_ties_at_the_threshold_only() -> None:
    x = torch.tensor([[3.0, -2.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0]])
    kept = mask_of("nchw", x, 0.8)  # two of ten; the second is tied with two more
    assert kept[0].tolist() == [True] * 4 + [False] * 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_nonzeros_than_k_keeps_everything(dtype: torch.dtype) -> None:
    x = torch.zeros(10, 10, dtype=dtype)
    x[0, :3] = torch.tensor([1.0, -2.0, 3.0])
    selector = selectors.get("nchw")
    state = selector.state(x, Density.from_sparsity(0.9), WEIGHT, 0)
    assert state == 0 and selector.keep(x, state, WEIGHT).all()


@pytest.mark.parametrize("name", SCORED)
def test_nan_is_kept_and_so_is_inf(name: str) -> None:
    w = draw(8, 6, 3, 3)
    selector = SELECTORS[name]
    state = selector.state(w, Density.from_sparsity(0.9), WEIGHT, 0)
    smallest = w.abs().argmin()
    for value in (torch.nan, torch.inf, -torch.inf):
        moved = w.clone()
        moved.view(-1)[smallest] = value
        assert selector.keep(moved, state, WEIGHT).expand_as(w).reshape(-1)[smallest]


@pytest.mark.parametrize("name", ALL)
def test_dense_keeps_everything(name: str) -> None:
    assert mask_of(name, draw(8, 12, 3, 3), 0.0).all()
    selector = selectors.get(name)
    zeros = torch.zeros(4, 12)
    assert selector.keep(zeros, selector.state(zeros, DENSE, WEIGHT, 0), WEIGHT).all()


@pytest.mark.parametrize("name", ["nchw", "chw", "hw", "random"])
@pytest.mark.parametrize(
    ("shape", "spatial"),
    [((2, 3, 4, 5), 2), ((3, 4, 5), 2), ((6, 5), 0), ((5,), 0), ((2, 4, 5), 0), ((0, 3, 4), 1)],
)
def test_activations_of_every_rank(name: str, shape: tuple[int, ...], spatial: int) -> None:
    axes = Axes.of(len(shape), spatial, False)
    x = draw(*shape)
    keep = mask_of(name, x, 0.5, axes)
    if name == "chw" and axes.sample == 0 and x.numel():
        assert torch.equal(keep, torch.stack([top(sample.abs(), 0.5) for sample in x]))
    if name == "chw" and axes.sample is None:
        assert torch.equal(keep, mask_of("nchw", x, 0.5, axes))


def test_axes() -> None:
    assert Axes.of(4, 2, True) == Axes(0, 1)
    assert Axes.of(4, 2, False) == Axes(0, 1)
    assert Axes.of(3, 2, False) == Axes(None, 0)
    assert Axes.of(3, 0, False) == Axes(0, 2)
    assert Axes.of(1, 0, False) == Axes(None, 0)


@pytest.mark.parametrize("name", ["channel", "channel-per-filter", "filter", "input-channel"])
def test_slice_norms_do_not_depend_on_layout(name: str) -> None:
    # A checkpoint may come back in another memory format, and sums in another order.
    w = draw(32, 16, 3, 3)
    selector = SELECTORS[name]
    state = selector.state(w, Density.from_sparsity(0.7), WEIGHT, 0)
    last = w.to(memory_format=torch.channels_last)
    expected = selector.keep(w, state, WEIGHT)
    assert torch.equal(selector.keep(last, state, WEIGHT), expected)
    assert torch.equal(selector.keep(w.double(), state.double(), WEIGHT), expected)


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="channel"):
        selectors.get("chanel")
    for name in ("4:2", "4:4", "0:4"):
        with pytest.raises(UnknownNameError, match="2:4"):
            selectors.get(name)


def test_n_of_m_is_read_from_its_name() -> None:
    selector = selectors.get("3:8")
    assert isinstance(selector, NofM) and (selector.n, selector.m) == (3, 8)
    state = selector.state(draw(4, 16), Density.from_sparsity(0.625), WEIGHT, 0)
    assert torch.equal(bits.bits_to_mask(state, 64).view(4, 16), mask_of("3:8", draw(4, 16), 0.625))


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "SELECTORS", dict(SELECTORS))
    selectors.register(Selector("squares", lambda x, axes: x * x))
    x = draw(10, 10)
    assert torch.equal(mask_of("squares", x, 0.9), top(x * x, 0.9))
