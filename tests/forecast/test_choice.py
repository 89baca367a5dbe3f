"""Forecasts: the cheapest choice, fitted constants, and the file that holds them."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from swatfx import forecast
from swatfx.errors import CheckpointError, InputError, SwatWarning
from swatfx.forecast import Call, Constants, Joint, Machine, Sample, Work, stored
from swatfx.forecast.constants import DTYPES, SIDES, key, sides_of
from swatfx.forecast.fitting import nonnegative
from swatfx.forecast.stored import shipped
from swatfx.forecast.work import (
    CONVERSION,
    DENSE,
    KINDS,
    LAYERS,
    LINEAR,
    NORM,
    PLAIN,
    POINTWISE,
    SPARSE,
)

HERE = Machine("a processor", "avx512", 1)


def plain_sum(calls: list[Call], joints: list[Joint], sparse: set[int]) -> float:
    """What a choice costs, written anew."""
    cost = 0.0
    for i, call in enumerate(calls):
        cost += call.sparse if i in sparse else call.dense
    for joint in joints:
        if any(i in sparse for i in joint.calls):
            cost += joint.sparse + joint.outside
            for i, crossing in zip(joint.calls, joint.crossing, strict=True):
                cost += 0 if i in sparse else crossing
        else:
            cost += joint.dense
    return cost


def drawn(generator: random.Random) -> tuple[list[Call], list[Joint]]:
    count = generator.randint(1, 7)
    calls = [
        Call(generator.choice([math.inf, *[generator.random() * 4] * 5]), generator.random() * 4)
        for _ in range(count)
    ]
    joints = []
    for _ in range(generator.randint(0, 7)):
        around = tuple(generator.choices(range(count), k=generator.randint(1, 4)))
        crossing = tuple(generator.random() for _ in around)
        joints.append(Joint(around, crossing, *(generator.random() for _ in range(3))))
    return calls, joints


def test_the_choice_is_the_cheapest_of_all() -> None:
    """Exactly where theory says so, elsewhere nearly always."""
    generator = random.Random(0)
    missed = 0
    for _ in range(200):
        calls, joints = drawn(generator)
        sets = [
            set(chosen)
            for count in range(len(calls) + 1)
            for chosen in itertools.combinations(range(len(calls)), count)
        ]
        chosen = forecast.cheapest(calls, joints)
        found = plain_sum(calls, joints, chosen)
        assert forecast.total(calls, joints, chosen) == pytest.approx(found)
        least = min(plain_sum(calls, joints, each) for each in sets)
        if all(j.dense <= j.sparse + j.outside + sum(j.crossing) for j in joints):
            assert found == pytest.approx(least)
        missed += found > least * (1 + 1e-9)
        assert found <= 1.1 * least
    assert missed <= 4


def test_where_nothing_wins_all_stay_dense() -> None:
    calls = [Call(2.0, 1.0), Call(0.9, 1.0), Call(math.inf, 1.0)]
    joints = [Joint((0, 1), (0.2, 0.2)), Joint((1, 2), (0.2, 0.2))]
    assert forecast.cheapest(calls, joints) == set()
    assert forecast.cheapest(calls, []) == {1}
    assert forecast.cheapest([], []) == set()


def test_work_of_layers() -> None:
    """By hand: 2 images, 3x3 of 4 -> 8 channels at 5x6."""
    work = Work.of_layer("fp32", (8, 4, 3, 3), (2, 4, 5, 6), (2, 8, 5, 6), stride=(1, 1))
    assert (work.kind, work.macs, work.inputs) == ("spatial", 288 * 60, 240)
    assert work.vector_macs == 288 * 5 * 16  # a row of 2 x 6 fills one vector of 16
    assert (work.outputs, work.weights) == (480, 288)
    full = Work.of_layer("bf16", (8, 4, 3, 3), (33, 4, 5, 6), (33, 8, 5, 6), stride=(1, 1))
    assert full.vector_macs == 288 * 5 * (32 * 6 + 32)
    kinds = {
        "pointwise": ((8, 4, 1, 1), (1,), 1),
        "strided": ((8, 4, 1, 1), (2,), 1),
        "depthwise": ((8, 1, 3, 3), (2,), 8),
        "linear": ((8, 4), (), 1),
    }
    for kind, (weight, stride, groups) in kinds.items():
        shapes = ((3, 4, 7, 7), (3, 8, 7, 7)) if len(weight) > 2 else ((3, 4), (3, 8))
        made = Work.of_layer("fp32", weight, *shapes, stride=stride, groups=groups)
        assert made.kind == kind
    line = Work.of_layer("fp32", (8, 4, 3), (2, 4, 40), (2, 8, 40), stride=(1,))
    assert line.vector_macs == 96 * 80
    unbatched = Work.of_layer("fp32", (8, 4, 3, 3), (4, 5, 6), (8, 5, 6), stride=(1, 1))
    assert unbatched.macs == 288 * 30
    assert Work.of_layer("fp32", (8, 4), (0, 4), (0, 8)).macs == 0


def test_sampled_gradients_are_other_quantities() -> None:
    packed = Work(POINTWISE, "fp32", 10, 16, 5, 6, 7, 0.5, 0.2)
    assert packed.quantities(SPARSE) == (1.0, 8.0, 2.0, 0.0, 5, 1.0, 6, 7)
    sampled = Work(POINTWISE, "fp32", 10, 16, 5, 6, 7, 0.5)
    assert sampled.quantities(SPARSE) == (1.0, 8.0, 0.0, 8.0, 5, 0.0, 6, 7)
    assert packed.quantities(DENSE) == packed.quantities(PLAIN) == (1.0, 10, 5, 6, 7)
    assert Work.of_tensor(NORM, "fp32", 9).quantities(SPARSE) == (1.0, 9)


def constants(machine: Machine = HERE, rate: float = 1e-9) -> Constants:
    table = {
        key(dtype, kind, side): (rate,) * len(Work(kind, dtype).quantities(side))
        for dtype in DTYPES
        for kind in KINDS
        for side in sides_of(kind)
    }
    return Constants(
        table, machine.threads, machine.kernels, machine.processor, "2026-01-01", 0.1, 0.5
    )


def test_a_fit_finds_the_rates_that_times_are_made_of() -> None:
    rates = (1e-5, 2e-10, 0.0, 3e-9, 1e-8)
    generator = random.Random(1)
    samples = []
    for _ in range(20):
        sizes = [generator.randint(1, 10**6) for _ in range(5)]
        work = Work(LINEAR, "fp32", sizes[0], sizes[1], sizes[2], sizes[3], sizes[4])
        took = sum(r * q for r, q in zip(rates, work.quantities(DENSE), strict=True))
        samples.append(Sample(work, DENSE, took))
    table, missed = forecast.fit(samples)
    assert table["fp32 linear dense"] == pytest.approx(rates, rel=1e-6, abs=1e-20)
    assert len(missed) == len(samples)
    assert max(missed) < 1e-6
    assert max(forecast.errors(Constants(table), samples)) < 1e-9


def test_least_squares_without_negative_rates() -> None:
    """Against every set of columns that may be used at all."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        rows, wanted = generator.normal(size=(9, 4)), generator.normal(size=9)
        found = nonnegative(rows, wanted)
        assert (found >= 0).all()
        best = float(np.linalg.norm(wanted))
        for count in range(1, 5):
            for columns in itertools.combinations(range(4), count):
                x = np.linalg.lstsq(rows[:, columns], wanted, rcond=None)[0]
                if (x >= 0).all():
                    best = min(best, float(np.linalg.norm(rows[:, columns] @ x - wanted)))
        assert np.linalg.norm(rows @ found - wanted) == pytest.approx(best)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "swatfx" / "kernel_times.json"


