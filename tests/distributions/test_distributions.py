"""How a global budget is shared over layers: the paper's figures, and what holds for all shapes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swatfx import distributions, models
from swatfx.density import Density
from swatfx.distributions import DISTRIBUTIONS, er, erk, momentum_budgets, uniform
from swatfx.errors import UnknownNameError

SETTINGS = settings(deadline=None, max_examples=150)
Shape = tuple[int, ...]
extents = st.integers(1, 64)
conv_shapes = st.tuples(extents, extents, st.integers(1, 7), st.integers(1, 7))
shapes = st.lists(st.one_of(conv_shapes, st.tuples(extents, extents)), min_size=1, max_size=12)
targets = st.integers(0, 999).map(lambda i: Density.from_sparsity(i / 1000))
Solver = Callable[[Sequence[Shape], Density], list[Density]]


def shapes_of(name: str) -> dict[str, Shape]:
    """Weight shapes of every conv and linear layer, by module path."""
    with torch.device("meta"):
        model = models.create(name)
    layers = (m for m in model.named_modules() if isinstance(m[1], (nn.Conv2d, nn.Linear)))
    return {path: tuple(layer.weight.shape) for path, layer in layers}


def scale_of(shape: Shape, density: Density) -> float:
    """The e of d = e * sum / prod, from a layer that is not dense."""
    return density.value * math.prod(shape) / sum(shape)


@pytest.mark.parametrize(
    ("model", "sparsity", "e", "dense_shapes", "some"),
    [
        (
            "cifar/vgg16",
            0.95,
            78.9916,
            [(64, 3, 3, 3), (10, 4096)],
            {
                (64, 64, 3, 3): 0.2871,
                (512, 512, 3, 3): 0.0345,
                (4096, 512): 0.1736,
                (4096, 4096): 0.0386,
            },
        ),
        ("cifar/wrn-16-8", 0.95, 68.3681, [(16, 3, 3, 3), (128, 16, 1, 1), (10, 512)], {}),
        ("resnet50", 0.8, 99.5612, None, {(64, 3, 7, 7): 0.8572, (1000, 2048): 0.1482}),
        ("resnet50", 0.9, 48.7861, [(64, 64, 1, 1)], {(64, 3, 7, 7): 0.42}),
    ],
)
def test_erk_table(
    model: str,
    sparsity: float,
    e: float,
    dense_shapes: list[Shape] | None,
    some: dict[Shape, float],
) -> None:
    layers = shapes_of(model)
    found = erk(list(layers.values()), Density.from_sparsity(sparsity))
    pairs = list(zip(layers.values(), found, strict=True))
    scales = [scale_of(s, d) for s, d in pairs if not d.is_dense]
    assert min(scales) == pytest.approx(e, abs=5e-5) == max(scales)
    dense = [s for s, d in pairs if d.is_dense]
    if dense_shapes is None:
        assert len(dense) == 8 and all(s[2:] == (1, 1) for s in dense)
    else:
        assert dense == dense_shapes
    for shape, density in some.items():
        values = {round(d.value, 4) for s, d in pairs if s == shape}
        assert values == {density}


def test_erk_solves_again_for_the_rest() -> None:
    # Raw scores 1 and 20/100: e = 7.5 would give the first layer 7.5, so it is dense, and the
    # other gets what is left of .5 * 102 - 2 = 49 of its 100.
    first, second = erk([(2, 1), (10, 10)], Density(0.5))
    assert first.is_dense and second.value == pytest.approx(0.49)


def test_er_leaves_kernels_out() -> None:
    with_kernel, without = (
        erk([(8, 4, 3, 3), (8, 8)], Density(0.2)),
        er([(8, 4, 3, 3), (8, 8)], Density(0.2)),
    )
    ratio = (8 + 4) / (8 * 4) / ((8 + 8) / (8 * 8))
    assert without[0].value / without[1].value == pytest.approx(ratio)
    assert with_kernel[0].value < without[0].value


@pytest.mark.parametrize("solve", [erk, er])
@SETTINGS
@given(shapes, targets)
def test_budget_is_met(solve: Solver, layers: list[Shape], target: Density) -> None:
    found = solve(layers, target)
    assert all(0 < d.value <= 1 for d in found)
    sizes = [math.prod(s) for s in layers]
    spent = math.fsum(d.value * n for d, n in zip(found, sizes, strict=True))
    assert spent == pytest.approx(target.value * sum(sizes), rel=1e-9)


@SETTINGS
@given(shapes, targets, st.integers(0, 2**31))
@pytest.mark.parametrize("solve", [erk, er, uniform])
def test_order_of_layers_does_not_matter(
    solve: Solver, layers: list[Shape], target: Density, seed: int
) -> None:
    order = list(range(len(layers)))
    random.Random(seed).shuffle(order)
    shuffled = solve([layers[i] for i in order], target)
    straight = solve(layers, target)
    assert shuffled == [straight[i] for i in order]


@SETTINGS
@given(shapes, targets)
def test_erk_is_proportional_below_the_cap(layers: list[Shape], target: Density) -> None:
    found = erk(layers, target)
    free = [scale_of(s, d) for s, d in zip(layers, found, strict=True) if not d.is_dense]
    for shape, density in zip(layers, found, strict=True):
        if free and density.is_dense:
            # A layer is dense only where e asks for 1 or more of it.
            assert max(free) * sum(shape) / math.prod(shape) >= 1 - 1e-9
    if free:
        assert max(free) == pytest.approx(min(free), rel=1e-9)


@pytest.mark.parametrize("solve", [erk, er, uniform])
def test_sparsity_zero_keeps_everything(solve: Solver) -> None:
    layers: list[Shape] = [(3, 7, 3, 3), (5, 3), (64, 2, 1, 1)]
    found = solve(layers, Density.from_sparsity(0))
    assert [d.count(math.prod(s)) for d, s in zip(found, layers, strict=True)] == [189, 15, 128]


def test_uniform_keeps_the_exact_fraction() -> None:
    target = Density.from_sparsity(0.95)
    assert uniform([(10, 100)], target) == [target]


def test_momentum_toy_case() -> None:
    assert momentum_budgets([4, 1, 1, 2], [100, 1000, 5000, 300], 0.1) == [100, 153, 153, 233]


def test_momentum_share_does_not_look_at_size() -> None:
    assert momentum_budgets([1, 3], [1000, 3000], 0.1) == [100, 300]
    assert momentum_budgets([1, 1], [1000, 3000], 0.1) == [200, 200]


def test_momentum_excess_cascades() -> None:
    # 400, 400 and 400 of 1200: the first has 10 and gives 195 to each of the others, of which the
    # second has only 500 and gives its 95 to the last.
    assert momentum_budgets([1, 1, 1], [10, 500, 1890], 0.5) == [10, 500, 690]


def test_almost_dense_layers_become_dense() -> None:
    # 995 of 1000 passes .99: the five that are missing come from the other layer.
    assert momentum_budgets([995, 5], [1000, 1000], 0.5) == [1000, 1]
    assert momentum_budgets([990, 10], [1000, 1000], 0.5) == [990, 10]


momentum_layers = st.lists(
    st.tuples(st.floats(0, 10), st.integers(1, 10_000)), min_size=1, max_size=10
)


@SETTINGS
@given(momentum_layers, st.integers(1, 1000))
def test_momentum_meets_the_budget_within_rounding(
    layers: list[tuple[float, int]], kept: int
) -> None:
    momenta, sizes = [m for m, _ in layers], [n for _, n in layers]
    density = kept / 1000
    found = momentum_budgets(momenta, sizes, density)
    assert all(1 <= b <= n for b, n in zip(found, sizes, strict=True))
    # At most one element a layer of rounding up, one of rounding down; and a layer that is nearly
    # dense takes a hundredth more than its share where there is no other layer to take it from.
    slack = 2 * len(layers) + 0.01 * sum(sizes)
    assert abs(sum(found) - density * sum(sizes)) <= slack


@SETTINGS
@given(momentum_layers, st.integers(1, 1000), st.integers(0, 2**31))
def test_momentum_order_does_not_matter(
    layers: list[tuple[float, int]], kept: int, seed: int
) -> None:
    order = list(range(len(layers)))
    random.Random(seed).shuffle(order)
    momenta, sizes = [m for m, _ in layers], [n for _, n in layers]
    straight = momentum_budgets(momenta, sizes, kept / 1000)
    shuffled = momentum_budgets([momenta[i] for i in order], [sizes[i] for i in order], kept / 1000)
    assert shuffled == [straight[i] for i in order]


@pytest.mark.parametrize("momenta", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_momentum_that_says_nothing_leaves_it_uniform(momenta: list[float]) -> None:
    assert momentum_budgets(momenta, [100, 1000], 0.1) == [10, 100]


def test_names() -> None:
    assert set(DISTRIBUTIONS) >= {"uniform", "erk", "er", "momentum"}
    assert distributions.get("erk") is erk
    assert distributions.get("momentum") is uniform  # where it starts
    with pytest.raises(UnknownNameError, match="erk"):
        distributions.get("erkk")
