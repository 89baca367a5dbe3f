"""benchmarks.gpu: its two parts, on a CPU; and what a disagreement looks like."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import common, gpu
from benchmarks.sides import Network
from tests.nets.runners import check_spread, run_quick

pytestmark = pytest.mark.usefixtures("spare_time")
_CPU = torch.device("cpu")
_DIGITS = Network("digits/cnn", 8)


def test_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    measured = run_quick(gpu, capsys, "--device", "cpu")
    assert all(found["agrees"] for found in measured["policies"].values())
    assert measured["fastest_dense"].startswith("dense") and not measured["unavailable"]
    for side in measured["seconds_over_fastest_dense"].values():
        check_spread(side)


def test_a_policy_that_computes_otherwise_on_the_device_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = iter([gpu.train(_DIGITS, "swat-u:0.9", _CPU), gpu.train(_DIGITS, "dense", _CPU)])
    monkeypatch.setattr(gpu, "train", lambda *args: next(results))
    found = gpu.compare(_DIGITS, "swat-u:0.9", _CPU)
    assert found["agrees"] is False and found["gradient"] > 0.1


def test_a_policy_that_fails_on_the_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: Any) -> dict[str, Any]:
        raise RuntimeError("it does not run there\nand here is why")

    monkeypatch.setattr(gpu, "train", train)
    found = gpu.compare(_DIGITS, "swat-u:0.9", _CPU)
    assert found == {"error": "on cpu: RuntimeError: it does not run there"}


def test_without_a_gpu_it_says_how_to_try_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu"):
        common.run(gpu.BENCHMARK, ["--quick"])
