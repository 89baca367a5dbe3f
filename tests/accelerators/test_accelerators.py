"""Accelerators: the calls, results, bad input, names, the cache, life without numba."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch

from swatfx import accelerators
from swatfx.accelerators import (
    ACCELERATORS,
    SCNN,
    Accelerator,
    BitTactical,
    Count,
    DenseTile,
    Ideal,
    Problem,
    Systolic,
    cache,
    ceil_div,
    count_multiplications,
    get,
    parse,
    register,
    total,
)
from swatfx.errors import InputError, UnknownNameError
from tests.nets.numpy_masks import magnitude_mask, ones, zeros

# -- groups, dilation, linear layers ---------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ACCELERATORS))
def test_groups_run_one_after_the_other(name: str) -> None:
    rng = np.random.default_rng(1)
    design = get(name)
    weights, activations = rng.random((6, 2, 3, 3)) < 0.4, rng.random((4, 9, 7)) < 0.5
    geometry = dict(input_hw=(9, 7), stride=2, padding=1)
    got = design.conv_cycles(weights, activations, groups=2, **geometry)
    halves = [
        design.conv_cycles(weights[:3], activations[:2], **geometry),
        design.conv_cycles(weights[3:], activations[2:], **geometry),
    ]
    assert got == total(halves)
    back = design.backward_input(weights, groups=2, **geometry)
    halves = [design.backward_input(w, **geometry) for w in (weights[:3], weights[3:])]
    assert back == total(halves)
    update = design.backward_weight(activations, filters=6, kernel=3, groups=2, **geometry)
    halves = [
        design.backward_weight(a, filters=3, kernel=3, **geometry)
        for a in (activations[:2], activations[2:])
    ]
    assert update == total(halves)


@pytest.mark.parametrize("name", sorted(ACCELERATORS))
def test_dilation_runs_everywhere(name: str) -> None:
    design = get(name)
    mask = ones(4, 20, 3, 3)
    got = design.conv_cycles(mask, input_hw=(9, 9), padding=2, dilation=2)
    assert got.cycles > 0
    if name != "scnn":  # whose halo grows with the kernel's reach
        same = design.conv_cycles(mask, input_hw=(9, 9), padding=1)
        assert got.dense_cycles == same.dense_cycles
    assert design.backward_input(mask, input_hw=(9, 9), padding=2, dilation=2).cycles > 0
    update = dict(filters=4, kernel=3, input_hw=(9, 9), padding=2, dilation=2)
    assert design.backward_weight(ones(20, 9, 9), **update).cycles > 0


def test_dilation_is_a_kernel_with_zeros_between_for_scnn_and_ideal() -> None:
    rng = np.random.default_rng(5)
    weights, activations = rng.random((6, 3, 2, 3)) < 0.6, rng.random((3, 10, 9)) < 0.5
    spread = zeros(6, 3, 4, 7)
    spread[:, :, ::3, ::3] = weights
    geometry = dict(input_hw=(10, 9), stride=2, padding=(0, 1, 2, 1))
    for design in (SCNN(), Ideal()):
        got = design.conv_cycles(weights, activations, dilation=3, **geometry)
        assert got.cycles == design.conv_cycles(spread, activations, **geometry).cycles


def test_linear_layers_are_one_by_one() -> None:
    mask = magnitude_mask(0, 90, (100, 300))
    for name in ACCELERATORS:
        got = get(name).conv_cycles(mask, ones(300), input_hw=(1, 1))
        same = get(name).conv_cycles(mask[:, :, None, None], ones(300, 1, 1), input_hw=(1, 1))
        assert got == same
        assert get(name).backward_input(mask, input_hw=1).cycles > 0


def test_tensors_will_do() -> None:
    weights = torch.rand(5, 4, 3, 3) > 0.5
    got = SCNN().conv_cycles(weights, torch.ones(4, 6, 6, dtype=torch.bool), input_hw=(6, 6))
    assert got == SCNN().conv_cycles(weights.numpy(), input_hw=(6, 6))
    transposed = np.asarray(weights).transpose(1, 0, 2, 3)
    assert SCNN().conv_cycles(transposed, input_hw=(6, 6)) == SCNN().conv_cycles(
        np.ascontiguousarray(transposed), input_hw=(6, 6)
    )


# -- results ---------------------------------------------------------------------------------------


def test_cycles() -> None:
    got = SCNN().conv_cycles(ones(4, 2, 3, 3), input_hw=(8, 8), padding=1)
    assert got.utilisation == got.multiplications / (got.cycles * 1024)
    assert got.speedup == got.dense_cycles / got.cycles and got.own_speedup == 1
    both = got + got
    assert both.cycles == 2 * got.cycles and both.utilisation == got.utilisation
    assert both.limits["halo"] == 2 * got.limits["halo"] and both.note == got.note
    with pytest.raises(FrozenInstanceError):
        got.cycles = 1  # type: ignore[misc]
    with pytest.raises(InputError, match="different designs"):
        got + DenseTile().conv_cycles(ones(1, 1, 1, 1), input_hw=(1, 1))
    # 16 channels of zeros are one row, which is skipped: nothing runs
    none = BitTactical().conv_cycles(zeros(1, 16, 1, 1), input_hw=(1, 1))
    assert none.cycles == 0 and none.utilisation == 0 and none.speedup == float("inf")


@pytest.mark.parametrize("name", sorted(ACCELERATORS))
def test_own_dense_is_the_run_on_all_ones(name: str) -> None:
    design = get(name)
    geometry = dict(input_hw=(9, 10), stride=2, padding=(1, 2, 0, 1))
    for shape in ((20, 19, 3, 3), (40, 3, 3, 3)):
        got = design.conv_cycles(ones(*shape), ones(shape[1], 9, 10), **geometry)
        assert got.cycles == got.own_dense_cycles
        got = design.backward_input(ones(*shape), **geometry)
        assert got.cycles == got.own_dense_cycles
        update = dict(filters=shape[0], kernel=3, **geometry)
        got = design.backward_weight(ones(shape[1], 9, 10), **update)
        assert got.cycles == got.own_dense_cycles


# -- bad input -------------------------------------------------------------------------------------

CONV = dict(input_hw=(8, 8))
BAD = [
    (lambda a: a.conv_cycles(np.ones((4, 4, 3, 3)), **CONV), "not boolean"),
    (lambda a: a.conv_cycles(ones(4, 4, 3), **CONV), r"not \[filters"),
    (lambda a: a.conv_cycles(ones(0, 4, 3, 3), **CONV), "no elements"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), ones(5, 8, 8), **CONV), "does not fit"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), ones(4, 8, 8).astype(int), **CONV), "boolean"),
    (lambda a: a.conv_cycles(ones(4, 4, 9, 3), **CONV), "larger than its padded input"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), input_hw=(0, 8)), "too small"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), input_hw=(8, 8, 8)), "not a pair"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), stride=0, **CONV), "stride is too small"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), stride=(1, 2), **CONV), "differs by axis"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), stride=1.5, **CONV), "not an integer"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), padding=-1, **CONV), "padding is too small"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), padding=(1, 1), **CONV), "neither an int nor"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), groups=3, **CONV), "3 groups do not divide"),
    (lambda a: a.conv_cycles(ones(4, 4, 3, 3), dilation=0, **CONV), "dilation is too small"),
    (lambda a: a.backward_input(ones(4, 4, 3, 3), ones(4, 8, 8), **CONV), "does not fit"),
    (lambda a: a.backward_weight(filters=4, kernel=3, **CONV), "neither an activation"),
    (lambda a: a.backward_weight(ones(4, 7, 8), filters=4, kernel=3, **CONV), "does not fit"),
    (lambda a: a.backward_weight(ones(4, 8, 8), filters=0, kernel=3, **CONV), "too small"),
]


@pytest.mark.parametrize("call, message", BAD)
@pytest.mark.parametrize("name", ["dense-tile", "scnn"])
def test_bad_input(name, call, message) -> None:
    with pytest.raises(InputError, match=message):
        call(get(name))


def test_bad_parameters() -> None:
    with pytest.raises(InputError, match="accumulators an element"):
        SCNN(accumulators=1).conv_cycles(ones(4, 1, 3, 3), input_hw=(16, 16))
    for build in (
        lambda: DenseTile(columns=0),
        lambda: BitTactical(lookahead=0),
        lambda: BitTactical(lookaside=16),
        lambda: BitTactical(shape="X"),
        lambda: Systolic(0, 4),
        lambda: Systolic(4, 4, "input"),
        lambda: Ideal(0),
        lambda: SCNN(accumulators=0),
    ):
        with pytest.raises(InputError):
            build()
    with pytest.raises(FrozenInstanceError):
        SCNN().conflicts = False  # type: ignore[misc]


# -- names -----------------------------------------------------------------------------------------


def test_names() -> None:
    assert get("scnn") == SCNN() and parse("SCNN") == SCNN()
    assert parse("bit-tactical:lookahead=4,shape=L") == BitTactical(lookahead=4, shape="L")
    assert parse("scnn:conflicts=false") == SCNN(conflicts=False)
    assert parse("systolic:rows=8, cols=16, dataflow=ws") == Systolic(8, 16, "weight-stationary")
    assert parse("ideal:multipliers=4096").multipliers == 4096
    with pytest.raises(UnknownNameError, match="did you mean bit-tactical"):
        parse("bit-tactics")
    with pytest.raises(InputError, match="does not take banks.*conflicts, accumulators"):
        parse("scnn:banks=16")
    with pytest.raises(InputError, match="key=value"):
        parse("scnn:conflicts")
    for name in ACCELERATORS:
        assert isinstance(get(name), Accelerator)


def test_a_design_of_ones_own() -> None:
    @dataclass(frozen=True)
    class RowSkipper(Accelerator):
        """One filter row at a time on `lanes` multipliers; rows of zeros are skipped."""

        lanes: int = 8

        @property
        def multipliers(self) -> int:
            return self.lanes

        def run(self, problem: Problem, weights: np.ndarray, activations: np.ndarray) -> Count:
            rows = int(weights.any(axis=1).sum())
            cycles = problem.windows * rows * ceil_div(problem.C, self.lanes)
            return Count(cycles, {"lost": 1})

    register("row-skipper", RowSkipper)
    try:
        design = parse("row-skipper:lanes=4")
        mask = ones(2, 6, 3, 3)
        mask[:, :, 0] = False
        got = design.conv_cycles(mask, input_hw=(5, 5))
        assert (got.cycles, got.own_dense_cycles) == (9 * 2 * 6 * 2, 9 * 2 * 9 * 2)
        assert got.multiplications == 9 * 2 * 6 * 6 and got.utilisation == 0.75
        assert design.backward_input(mask, input_hw=(5, 5)).cycles == 25 * 6 * 6 * 1
        assert "cannot skip" in design.backward_weight(ones(6, 5, 5), filters=2, kernel=3,
                                                       input_hw=(5, 5)).note  # fmt: skip
        register("row-skipper", RowSkipper)  # the same again is no clash
        with pytest.raises(InputError, match="is registered"):
            register("row-skipper", SCNN)
    finally:
        del ACCELERATORS["row-skipper"]
    with pytest.raises(InputError, match="a name may not"):
        register("a:b", SCNN)


# -- cache, fallback -------------------------------------------------------------------------------


def test_cache() -> None:
    accelerators.cache_clear()
    calls = []

    @dataclass(frozen=True)
    class Counting(Accelerator):
        multipliers: int = 1

        def run(self, problem: Problem, weights: np.ndarray, activations: np.ndarray) -> Count:
            calls.append(problem)
            return Count(int(weights.sum()))

    mask = magnitude_mask(0, 50, (4, 4, 3, 3))
    first = Counting().conv_cycles(mask, input_hw=(5, 5))
    assert len(calls) == 2  # the run and its own dense run
    assert Counting().conv_cycles(mask.copy(), input_hw=(5, 5)) is first and len(calls) == 2
    other = mask.copy()
    other[0, 0, 0, 0] ^= True
    assert Counting().conv_cycles(other, input_hw=(5, 5)).cycles != first.cycles
    assert len(calls) == 3
    Counting().conv_cycles(mask, input_hw=(6, 5))
    Counting(multipliers=2).conv_cycles(mask, input_hw=(5, 5))
    assert len(calls) == 7
    accelerators.cache_clear()
    assert cache.cache_size() == 0
    Counting().conv_cycles(mask, input_hw=(5, 5))
    assert len(calls) == 9


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators.cache_clear()
    monkeypatch.setattr(cache, "SIZE", 3)
    for size in range(1, 9):
        DenseTile().conv_cycles(ones(1, 1, 1, 1), input_hw=(size, size))
    assert cache.cache_size() == 3


def test_without_numba_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import numpy as np
from swatfx.accelerators import ACCELERATORS, get
rng = np.random.RandomState(0)
w, a = rng.rand(18, 3, 3, 2) < 0.4, rng.rand(3, 7, 4) < 0.5
g = dict(input_hw=(7, 4), stride=2, padding=1)
for name in sorted(ACCELERATORS):
    d = get(name)
    print(name, d.conv_cycles(w, a, **g), d.backward_input(w, **g),
          d.backward_weight(a, filters=5, kernel=(3, 2), **g))
"""
    start = "import logging, sys\nlogging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
    without = subprocess.run(
        [sys.executable, "-W", "error", "-c", start + "sys.modules['numba'] = None" + code],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exec(code, {})
    said, _, rest = without.partition("\n")
    assert "numba is not installed" in said
    assert rest == capsys.readouterr().out


def test_count_multiplications_is_public() -> None:
    assert count_multiplications(Problem(2, 3, 1, 1, 4, 5), None, None) == 2 * 3 * 20