def test_what_is_written_is_read(cache: Path) -> None:
    assert forecast.path() == cache
    assert forecast.read(HERE) == shipped("avx512")  # there is no file yet
    assert forecast.write(constants()) == cache
    assert forecast.read(HERE)[0] == constants()
    other = HERE._replace(threads=8)
    forecast.write(constants(other, 2e-9))
    forecast.write(constants(HERE, 3e-9))  # in place of the first
    assert forecast.read(HERE)[0] == constants(HERE, 3e-9)
    assert forecast.read(other)[0] == constants(other, 2e-9)
    assert forecast.read(HERE._replace(threads=7))[0].threads == 8  # the nearest
    assert "measured here" in forecast.read(HERE)[1]
    foreign = forecast.read(HERE._replace(processor="another"))
    assert foreign == shipped("avx512")
    assert "swatfx bench --fit" in foreign[1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 2, "machines": []}',
        '{"format": 1, "machines": [{}]}',
        "[" * 10**5,
        "\0",
    ],
)
def test_a_damaged_file_is_passed_over_with_one_warning(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.warns(SwatWarning, match="swatfx bench --fit") as told:
        assert forecast.read(HERE) == shipped("avx512")
        assert forecast.read(HERE) == shipped("avx512")
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SwatWarning)
        forecast.write(constants())  # whose file is whole again
    assert forecast.read(HERE)[0] == constants()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", True),
        ("processor", 3),
        ("table", []),
        ("table", {}),
        ("odd", 1),
    ],
)
def test_other_fields_are_refused(name: str, value: object) -> None:
    assert Constants.from_json(json.loads(json.dumps(constants().to_json()))) == constants()
    with pytest.raises(ValueError):
        Constants.from_json({**constants().to_json(), name: value})


