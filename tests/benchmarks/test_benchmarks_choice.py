"""`python -m benchmarks.kernel_choice`, quickly."""

from __future__ import annotations

import pytest

from benchmarks import kernel_choice
from swatfx import kernels
from tests.nets.runners import run_quick

pytestmark = pytest.mark.usefixtures("spare_time")


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
def test_choices_are_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """A choice that another side makes as well is measured once, so that its ratio is 1."""
    words = ("--sparsities", "0.9", "--dtypes", "fp32")
    (case,) = run_quick(kernel_choice, capsys, *words)["networks"]["digits/cnn:4"]["cases"].values()
    assert case["dense layers"] == 0 <= case["auto layers"] <= case["sparse layers"]
    assert case["better"] in {f"fp32 0.9 {case[side]}" for side in ("sparse", "dense")}
    assert case["met"] == (case["over_better"]["median"] <= kernel_choice.MOST)
    if f"fp32 0.9 {case['auto']}" == case["better"]:
        assert case["over_better"]["median"] == 1
    assert case["over_plain"]["median"] > 0 and "predicted" in case
