"""Drop, share and grow rules on tensors alone: counts, order, ties, and numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import swatfx
from swatfx.density import Density
from swatfx.errors import UnknownNameError
from swatfx.masks import rules as masks
from swatfx.masks.rules import DROPS, GROWS, SHARES, MaskedLayer, drop_count, largest, share_out

SETTINGS = settings(deadline=None, max_examples=60)
LAYERED = ["magnitude", "signed", "random"]  # each drops `drop_count` of every layer


def _memory(value: float = 0.0) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _layer(weight: Any, keep: Any = None, target: float = 1.0, **fields: Any) -> MaskedLayer:
    weight = torch.as_tensor(weight, dtype=torch.float32)
    kept = torch.ones_like(weight, dtype=torch.bool) if keep is None else torch.as_tensor(keep)
    seed = fields.pop("seed", 0)
    selected = fields.pop("selected", kept)
    return MaskedLayer(
        fields.pop("name", "layer"),
        weight,
        kept.bool(),
        Density(target),
        torch.Generator().manual_seed(seed),
        lambda: selected,
        **fields,
    )


@st.composite
def layers(draw: Any) -> MaskedLayer:
    """A layer whose weights tie often, and which holds more or less than its target."""
    size = draw(st.integers(1, 40))
    weight = draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size))
    keep = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    target = draw(st.floats(0.05, 1.0))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    layer = _layer(weight, keep, target, momentum=torch.randn(size, generator=generator))
    return replace(layer, gradient=torch.randn(size, generator=generator))


FRACTIONS = st.floats(0, 1)


# ---- Dropping ------------------------------------------------------------------------------------


@SETTINGS
@given(layers(), FRACTIONS)
def test_drop_count_is_the_fraction_of_the_target_and_all_beyond(
    layer: MaskedLayer, fraction: float
) -> None:
    within = min(layer.active, layer.target.count(layer.keep.numel()))
    count = drop_count(layer, fraction)
    left = layer.active - count
    assert 0 <= left <= within  # never more than the target is left
    assert abs(left - (1 - fraction) * within) < 1 + 1e-6
    assert drop_count(layer, 0.0) == layer.active - within
    assert drop_count(layer, 1.0) == layer.active


def test_drop_count_does_not_lose_one_to_rounding() -> None:
    assert math.floor(0.29 * 100) == 28  # what a plain product would give
    assert drop_count(_layer(torch.ones(100)), 0.29) == 29


@pytest.mark.parametrize("rule", LAYERED)
@SETTINGS
@given(layer=layers(), fraction=FRACTIONS)
def test_rules_of_a_layer_drop_that_many_active_weights(
    rule: str, layer: MaskedLayer, fraction: float
) -> None:
    (dropped,) = DROPS[rule]([layer], fraction, _memory())
    assert dropped.dtype == torch.bool and dropped.shape == layer.weight.shape
    assert not (dropped & ~layer.keep).any()
    assert int(dropped.sum()) == drop_count(layer, fraction)


@SETTINGS
@given(layers(), FRACTIONS)
def test_magnitude_drops_the_smallest(layer: MaskedLayer, fraction: float) -> None:
    (dropped,) = DROPS["magnitude"]([layer], fraction, _memory())
    sizes = layer.weight.abs()
    stays = sizes[layer.keep & ~dropped]
    assert not dropped.any() or not stays.numel() or sizes[dropped].max() <= stays.min()


@SETTINGS
@given(layers(), FRACTIONS)
def test_signed_drops_the_smallest_of_each_sign(layer: MaskedLayer, fraction: float) -> None:
    (dropped,) = DROPS["signed"]([layer], fraction, _memory())
    count = drop_count(layer, fraction)
    for sign in (layer.weight < 0, layer.weight >= 0):
        active, gone = layer.keep & sign, dropped & sign
        stays = layer.weight.abs()[active & ~gone]
        if gone.any() and stays.numel():
            assert layer.weight.abs()[gone].max() <= stays.min()
        share = int(active.sum()) / max(layer.active, 1)
        assert abs(int(gone.sum()) - share * count) <= 0.5 + 1e-9


def test_signed_by_hand() -> None:
    """SET: of four negative and six positive weights, half of each sign."""
    weight = [-9.0, -0.1, -5.0, -0.2, 0.3, 8.0, 7.0, 0.4, 6.0, 0.5]
    (dropped,) = DROPS["signed"]([_layer(weight)], 0.5, _memory())
    assert dropped.nonzero().squeeze(1).tolist() == [1, 3, 4, 7, 9]
    # Plain magnitude looks at all ten together: the same here, but not where the signs differ.
    weight = [-0.1, -0.2, -0.3, -0.4, 5.0, 6.0, 7.0, 8.0]
    signed, plain = (DROPS[n]([_layer(weight)], 0.5, _memory())[0] for n in ("signed", "magnitude"))
    assert signed.nonzero().squeeze(1).tolist() == [0, 1, 4, 5]
    assert plain.nonzero().squeeze(1).tolist() == [0, 1, 2, 3]


def test_equal_weights_are_dropped_one_by_one() -> None:
    """A threshold would take all that tie or none; the count is met all the same."""
    layer = _layer(torch.full((4, 5), 0.5), target=0.5)
    for rule in LAYERED:
        (dropped,) = DROPS[rule]([layer], 0.3, _memory())
        assert int(dropped.sum()) == 10 + 3, rule


def test_random_drops_by_the_generator_alone() -> None:
    draws = [
        DROPS["random"]([_layer(torch.ones(200), seed=s)], 0.5, _memory())[0] for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_none_and_unselected() -> None:
    selected = torch.tensor([True, False, True, False])
    layer = _layer([1.0, 2.0, 3.0, 4.0], [True, True, False, False], selected=selected)
    (nothing,) = DROPS["none"]([layer], 1.0, _memory())
    assert not nothing.any()
    (dropped,) = DROPS["unselected"]([layer], 0.0, _memory())
    assert dropped.tolist() == [False, True, False, False]
    assert GROWS["selected"].choose(layer, 0).tolist() == [False, False, True, False]


def test_global_threshold_doubles_and_halves_until_it_drops_the_fraction() -> None:
    """DSR on 1000 weights of 1/1000 to 1; the wanted tenth is between 90 and 110 weights."""
    first = _layer(torch.arange(1, 501) / 1000, name="small")
    second = _layer(-torch.arange(501, 1001) / 1000, name="large")
    memory, thresholds, counts = _memory(), [], []
    for _ in range(9):
        dropped = DROPS["global-magnitude"]([first, second], 0.1, memory)
        counts.append(sum(int(mask.sum()) for mask in dropped))
        thresholds.append(memory.item())
    # From 1/1000 on: nothing is below, 1 weight, 3, 7, 15, 31, 63 and 127, which is too many.
    assert counts == [0, 1, 3, 7, 15, 31, 63, 127, 63]
    assert thresholds == pytest.approx([1e-3 * 2**n for n in (1, 2, 3, 4, 5, 6, 7, 6, 7)])
    memory.fill_(0.1)
    dropped = DROPS["global-magnitude"]([first, second], 0.1, memory)
    assert [int(mask.sum()) for mask in dropped] == [99, 0]
    assert memory.item() == 0.1  # within a tenth of what is wanted


def test_global_threshold_leaves_every_layer_its_largest_weight() -> None:
    tiny = _layer([1e-5, -3e-5, 2e-5, 0.0], [True, True, True, False])
    empty = _layer([0.0, 0.0], [False, False])
    dropped = DROPS["global-magnitude"]([tiny, empty, _layer([1.0, 2.0])], 0.1, _memory())
    assert dropped[0].tolist() == [True, False, True, False]
    assert not dropped[1].any() and not dropped[2].any()


# ---- Sharing out ---------------------------------------------------------------------------------

_POSITIVE = st.floats(0, 1e6, allow_nan=False)
_SHARED = st.lists(st.tuples(_POSITIVE, st.integers(0, 500)), min_size=1, max_size=40)


@SETTINGS
@given(st.integers(0, 3000), _SHARED)
def test_share_out_meets_total_and_capacities(total: int, pairs: list[tuple[float, int]]) -> None:
    weights, capacities = [w for w, _ in pairs], [c for _, c in pairs]
    result = share_out(total, weights, capacities)
    assert sum(result) == min(total, sum(capacities))
    assert all(0 <= n <= c for n, c in zip(result, capacities, strict=True))


@SETTINGS
@given(st.integers(0, 3000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_share_out_is_proportional_where_nothing_is_full(total: int, weights: list[float]) -> None:
    result = share_out(total, weights, [total + 1] * len(weights))
    exact = [total * w / math.fsum(weights) for w in weights]
    assert all(abs(n - e) < 1 + 1e-6 for n, e in zip(result, exact, strict=True))


def test_share_out_by_hand() -> None:
    assert share_out(10, [1, 1, 2], [99, 99, 99]) == [3, 2, 5]  # 2.5, 2.5, 5: the first of equals
    assert share_out(10, [1, 1, 2], [99, 99, 2]) == [4, 4, 2]  # the full layer's three go on
    assert share_out(9, [8, 1, 0], [3, 4, 5]) == [3, 4, 2]  # no weight, but the others are full
    # One large share and many of just under one: each of those is nearer to one than to none.
    assert share_out(31, [16] + [1] * 16, [99] * 17)[0] in (15, 16)


@pytest.mark.parametrize("weights", [[0, 0, 0], [math.nan, 1, 1], [math.inf, 1, 1]])
def test_share_out_is_even_where_weights_say_nothing(weights: Sequence[float]) -> None:
    assert share_out(9, weights, [9, 9, 9]) == [3, 3, 3]


def test_shares_by_momentum_and_by_survivors() -> None:
    keep = torch.arange(100) < 10
    small = _layer(torch.zeros(100), keep, momentum=torch.full((100,), 1.0))
    # Inactive weights' momentum does not count: that of the active ones is three times the small's.
    loud = torch.where(keep, -3.0, 50.0)
    large = _layer(torch.zeros(100), keep, momentum=loud)
    assert SHARES["momentum"]([small, large], [6, 2]) == [2, 6]
    assert SHARES["layer"]([small, large], [6, 2]) == [6, 2]
    more = _layer(torch.zeros(100), torch.arange(100) < 30)
    assert SHARES["survivors"]([small, more], [8, 0]) == [2, 6]


# ---- Growing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["random", "gradient", "momentum"])
@SETTINGS
@given(layer=layers(), count=st.integers(0, 50))
def test_growth_is_among_the_inactive(rule: str, layer: MaskedLayer, count: int) -> None:
    grown = GROWS[rule].choose(layer, count)
    assert not (grown & layer.keep).any()
    assert int(grown.sum()) == min(count, layer.capacity)
    score = {"gradient": layer.gradient, "momentum": layer.momentum}.get(rule)
    if score is not None and grown.any():
        rest = ~layer.keep & ~grown
        assert not rest.any() or score.abs()[grown].min() >= score.abs()[rest].max()


def test_none_grows_nothing() -> None:
    layer = _layer(torch.zeros(5), torch.zeros(5))
    assert not GROWS["none"].choose(layer, 3).any()


def test_rules_say_what_they_read() -> None:
    assert masks.needs(swatfx.rigl(0.9)) == {"gradient"}
    assert masks.needs(swatfx.snfs(0.9)) == {"momentum"}
    assert masks.needs(replace(swatfx.rigl(0.9), grow_share="momentum")) == {"gradient", "momentum"}
    for policy in (swatfx.set_(0.9), swatfx.dsr(0.9), swatfx.static(0.9)):
        assert masks.needs(policy) == set()


def test_largest_takes_no_more_than_there_are() -> None:
    scores = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    among = torch.tensor([[True, False], [True, True]])
    assert largest(scores, among, 2).tolist() == [[False, False], [True, True]]
    assert torch.equal(largest(scores, among, 9), among)
    assert not largest(scores, among, 0).any()


# ---- The whole update ----------------------------------------------------------------------------

UPDATES = [
    swatfx.set_(0.5),
    swatfx.rigl(0.5),
    swatfx.snfs(0.5),
    swatfx.dsr(0.5),
    swatfx.gradual_magnitude(0.5),
]


@pytest.mark.parametrize("policy", UPDATES, ids=lambda p: p.name)
@SETTINGS
@given(members=st.lists(layers(), min_size=1, max_size=4), fraction=FRACTIONS)
def test_an_update_grows_as_many_as_it_drops(
    policy: swatfx.Policy, members: list[MaskedLayer], fraction: float
) -> None:
    result = masks.update(policy, members, fraction, _memory())
    gone = grown = 0
    for layer, (keep, dropped) in zip(members, result, strict=True):
        assert not (dropped & ~layer.keep).any()
        survivors = layer.keep & ~dropped
        assert torch.equal(keep & survivors, survivors)
        gone += int(dropped.sum())
        grown += int((keep & ~survivors).sum())
        if policy.grow_share == "layer":
            change = int(keep.sum()) - layer.active
            assert change == (0 if policy.grow != "none" else -int(dropped.sum()))
    assert grown == (0 if policy.grow == "none" else gone)


def test_a_dense_layer_that_shares_with_none_is_left_alone() -> None:
    """What Erdos-Renyi densities leave dense has nowhere else to grow."""
    full = _layer(torch.randn(20, generator=torch.Generator().manual_seed(0)))
    ((keep, dropped),) = masks.update(swatfx.set_(0.5), [full], 0.3, _memory())
    assert keep.all() and not dropped.any()
    other = _layer(torch.zeros(40), torch.arange(40) < 10, 0.25, momentum=torch.ones(40))
    full = replace(full, momentum=torch.ones(20))
    (_, dropped), (keep, _) = masks.update(swatfx.snfs(0.5), [full, other], 0.5, _memory())
    assert int(dropped.sum()) == 10 and int(keep.sum()) > 10  # here the others take them


def test_unknown_rules_are_named() -> None:
    for field, value in {"drop": "magnitud", "grow": "gradients", "grow_share": "layers"}.items():
        policy = replace(swatfx.rigl(0.9), **{field: value})
        with pytest.raises(UnknownNameError, match=value):
            swatfx.compile(torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(2)]), policy)


@pytest.mark.parametrize("size", [1, 7, 1000, 70000])
def test_of_equal_scores_the_lowest_index_is_taken_and_nan_is_largest(size: int) -> None:
    torch.manual_seed(size)
    scores = torch.randint(0, 4, (size,)).float()
    scores[torch.rand(size) < 0.2] = torch.inf
    for nan in (False, True):
        if nan:
            scores[torch.rand(size) < 0.3] = torch.nan
        among = torch.rand(size) < 0.7
        where = among.nonzero().squeeze(1).tolist()
        values = scores.tolist()
        order = sorted(where, key=lambda i: (math.inf if math.isnan(values[i]) else values[i], -i))[
            ::-1
        ]
        order = sorted(order, key=lambda i: not math.isnan(values[i]))  # stable
        for count in {0, 1, size // 10, size // 2, size + 3}:
            expected = torch.zeros(size, dtype=torch.bool)
            expected[torch.tensor(order[:count], dtype=torch.int64)] = True
            assert torch.equal(largest(scores, among, count), expected), count
