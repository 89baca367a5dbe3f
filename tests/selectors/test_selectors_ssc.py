"""The selector of structured sparse convolutions: names, densities, states, a compiled model."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import swatfx
from swatfx import selectors
from swatfx.compiled.layers import sparse_layers
from swatfx.density import DENSE, Density
from swatfx.errors import PolicyError
from swatfx.policy import Policy
from swatfx.selectors import Axes, Held
from swatfx.selectors.ssc import SscSelector
from swatfx.selectors.ssc_pattern import ssc_density, ssc_mask
from tests.nets.small_nets import Residual

WEIGHT = Axes(0, 1)
Shape = tuple[int, ...]


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("ssc:g4:p8", (16, 16, 3, 3), (4, 8)),
        ("ssc:g4:p8", (16, 16, 1, 1), (1, 8)),
        ("ssc:p8:q2:g4", (16, 16), (1, 2)),
        ("ssc:g16=2/32=4:p16=1/32=8", (32, 16, 3), (4, 8)),
        ("ssc:g16=2/32=4:p16=1/32=8", (16, 32, 1, 1), (1, 1)),
        ("ssc:g16=2/32=4:p16=1/32=8", (10, 32), None),  # not listed: dense
        ("ssc:g16=2/32=4:p16=1/32=8:q10=5", (10, 32), (1, 5)),
        ("ssc:g16=2/32=4:p16=1/32=8:q10=5", (16, 32, 1, 1), None),
        ("ssc:g4:p16=8", (16, 16, 3, 3), (4, 8)),
        ("ssc:g4:p16=8", (32, 16, 3, 3), None),
        ("ssc:g4:p8", (0, 16), None),
    ],
)
def test_periods_of_a_layer(name: str, shape: Shape, found: tuple[int, int] | None) -> None:
    selector = SscSelector.parse(name)
    assert selector.name == name and selector.weights_only and selector.fixed_density
    assert selector.periods(shape) == found
    expected = DENSE if found is None else ssc_density(shape, *found)
    assert selector.own_density(shape) == expected
    selector.check(Density.from_sparsity(0.9), "layer")  # any will do: it has its own


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ssc:g4", "g and p are needed"),
        ("ssc:", "no field"),
        ("g4:p8", "g and p are needed"),
        ("ssc:g4:p0", "'p0' is no field"),
        ("ssc:g4:p8:", "no field"),
        ("ssc:g4:p8:y", "'y' is no field"),
        ("ssc:g4:p8:g2", "g is given twice"),
        ("ssc:g4:p8:x:plus", "taps is given twice"),
        ("ssc:g16=2/32=4:p16=2/64=4", "different numbers of filters"),
        ("ssc:g16=2/16=4:p16=2", "twice"),
        ("ssc:g16=2/:p16=2", "no field"),
    ],
)
def test_names_that_do_not_read(name: str, problem: str) -> None:
    with pytest.raises(PolicyError, match=problem) as caught:
        SscSelector.parse(name)
    assert repr(name) in str(caught.value) and "ssc:g4:p8" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ssc:g3:p2", {}),
        ("ssc:g3:p2:x", {"taps": "x"}),
        ("ssc:g3:p2:shift0:union:plus", {"shift": 0}),
        ("ssc:g1:p1", {}),
        ("ssc:g100:p100:shift2", {"shift": 2}),
    ],
)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (6, 5), (6, 1, 3, 3), (4, 3, 5), (7, 7, 1, 1)])
def test_state_is_the_pattern_whatever_the_weights_are(
    name: str, options: dict[str, object], shape: Shape
) -> None:
    selector = SscSelector.parse(name)
    found = selector.periods(shape)
    assert found is not None
    expected = ssc_mask(shape, *found, **options)
    for weight in (torch.randn(shape), torch.zeros(shape), torch.full(shape, torch.nan)):
        for density in (DENSE, Density.from_sparsity(0.9)):
            state = selector.state(weight, density, WEIGHT, seed=3)
            assert state.shape == selector.state_shape(shape, WEIGHT)
            assert state.dtype == selector.state_dtype(torch.float32) == torch.uint8
            assert torch.equal(selector.keep(torch.randn(shape), state, WEIGHT), expected)
    assert selector.own_density(shape) == ssc_density(
        shape, *found, **options, overlap="union" if "union" in name else "sum"
    )


def test_a_layer_that_stays_dense_keeps_everything() -> None:
    selector = SscSelector.parse("ssc:g16=2:p16=2")
    weight = torch.randn(8, 4, 3, 3)
    assert selector.keep(weight, selector.state(weight, DENSE, WEIGHT, 0), WEIGHT).all()


@pytest.mark.parametrize("held", [False, True])
def test_a_compiled_model_has_the_patterns(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ssc:g2:p4:union"
    monkeypatch.setitem(selectors.SELECTORS, name, SscSelector.parse(name))
    policy = Policy("ssc", weight_selector=name, hold_from_epoch=0 if held else None)
    gm = swatfx.compile(Residual(), policy, example_inputs=(torch.randn(2, 3, 8, 8),))
    for step in range(2):
        layers = list(sparse_layers(gm))
        assert len(layers) == 8
        for layer in layers:
            shape = layer.plan.weight_shape
            expected = ssc_mask(shape, 2, 4)
            assert torch.equal(layer.keep(), expected), (step, layer.plan.name)
            assert layer.plan.weight_density.exact == Fraction(
                int(expected.sum()), expected.numel()
            )
            assert isinstance(selectors.get(layer.plan.weight_selector), Held) == held
        gm(torch.randn(2, 3, 8, 8)).sum().backward()
        with torch.no_grad():
            for parameter in gm.parameters():
                parameter += torch.randn_like(parameter)
