"""benchmarks.accuracy: runs side by side, kept as they end, written as JSON and Markdown."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest

from benchmarks import accuracy, training_runs
from swatfx import kernels
from tests.nets.runners import run_quick

pytestmark = pytest.mark.usefixtures("spare_time")


@pytest.fixture
def _compiled() -> None:
    if not kernels.available():
        pytest.skip("no compiled kernels here")


@pytest.mark.usefixtures("_compiled")
def test_accuracy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path, partial = tmp_path / "a.json", tmp_path / "p.json"
    words = ["--sides", "dense", "reference kernels", "fast kernels"]
    words += ["--output", str(path), "--partial", str(partial)]
    measured = run_quick(accuracy, capsys, *words)
    assert measured["settings"]["train_images"] == 96 and measured["unavailable"] == {}
    assert set(measured["runs"]) == {"dense", "reference kernels", "fast kernels"}
    for name, runs in measured["runs"].items():
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            assert len(run["losses"]) == 6 and len(run["epoch_losses"]) == 2
            assert len(run["accuracies"]) == 2 and 0 <= run["accuracies"][-1] <= 1
        summary = measured["summary"][name]
        assert summary["seeds"] == 2 and summary["final_accuracy_std"] >= 0
    differences = measured["differences_to_base"]
    assert differences["fast kernels"]["loss_largest"] < 1e-2
    assert differences["dense"]["loss_largest"] > differences["fast kernels"]["loss_largest"]
    assert json.loads(path.read_text())["allocators"]["current"] == measured
    text = path.with_suffix(".md").read_text()
    assert "| fast kernels" in text and "fast kernels: loss" in text and ".png" not in text
    assert not partial.exists()


@pytest.mark.usefixtures("_compiled")
def test_sides_under_bf16_and_with_codes(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["dense", "dense under bf16", "fast kernels", "under bf16", "int4 norms"]
    measured = run_quick(accuracy, capsys, "--seeds", "1", "--sides", *names)
    losses = {name: tuple(runs[0]["losses"]) for name, runs in measured["runs"].items()}
    assert set(losses) == set(names) and len(set(losses.values())) == len(names)
    differences = measured["differences_to_base"]
    assert measured["base"] == "fast kernels" and "fast kernels" not in differences
    assert differences["under bf16"]["first_loss_largest"] < 0.05


def test_runs_that_ended_are_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    partial = tmp_path / "p.json"
    words = ["--sides", "dense", "reference kernels", "--partial", str(partial)]
    original, trained = accuracy.train, []

    def train(side: accuracy.Side, *args: Any) -> dict[str, Any]:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((side.reference, args[2]))
        return original(side, *args)

    monkeypatch.setattr(accuracy, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run_quick(accuracy, capsys, *words)
    assert trained == [(False, 0), (True, 0)]
    stored = json.loads(partial.read_text())
    assert [run["finished"] for run in stored["runs"].values()] == [True, True]
    wanted = stored["runs"]["dense, seed 0"]["losses"]
    trained.clear()
    measured = run_quick(accuracy, capsys, *words)
    assert trained == [(False, 1), (True, 1)]
    assert measured["runs"]["dense"][0]["losses"] == wanted


def test_runs_of_other_settings_and_unfinished_ones_are_not_taken(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "p.json"
    first = training_runs.Partial(path, {"epochs": 2})
    first.keep("a", {"losses": [1.0]}, finished=True)
    first.keep("b", {"losses": [2.0]}, finished=False)
    assert set(training_runs.Partial(path, {"epochs": 2}).runs) == {"a"}
    assert training_runs.Partial(path, {"epochs": 3}).runs == {}
    assert training_runs.Partial(None, {"epochs": 2}).runs == {}


@pytest.mark.usefixtures("_compiled")
def test_a_side_trains_by_the_kernels_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = accuracy.sides("swat-u:0.9")
    assert chosen["reference kernels"].reference and not chosen["fast kernels"].reference
    with kernels.reference_only():
        assert chosen["fast kernels"].missing() == "no compiled kernels"
        assert chosen["dense"].missing() is None
        assert chosen["reference kernels"].missing() is None
    assert chosen["fast kernels"].missing() is None


def test_means_cover_every_value_once() -> None:
    assert accuracy._means([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert accuracy._means([1.0, 2.0], 5) == [1.0, 2.0]
    assert len(accuracy._means([float(n) for n in range(157)], 10)) == 10


def test_summaries_by_hand() -> None:
    def run(accuracy_: float, *losses: float) -> dict[str, Any]:
        return {
            "accuracies": [0.0, accuracy_],
            "losses": list(losses),
            "epoch_losses": [sum(losses)],
            "seconds": 2.0,
        }

    ours, base = [run(0.5, 1.0, 3.0), run(0.7, 1.0, 1.0)], [run(0.4, 1.5, 3.0), run(0.9, 1, 2)]
    summary = accuracy.summarise(ours)
    assert summary["final_accuracy_mean"] == pytest.approx(0.6)
    assert summary["final_accuracy_std"] == pytest.approx(0.02**0.5)
    assert summary["final_loss_mean"] == 3.0 and summary["seconds_mean"] == 2.0
    assert accuracy.summarise(ours[:1])["final_accuracy_std"] is None
    gap = accuracy.compare(ours, base)
    assert gap["final_accuracy_mean"] == pytest.approx(-0.05)
    assert gap["final_accuracy_largest"] == pytest.approx(0.2)
    assert gap["first_loss_largest"] == 0.5 and gap["loss_largest"] == 1.0
    assert gap["loss_mean"] == pytest.approx(1.5 / 4)
