"""Density: how many elements are kept, exactly where the user wrote digits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swatfx.density import DENSE, Density, check_sparsity
from swatfx.errors import PolicyError

SETTINGS = settings(deadline=None, max_examples=200)
thousandths = st.integers(0, 999).map(lambda i: i / 1000)


@pytest.mark.parametrize(
    ("sparsity", "elements", "kept"),
    [
        (0.95, 1000, 50),  # 1 - .95 is .05000000000000004 in floats, which would round up to 51
        (0.9, 10, 1),
        (0.8, 25, 5),
        (0.7, 10, 3),
        (0.9, 9, 1),
        (0.95, 10, 1),
        (0.5, 3, 2),
        (0.999, 10, 1),
        (0.0, 7, 7),
        (0, 7, 7),
        (0.3, 0, 0),
        (0.98, 2_359_296, 47_186),
    ],
)
def test_counts_what_the_digits_say(sparsity: float, elements: int, kept: int) -> None:
    assert Density.from_sparsity(sparsity).count(elements) == kept


@SETTINGS
@given(st.integers(0, 999), st.integers(0, 10**9))
def test_exact_count_is_integer_arithmetic(dropped: int, elements: int) -> None:
    expected = elements - dropped * elements // 1000
    assert Density.from_sparsity(dropped / 1000).count(elements) == expected


@SETTINGS
@given(st.floats(1e-9, 1.0), st.integers(1, 10**7))
def test_computed_count_is_within_one_of_the_product(density: float, elements: int) -> None:
    kept = Density(density).count(elements)
    assert 1 <= kept <= elements
    assert density * elements - 2e-6 <= kept < density * elements + 1


@pytest.mark.parametrize("elements", [10, 35, 1000, 12_345])
def test_computed_density_forgives_rounding(elements: int) -> None:
    third = 0.1 + 0.2  # .30000000000000004
    assert Density(third).count(elements) == math.ceil(Fraction(3, 10) * elements)


@pytest.mark.parametrize("elements", [1, 3, 100])
def test_something_is_always_kept(elements: int) -> None:
    assert Density(1e-12).count(elements) == 1


@SETTINGS
@given(thousandths, st.integers(0, 10**6), st.integers(0, 10**6))
def test_count_grows_with_elements(sparsity: float, a: int, b: int) -> None:
    density = Density.from_sparsity(sparsity)
    assert density.count(min(a, b)) <= density.count(max(a, b))


@SETTINGS
@given(st.one_of(thousandths.map(Density.from_sparsity), st.floats(1e-6, 1.0).map(Density)))
def test_json_round_trip(density: Density) -> None:
    assert Density.from_json(density.to_json()) == density


def test_is_dense() -> None:
    assert DENSE.is_dense and Density.from_sparsity(0).is_dense
    assert not Density.from_sparsity(0.001).is_dense


def test_denominators_beyond_int64_fall_back_to_the_float() -> None:
    density = Density.from_sparsity(1e-30)
    assert density.exact is None and density.count(5) == 5


@pytest.mark.parametrize("bad", [1, 1.0, -0.1, 2, math.nan, math.inf, "0.9", None, True])
def test_sparsity_out_of_range_names_value_and_remedy(bad: object) -> None:
    with pytest.raises(PolicyError, match="0.9 keeps a tenth") as caught:
        check_sparsity(bad)  # type: ignore[arg-type]
    assert "weight sparsity" not in str(caught.value)
    with pytest.raises(PolicyError, match="activation_sparsity"):
        check_sparsity(bad, "activation_sparsity")  # type: ignore[arg-type]
