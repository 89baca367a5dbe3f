"""benchmarks.memory: what it weighs and how it says what cannot be weighed."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks import memory, planned_memory
from benchmarks.sides import Network, StepSide
from tests.nets.runners import check_spread, run_quick

pytestmark = pytest.mark.usefixtures("spare_time")
_DIGITS = Network("digits/cnn", 4)
_QUANTITIES = {
    "saved_bytes",
    "saved_bytes_with_parameters",
    "seconds",
    "peak_resident_bytes",
    "peak_over_built_bytes",
    "peak_over_idle_bytes",
    "peak_covers_first_step",
}


def test_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def here(network: Network, name: str, args: argparse.Namespace) -> dict[str, Any]:
        asked.append(name)
        if name == "int8 norms":
            return {"unavailable": "swatfx.compile takes no norm_saves"}
        if name == "exact":
            return dict.fromkeys(_QUANTITIES, 30)
        return dict.fromkeys(_QUANTITIES, 60)

    monkeypatch.setattr(memory, "_in_process", here)
    names = ["dense nchw", memory.BASE, "exact", "int8 norms"]
    measured = run_quick(memory, capsys, "--sides", *names)
    assert asked == [*names, "exact", memory.BASE, "dense nchw"]  # backwards in the second round
    assert measured["unavailable"] == {"int8 norms": "swatfx.compile takes no norm_saves"}
    assert set(measured["sides"]) == {"dense nchw", memory.BASE, "exact"}
    check_spread(measured["sides"]["exact"]["saved_bytes"])
    assert measured["over_dense_eager"]["exact"]["saved_bytes"] == 0.5
    assert measured["targets"] == {"exact": {"at_most": 0.6, "measured": 0.5, "met": True}}
    assert measured["fastest_dense"] == "dense nchw"
    assert measured["seconds_over_fastest_dense"]["exact"]["median"] == 0.5


def test_a_side_is_weighed_in_its_own_process(capfd: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(policy="swat-u:0.9,period=1000", steps=2, threads=1)
    weight = memory._in_process(_DIGITS, "exact", args)
    assert set(weight) == _QUANTITIES
    assert 1e8 < weight["peak_resident_bytes"] < 1e10
    assert 0 < weight["saved_bytes"] < weight["saved_bytes_with_parameters"] < 1e6
    assert weight["seconds"] > 0
    assert capfd.readouterr().err == ""


def test_what_swatfx_cannot_do_is_said() -> None:
    side = StepSide("nchw", "dense", {"no_such_keyword": 1})
    weight = memory.weigh(_DIGITS, side, 1)
    assert weight == {"unavailable": "swatfx.compile takes no no_such_keyword"}


@pytest.mark.usefixtures("no_compiler")
def test_a_compiler_that_fails_is_named() -> None:
    side = memory.sides("dense")["dense compiled, budget 0.3"]
    assert side.budget == 0.3
    assert memory.weigh(_DIGITS, side, 1) == {"unavailable": "RuntimeError: no C++ compiler"}


def test_an_error_of_our_own_is_no_reason_to_go_on() -> None:
    with pytest.raises(RuntimeError):
        memory.weigh(Network("digits/cnn", 4, 1), memory.sides("swat-u:0.9")["exact"], 1)


def test_the_peak_is_of_what_comes_after_the_reset() -> None:
    size = 200_000_000
    if not memory.reset_peak():
        pytest.skip("this system has no peak to reset")
    before = memory.resident_bytes()
    block = torch.ones(size, dtype=torch.uint8)
    assert memory.peak_resident_bytes() >= before + 0.9 * size
    del block
    memory.trim()
    assert memory.reset_peak()
    assert memory.peak_resident_bytes() < before + 0.5 * size


def test_planned_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Codes are less than exact saves, and half bytes less than bytes."""
    measured = run_quick(planned_memory, capsys)["networks"]
    assert list(measured) == ["digits/cnn:4"]
    for sides in measured["digits/cnn:4"].values():
        kept = [side["saved_bytes"] for side in sides.values()]
        assert list(sides) == ["exact", "int8", "int4"] and kept == sorted(kept, reverse=True)
        for side in sides.values():
            assert side["over_dense"] == side["saved_bytes"] / side["dense_saved_bytes"]
