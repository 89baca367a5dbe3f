"""benchmarks.tune: equal budgets, one search, resumable runs, and the comparison by hand."""

from __future__ import annotations

import json
import pathlib
import statistics
from typing import Any

import pytest

import swatfx
from benchmarks import tune
from swatfx.policy import Policy
from tests.nets.runners import run_quick

pytestmark = pytest.mark.usefixtures("spare_time")


def test_tune(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    path, partial = tmp_path / "t.json", tmp_path / "p.json"
    words = ["--seeds", "2", "--sparsity", "0.8", "--batches", "2"]
    measured = run_quick(tune, capsys, *words, "--output", str(path), "--partial", str(partial))
    assert measured["settings"]["train_images"] == 96
    assert list(measured["policies"]) == ["uniform", "erk", "tuned"]
    uniform = measured["policies"]["uniform"]
    for name, policy in measured["policies"].items():
        assert 0.8 * uniform["cost_fraction"] < policy["cost_fraction"], name
        assert policy["cost_fraction"] <= uniform["cost_fraction"] + 1e-12, name
        assert 0 < policy["weight_sparsity"] < 1
    erk = measured["policies"]["erk"]["policy"]
    assert erk["distribution"] == "erk" and erk["sparsity"] > 0.8
    densities = {tuple(d) for d in measured["policies"]["tuned"]["densities"].values()}
    assert len(densities) > 2 and all(weight == activation for weight, activation in densities)
    for name, runs in measured["runs"].items():
        assert [run["seed"] for run in runs] == [0, 1]
        accuracies = [run["accuracy"] for run in runs]
        assert all(0 <= a <= 1 for a in accuracies) and all(len(r["losses"]) == 2 for r in runs)
        assert measured["summary"][name]["accuracy_mean"] == statistics.fmean(accuracies)
    assert set(measured["tuned_against"]) == {"uniform", "erk"}
    assert json.loads(path.read_text())["allocators"]["current"] == measured
    text = path.with_suffix(".md").read_text()
    assert "| tuned" in text and "| features.3" in text
    assert not partial.exists()


def test_what_ended_is_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    partial = tmp_path / "p.json"
    words = ["--seeds", "1", "--sparsity", "0.8", "--batches", "1", "--partial", str(partial)]
    original, trained = tune.train, []

    def train(*args: Any) -> list[float]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(args[3])
        return original(*args)

    monkeypatch.setattr(tune, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run_quick(tune, capsys, *words)
    assert trained == [1000, 0, 0]  # the warm-up, uniform, ERK
    stored = json.loads(partial.read_text())["runs"]
    assert set(stored) == {"policies", "uniform, seed 0", "erk, seed 0"}
    trained.clear()
    measured = run_quick(tune, capsys, *words)
    assert trained == [0]  # neither a search nor a run a second time
    assert measured["runs"]["erk"][0]["losses"] == stored["erk, seed 0"]["losses"]
    policy = Policy.from_json(measured["policies"]["tuned"]["policy"])
    assert (
        policy.name == "tuned(swat-u)" and measured["tuned_against"]["erk"]["in_deviations"] is None
    )


def test_erk_is_as_dense_as_the_budget_lets_it() -> None:
    args = tune.common._parser(tune.BENCHMARK).parse_args(["--sparsity", "0.7"])
    args.model, args.batch_size = "digits/cnn", 8
    found = tune.erk_policy(args)
    inputs, model = tune.example_inputs(args), tune.new_model(args)

    def total(policy: Policy | str) -> float:
        return tune.cost(swatfx.compile(model, policy), inputs).total

    allowed = total("swat-u:0.7")
    assert total(found) <= allowed
    assert total(swatfx.swat_erk(round(found.sparsity - 1e-4, 4))) > allowed


def test_comparisons_by_hand() -> None:
    ours = [{"accuracy": a} for a in (0.5, 0.6, 0.7)]
    theirs = [{"accuracy": a} for a in (0.2, 0.3, 0.4)]
    found = tune.compare(ours, theirs)
    assert found["accuracy_gain"] == pytest.approx(0.3)
    assert found["in_deviations"] == pytest.approx(3) and found["by_more_than_two"]
    assert not tune.compare(theirs, ours)["by_more_than_two"]
    alone = tune.compare(ours[:1], theirs[:1])
    assert alone == {
        "accuracy_gain": pytest.approx(0.3),
        "in_deviations": None,
        "by_more_than_two": False,
    }
