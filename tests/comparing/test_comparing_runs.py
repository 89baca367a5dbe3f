"""The runs of a comparison: where they go, that they are read and taken up, and what fails."""

from __future__ import annotations

import json
import pathlib
from dataclasses import asdict
from typing import Any

import pytest

from swatfx.comparing.runs import (
    OPTIONS,
    Run,
    Trained,
    data_shape,
    folder_name,
    last_densities,
    mean_densities,
    run_config,
    train_policies,
)
from swatfx.errors import CheckpointError, InputError, PolicyError, UnknownNameError
from swatfx.runs import run as runs
from swatfx.runs.config import RunConfig
from swatfx.runs.folder import CHECKPOINT, METRICS
from swatfx.runs.run import train_run

# 64 images make one step an epoch.
OPTIONS_GIVEN = {"data": "digits", "epochs": 2, "limit": 64, "device": "cpu", "threads": 1}
BASE = run_config("digits/cnn", OPTIONS_GIVEN)


def _train(
    folder: pathlib.Path | None, *policies: str, seeds: tuple[int, ...] = (0,), **options: Any
) -> tuple[dict[str, list[Trained]], list[str]]:
    said: list[str] = []
    config = run_config("digits/cnn", OPTIONS_GIVEN | options)
    place = None if folder is None else str(folder)
    found = train_policies(config, {p: p for p in policies}, seeds, place, said.append)
    return found, said


def _timeless(found: dict[str, list[Trained]]) -> list[Any]:
    return [
        (name, asdict(t.run) | {"seconds": None}, t.densities)
        for name, trained in found.items()
        for t in trained
    ]


def test_a_run_is_what_swatfx_train_does(tmp_path: pathlib.Path) -> None:
    found, said = _train(tmp_path / "all", "swat-m:0.9", "dense", seeds=(0, 3))
    config = RunConfig("digits/cnn", policy="swat-m:0.9", seed=3, **OPTIONS_GIVEN)
    alone = train_run(config)
    trained = found["swat-m:0.9"][1]
    assert trained.run.seed == 3 and trained.run.failure is None
    assert trained.run.accuracy == alone.test_accuracy
    assert trained.run.best_accuracy == alone.best_test_accuracy
    assert trained.run.seconds is not None and trained.run.seconds > 0
    folder = tmp_path / "all" / "swat-m_0.9" / "seed-3"
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert list(trained.densities) == [line["weight_density"]["layers"] for line in lines]
    assert len(trained.densities) == 2 and len(trained.densities[0]) == 5
    assert [len(found[name]) for name in ("swat-m:0.9", "dense")] == [2, 2]
    assert found["dense"][0].densities == ({}, {})
    assert said[0] == "swat-m:0.9, seed 0: run 1 of 4"
    assert said[3].startswith(f"swat-m:0.9, seed 3: test accuracy {trained.run.accuracy:.2%}")
    assert len(said) == 8


def test_a_finished_run_is_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = _train(tmp_path, "swat-u:0.9", seeds=(0, 1))
    checkpoint = tmp_path / "swat-u_0.9" / "seed-1" / CHECKPOINT
    before = checkpoint.stat().st_mtime_ns
    monkeypatch.setattr(runs, "learning_rate", None)  # no step can be taken without
    second, _ = _train(tmp_path, "swat-u:0.9", seeds=(0, 1))
    assert second == first and checkpoint.stat().st_mtime_ns == before


