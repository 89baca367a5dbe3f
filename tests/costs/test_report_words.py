"""What a report says beside its numbers: elements are no bytes, and no line contradicts another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import kernels
from swatfx.cli.commands import main
from swatfx.comparing.table import compare
from tests.nets.small_nets import Residual, plain

IMAGES = torch.empty(4, 3, 8, 8, device="meta")


def _lines(model: nn.Module, policy: str, x: Tensor = IMAGES, floor: float = 0.0) -> dict[str, str]:
    result = swatfx.report(swatfx.compile(model, policy), x, activation_floor=floor)
    lines = str(result).splitlines()
    starts = ("activations ", "activation sparsity", "kept for backward")
    return {start: line for line in lines for start in starts if line.startswith(start)}


def test_elements_are_told_as_elements() -> None:
    lines = _lines(plain(), "swat-u:0.9")
    assert "of the elements of conv and BN inputs (the paper's count" in lines["activations "]
    assert "more than dense" not in lines["kept for backward"]


def test_no_convolution_is_no_reduction_of_nought() -> None:
    """Linear layers keep a tenth, which the paper's measure does not see."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    lines = _lines(net, "swat-u:0.9,first_dense=False", torch.empty(8, 64, device="meta"))
    assert "not counted" in lines["activations "] and "-0.0%" not in lines["activations "]
    assert "activation sparsity" not in lines


@pytest.mark.parametrize("build", [plain, Residual])
def test_bytes_that_grow_are_explained(build: type[nn.Module]) -> None:
    """At 2% a bitmask costs more than the values that are dropped."""
    gm = swatfx.compile(build(), "swat-u:0.01,first_dense=False")
    totals = swatfx.report(gm, IMAGES).totals
    line = _lines(build(), "swat-u:0.01,first_dense=False")["kept for backward"]
    grows = totals["saved_bytes"] > totals["dense_saved_bytes"]
    assert totals["activation_reduction"] > 0
    assert ("more than dense although" in line) == grows


def test_a_bitmask_can_cost_more_than_it_saves() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    line = _lines(net, "swat-u:0.01,first_dense=False")["kept for backward"]
    assert "(+" in line and "more than dense although activations are dropped" in line


def test_natural_zeros_are_no_bytes() -> None:
    lines = _lines(plain(), "dense", floor=0.4)
    assert "40% natural zeros assumed, stored all the same" in lines["activations "]


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
def test_compare_tells_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "cifar/resnet20", "--policies", "swat-u:0.9,snfs:0.9"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "kernels on cpu, snfs:0.9: 0 of" in told
    assert "masks of SNFS need dense weight gradients (" in told
    assert main([*arguments, "--device", "cuda"]) == 0
    there = capsys.readouterr().out
    assert "GPUs run reference kernels (cuda)" in there and " on cpu" not in there
    assert main([*arguments, "--device", "gpu"]) != 0
    assert "unknown device" in capsys.readouterr().err


def test_compared_kernels_are_counts() -> None:
    found = compare("cifar/resnet20", ["swat-u:0.9", "dense"], torch.empty(16, 3, 32, 32))
    counts = [row.kernels for row in found.rows]
    assert sum(counts[0].values()) == 21 and counts[1] == {}