@pytest.mark.parametrize(
    "rates", [[], [1.0], [0, 0], [-1, 1], [math.nan, 1], ["1", 1], [True, 1], [10**400, 1]]
)
def test_rates_are_numbers_of_seconds(rates: list[object]) -> None:
    data = constants().to_json()
    data["table"][f"fp32 {CONVERSION} sparse"] = rates
    with pytest.raises(ValueError):
        Constants.from_json(data)


def test_a_folder_that_cannot_be_written_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file in the folder's place")
    with pytest.raises((InputError, CheckpointError), match="folder|write"):
        forecast.write(constants())
    assert forecast.read(HERE) == shipped("avx512")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is to be ignored
    assert forecast.path().is_absolute()


def test_defaults_hold_every_kind() -> None:
    found, where = shipped("avx512")
    assert Constants.from_json(found.to_json()) == found
    assert where.startswith("defaults")
    assert shipped("unheard of")[0].processor


def test_defaults_are_those_of_the_processor() -> None:
    known = json.loads(Path(forecast.__file__).with_name("defaults.json").read_text())
    names = {one["processor"] for one in known["machines"] if one["kernels"] == "avx512bf16"}
    assert len(names) > 1
    for name in names:
        assert shipped("avx512bf16", name)[0].processor == name
    assert shipped("avx512bf16", "another")[0].processor in names


def test_matrix_units_are_expected_to_be_faster(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = HERE._replace(kernels="avx512bf16")
    plain, _ = forecast.read(here)
    monkeypatch.setattr(stored, "has_matrix_unit", lambda: True)
    shipped.cache_clear()
    try:
        faster, told = forecast.read(here)
    finally:
        shipped.cache_clear()
    assert f"{stored.MATRIX_UNIT} times" in told and "swatfx bench --fit" in told
    for dtype, kind in itertools.product(("fp32", "bf16"), LAYERS):
        work = Work(kind, dtype, macs=10**9, vector_macs=10**9, activation_density=0.1)
        ratios = [plain.seconds(work, side) / faster.seconds(work, side) for side in SIDES]
        gains = dtype == "bf16" and kind != "depthwise"
        assert ratios[0] == 1 and all((ratio > 1) == gains for ratio in ratios[1:])
    forecast.write(constants(here))  # what was measured holds as it is
    assert forecast.read(here)[0] == constants(here)
