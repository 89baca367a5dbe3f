"""Arguments of report, compare and simulate that cannot be: one of our errors, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import swatfx
from swatfx.accelerators.options import SimulationOptions
from swatfx.cli.commands import main
from swatfx.comparing import table as comparing
from swatfx.compiled.module import SwatModule
from swatfx.costs.simulation import simulate
from swatfx.errors import SwatError

X = torch.empty(2, 1, 8, 8, device="meta")
RUN = {"data": "digits", "epochs": 1, "limit": 32, "quiet": True}
ODD: list[Any] = [
    *(None, "", " ", "x", "\0", b"a", math.nan, math.inf, -math.inf, -1, -0.5, 0, 1, 2, 1.5),
    *(10**30, True, [], {}, object(), torch.tensor(3.0)),
]


@pytest.fixture(scope="module")
def gm() -> SwatModule:
    return swatfx.compile(swatfx.models.create("digits/cnn"), "swat-u:0.8")


def _compare(**options: Any) -> Any:
    given: dict[str, Any] = {"model": "digits/cnn", "policies": ["swat-u:0.8"], "example_inputs": X}
    return comparing.compare(**{**given, **options})


def _number(low: float, high: float) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and low <= value < high

    return fits


def _whole(low: int, high: int = 2**31) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value < high


def _option(name: str) -> Callable[[SwatModule, Any], Any]:
    return lambda gm, v: simulate(gm, X, ["ideal"], options=SimulationOptions(**{name: v}))


def _nothing(value: Any) -> bool:
    return value is None


def _never(value: Any) -> bool:
    return False


# What takes the value, and which of ODD it may take.
CALLS: dict[str, tuple[Callable[[SwatModule, Any], Any], Callable[[Any], bool]]] = {
    "report of": (lambda gm, v: swatfx.report(v, X), _never),
    "inputs": (lambda gm, v: swatfx.report(gm, v), _never),
    "an input": (lambda gm, v: swatfx.report(gm, (v,)), _never),
    "accounting": (lambda gm, v: swatfx.report(gm, X, accounting=v), _never),
    "activation_floor": (
        lambda gm, v: swatfx.report(gm, X, activation_floor=v),
        _number(0, 1),
    ),
    "topk_cost": (lambda gm, v: swatfx.report(gm, X, topk_cost=v), _nothing),
    "device": (lambda gm, v: swatfx.report(gm, X, device=v), _nothing),
    "accelerators": (
        lambda gm, v: swatfx.report(gm, X, accelerators=v),
        lambda v: isinstance(v, list),
    ),
    "simulation_options": (
        lambda gm, v: swatfx.report(gm, X, accelerators=["ideal"], simulation_options=v),
        _nothing,
    ),
    "an accelerator": (lambda gm, v: simulate(gm, X, [v]), _never),
    "simulated inputs": (lambda gm, v: simulate(gm, v, ["ideal"]), _never),
    "samples": (_option("samples"), _whole(1)),
    "natural_density": (_option("natural_density"), _number(0, 1.001)),
    "seed": (_option("seed"), _whole(0)),
    "draw_weights": (_option("draw_weights"), lambda v: isinstance(v, bool)),
    "bandwidth": (_option("bandwidth"), _number(0, math.inf)),
    "word_bytes": (_option("word_bytes"), _whole(1, 1024)),
    "model": (lambda gm, v: _compare(model=v), _never),
    "policies": (lambda gm, v: _compare(policies=v), _never),
    "a policy": (lambda gm, v: _compare(policies=[v]), _never),
    "compared inputs": (lambda gm, v: _compare(example_inputs=v), _never),
    "num_classes": (lambda gm, v: _compare(num_classes=v), lambda v: v is None or _whole(1)(v)),
    "compile_options": (
        lambda gm, v: _compare(compile_options=v),
        lambda v: v is None or isinstance(v, dict),
    ),
    "train": (lambda gm, v: _compare(train=v), _nothing),
    "seeds": (
        lambda gm, v: _compare(train=RUN | {"seeds": v}, example_inputs=None),
        _whole(1, 10_000),
    ),
    "compared device": (lambda gm, v: _compare(device=v), _nothing),
}


@pytest.mark.parametrize("name", CALLS)
def test_odd_values_are_refused_by_name(name: str, gm: SwatModule) -> None:
    call, fits = CALLS[name]
    for value in ODD:
        if fits(value):
            if name != "seeds":  # trains
                call(gm, value)
            continue
        with pytest.raises(SwatError) as error:
            call(gm, value)
        assert str(error.value), (name, value)


@pytest.mark.parametrize(
    "line",
    [
        "simulate digits/cnn --sweep lookahead=1..999999999",
        "simulate digits/cnn --sweep seed=-1",
        "report digits/cnn --input-shape 1,1,1",
        "report digits/cnn --device gpu9",
        "report digits/cnn --topk-cost 1",
    ],
)
def test_odd_command_lines_say_so_in_one_line(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) != 0
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "Traceback" not in told, told
