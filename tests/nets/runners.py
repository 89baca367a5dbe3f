"""Runs a benchmark's runner in this process, with sizes that only show that it works."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from benchmarks import common


def run_quick(
    module: ModuleType, capsys: pytest.CaptureFixture[str], *words: str
) -> dict[str, Any]:
    """What a quick run of `module` measured; its JSON and its table are sound."""
    assert common.run(module.BENCHMARK, ["--quick", "--json", "--repeats", "2", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar where there is no terminal
    return check_result(module, captured.out, "current")


def check_result(module: ModuleType, text: str, allocator: str) -> dict[str, Any]:
    """The measured part of a result in JSON: complete, and all its numbers finite."""
    result: dict[str, Any] = json.loads(text)
    assert result["date"] == common.today() and result["quick"] is True
    assert result["command"].startswith(f"python -m {module.__name__} --quick")
    assert result["machine"]["threads"] >= 1 and result["machine"]["swatfx_kernels"]
    assert common.render(module.BENCHMARK, result).count("\n") > 5
    assert all(math.isfinite(number) for number in numbers(result))
    measured: dict[str, Any] = result["allocators"][allocator]
    return measured


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, (int, float)):
        yield float(value)


def check_spread(values: dict[str, float], count: int = 2) -> None:
    """A spread over `count` rounds."""
    order = ["minimum", "lower_quartile", "median", "upper_quartile", "maximum"]
    assert set(values) == {*order, "iqr", "count"}
    assert 0 <= values["minimum"] and values["count"] == count and values["iqr"] >= 0
    in_order = [values[name] for name in order]
    assert in_order == sorted(in_order)