def test_an_interrupted_comparison_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = _train(tmp_path / "whole", "swat-u:0.9", "swat-m:0.9")
    rate, calls = runs.learning_rate, 0

    def interrupted(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the second epoch of the second run
            raise KeyboardInterrupt
        return rate(*arguments)

    monkeypatch.setattr(runs, "learning_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "parts", "swat-u:0.9", "swat-m:0.9")
    parts, _ = _train(tmp_path / "parts", "swat-u:0.9", "swat-m:0.9")
    assert calls == 5  # nothing is done twice but the step that was broken off
    assert _timeless(parts) == _timeless(whole)


def test_runs_begun_otherwise_are_left_alone(tmp_path: pathlib.Path) -> None:
    _train(tmp_path, "dense")
    with pytest.raises(InputError, match="epochs was 2 and is 3"):
        _train(tmp_path, "dense", epochs=3)


def test_a_run_that_diverges_fails_alone(tmp_path: pathlib.Path) -> None:
    for _ in range(2):  # a failed run is taken up from its last checkpoint, and fails again
        found, said = _train(tmp_path, "dense", "swat-u:0.9", lr=1e30)
        for name, reason in (("dense", "the loss is"), ("swat-u:0.9", "Top-K met NaN")):
            (trained,) = found[name]
            assert trained.run.accuracy is None and trained.densities == ()
            assert trained.run.failure is not None and reason in trained.run.failure
        outcomes = [line.partition(": ")[2][:6] for line in said]
        assert outcomes == ["run 1 ", "failed", "run 2 ", "failed"]


def test_a_checkpoint_that_cannot_be_written_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(runs, "save", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        _train(None, "dense")


def test_nothing_is_left_behind_without_a_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    found, _ = _train(None, "swat-u:0.9")
    assert len(found["swat-u:0.9"][0].densities) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_folders_are_told_apart(tmp_path: pathlib.Path) -> None:
    assert folder_name("swat-u:0.9,period=10") == "swat-u_0.9_period=10"
    assert folder_name("../x/y") == ".._x_y"
    with pytest.raises(PolicyError, match="two policies"):
        _train(tmp_path, "swat-u:0.9", "swat-u;0.9")
    assert list(tmp_path.iterdir()) == []


def test_the_options_of_all_runs() -> None:
    assert (BASE.model, BASE.data, BASE.limit) == ("digits/cnn", "digits", 64)
    assert {"data", "epochs", "batch_size", "norm_saves", "quiet"} <= set(OPTIONS)
    assert not {"seed", "policy", "model", "output_dir", "resume"} & set(OPTIONS)
    with pytest.raises(UnknownNameError, match="did you mean epochs"):
        run_config("digits/cnn", OPTIONS_GIVEN | {"epoch": 3})
    with pytest.raises(UnknownNameError, match="training option"):
        run_config("digits/cnn", OPTIONS_GIVEN | {"seed": 3})
    with pytest.raises(InputError, match="wants a data set"):
        run_config("digits/cnn", {"epochs": 3})
    with pytest.raises(InputError, match="package.module:callable"):
        run_config(object, OPTIONS_GIVEN)
    with pytest.raises(InputError, match="epochs must be at least 1"):
        run_config("digits/cnn", OPTIONS_GIVEN | {"epochs": 0})


def test_the_shape_that_is_trained_on() -> None:
    assert data_shape(BASE) == ((64, 1, 8, 8), 10)
    fake = run_config("cifar/resnet20", {"data": "fake/3x16x24/7", "limit": 8})
    assert data_shape(fake) == ((128, 3, 16, 24), 7)
    named = run_config("digits/cnn", {"data": "digits", "recipe": "imagenet", "batch_size": 9})
    assert data_shape(named)[0][0] == 9


def test_mean_and_last_densities() -> None:
    one = Trained(Run(0), ({"a": 1.0, "b": 0.5}, {"a": 0.5, "b": 0.1}))
    two = Trained(Run(1), ({"a": 0.6, "b": 0.3}, {"a": 0.3, "b": 0.3}))
    failed = Trained(Run(2, failure="the loss is nan"))
    assert mean_densities([one, two, failed]) == pytest.approx({"a": 0.6, "b": 0.3})
    assert last_densities([one, failed, two]) == pytest.approx({"a": 0.4, "b": 0.2})
    assert mean_densities([failed]) == last_densities([failed]) == {}
