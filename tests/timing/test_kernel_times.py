"""`swatfx bench --fit`: constants of this machine, from few and small layers here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from swatfx import forecast, kernels
from swatfx.cli.commands import main
from swatfx.errors import InputError
from swatfx.forecast import Constants
from swatfx.forecast.work import KINDS, LAYERS
from swatfx.timing import fit_kernel_times, kernel_times
from swatfx.timing.kernel_times import Shape

pytestmark = pytest.mark.usefixtures("spare_time")


@pytest.fixture
def few_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A layer of each kind, and a folder for the constants."""
    found = [
        Shape(2, 8, 16, 4, 1),
        Shape(2, 16, 16, 4, 3),
        Shape(2, 16, 16, 4, 3, 2),
        Shape(2, 16, 16, 4, 3, 1, 16),
        Shape(16, 8, 16),
    ]
    assert {kernel_times._work("fp32", shape).kind for shape in found} == set(LAYERS)
    monkeypatch.setattr(kernel_times, "shapes", lambda: found)
    monkeypatch.setattr(kernel_times, "_ASKED", ((("swat-u", 0.8),), (("static", 0.8),)))
    monkeypatch.setattr(kernel_times, "_ELEMENTS", [(2, 8, 4), (2, 8, 8)])
    monkeypatch.setattr(kernel_times, "TURNS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "swatfx" / "kernel_times.json"


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
def test_a_fit_is_stored_and_told(few_shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    assert main(("bench", "--fit", "--threads", "1", "--json")) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert str(few_shapes) in captured.err
    assert Constants.from_json(told["constants"]) == forecast.read(forecast.this_machine())[0]
    assert {sample["work"]["kind"] for sample in told["samples"]} == set(KINDS)
    assert all(sample["seconds"] > 0 for sample in told["samples"])
    assert torch.equal(before, torch.get_rng_state())
    assert json.loads(few_shapes.read_text())["format"] == 1


def test_what_a_fit_measures_is_in_all_networks() -> None:
    """Every kind at few images and at many."""
    works = [kernel_times._work("fp32", shape) for shape in kernel_times.shapes()]
    assert {work.kind for work in works} == set(LAYERS)
    for kind in LAYERS:
        sizes = [work.inputs for work in works if work.kind == kind]
        assert max(sizes) > 10 * min(sizes) and len(sizes) >= 8


def test_a_fit_wants_kernels_and_no_model(
    few_shapes: Path, reference_kernels: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="no compiled kernels"):
        fit_kernel_times()
    assert main(("bench", "--fit", "digits/cnn")) == 1
    assert "--fit measures kernels" in capsys.readouterr().err
    assert main(("bench",)) == 1
    assert "bench wants a model" in capsys.readouterr().err
    assert not few_shapes.exists()
