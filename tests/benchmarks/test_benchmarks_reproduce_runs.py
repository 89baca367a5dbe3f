"""benchmarks.reproduce: jobs, and runs that are kept, shared, resumed and recorded."""

from __future__ import annotations

import contextlib
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import common
from benchmarks.reproduce import running
from benchmarks.reproduce.jobs import SCALES, Arm, Network, fitted, jobs_of, told
from benchmarks.reproduce.recording import Recorded, read
from benchmarks.reproduce.running import Runner
from swatfx.errors import InputError, SwatError
from swatfx.policy import as_policy, dense, per_layer, swat_u
from swatfx.runs.run import train_run
from tests.nets.reproducing import DIGITS, TINY, job

pytestmark = pytest.mark.usefixtures("spare_time")


# Jobs.


def test_what_decides_a_result_decides_its_folder() -> None:
    base = job()
    assert base.folder == job().folder and base.folder.startswith("digits_cnn-digits-swat-u-0-")
    others = [
        job(seed=1),
        job(policy=swat_u(0.6)),
        job(policy=swat_u(0.5, period=2)),
        job(epochs=3),
        job(limit=None),
        job(lr=0.01),
        replace(base, network=Network("digits/cnn", "fake/1x8x8/10")),
    ]
    assert len({one.folder for one in [base, *others]}) == 8
    # Recording changes no result, nor does a field at its default.
    assert replace(base, every=3).folder == base.folder
    assert base.identity()["policy"] == {
        "name": "swat-u", "sparsity": 0.5, "first_dense": True, "rules": []
    }  # fmt: skip


def test_policies_take_the_seed_and_the_period_of_the_recipe() -> None:
    nested = per_layer({"fc": swat_u(0.5)}, default=swat_u(0.9, period=10))
    found = fitted(nested, 3, 1000)
    assert (found.seed, found.period) == (3, 10)
    assert (found.rules[0][1].seed, found.rules[0][1].period) == (3, 1000)
    imagenet = Network("resnet18", "imagenet")
    ((_, first), *_) = jobs_of(
        [Arm("a", None, swat_u(0.5))], imagenet, SCALES["paper"], lr=None, every=0
    )
    assert first.policy.period == 1000 and first.epochs == 90
    assert told(first.policy) == "swat-u:0.5,period=1000" and told(dense()) == "dense"


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "set:0.8",
        "dst",
        "meprop:0.5",
        "swat-u:0.9,period=100",
        "swat-frozen:0.9,hold_from_epoch=3",
        "saw:0.5,weight_selector=chw,activation_selector=chw",
    ],
)
def test_a_policy_is_told_as_the_string_that_makes_it(text: str) -> None:
    assert told(fitted(as_policy(text), 3, 1)) == text


def test_all_arms_of_a_seed_come_before_the_next_seed() -> None:
    arms = [Arm("a", None, dense()), Arm("b", None, swat_u(0.5))]
    pairs = list(jobs_of(arms, DIGITS, TINY, lr=None, every=0))
    assert [(arm.curve, one.seed) for arm, one in pairs] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1)
    ]  # fmt: skip


# Runs.


def test_runs_are_kept_and_a_run_broken_off_goes_on(
    tmp_path: pathlib.Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Runner(tmp_path / "whole").run(job())
    assert len(wanted.accuracies) == 2 and wanted.steps == 6 and not wanted.diverged
    assert wanted.weight_density == pytest.approx(0.5, abs=0.02) and wanted.machine
    assert not list((tmp_path / "whole").rglob("*.ckpt"))

    runner = Runner(tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(running, "train_run", lambda c: train_run(replace(c, max_steps=4)))
        patch.setattr(common, "write_result", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run(job())
    assert runner.finished(job()) is None
    resumed = runner.run(job())
    assert replace(resumed, seconds=0) == replace(wanted, seconds=0)
    assert runner.run(job()) == resumed
    assert trained == ["swat-u 0", "swat-u 0"]  # the whole run, and the second half


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(running.fcntl is None, reason="no file locks")
def test_commands_side_by_side_share_the_work(
    tmp_path: pathlib.Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine, other = Runner(tmp_path), Runner(tmp_path)
    jobs = [job(0), job(1)]
    usual = running.train_run
    with contextlib.ExitStack() as stack:
        stack.enter_context(mine._claimed(jobs[0]))
        assert other._taken(jobs[0]) and not other._taken(jobs[1])

        def train(config: Any) -> Any:
            result = usual(config)
            if config.seed == 1:  # while `other` trains the second job, the first is finished
                mine._train(jobs[0])
                stack.close()
            return result

        monkeypatch.setattr(running, "train_run", train)
        runs = other.run_all(jobs)
    assert trained == ["swat-u 1", "swat-u 0"] and list(runs) == [jobs[1], jobs[0]]
    assert not other._taken(jobs[0]) and "[2/2]" in capsys.readouterr().err


def test_a_recorded_run_serves_who_wants_no_recording(
    tmp_path: pathlib.Path, trained: list[str]
) -> None:
    runner = Runner(tmp_path)
    plain = runner.run(job())
    assert plain.recorded == ()
    noted = runner.run(job(every=2))
    assert noted.accuracies == plain.accuracies and len(trained) == 2
    assert [step.step for step in noted.recorded] == [0, 2, 4]
    for step in noted.recorded:
        assert set(step.thresholds) == set(step.weight_density) == {
            "features.3", "features.7", "features.10", "fc"
        }  # fmt: skip
        assert min(step.thresholds.values()) > 0
        assert all(0.45 < d < 0.6 for d in step.weight_density.values())
        assert all(0 < d < 0.6 for d in step.activation_density.values())
    assert runner.run(job()).accuracies == plain.accuracies and len(trained) == 2
    assert not torch.nn.modules.module._global_forward_hooks


def test_lines_of_a_recording_that_was_broken_off(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('[2, {"a": 1.0}, {}, {}]\n[0, {}, {}, {}]\n[2, {"a": 3.0}, {}, {}]\n[4, {"')
    assert read(path) == [Recorded(0, {}, {}, {}), Recorded(2, {"a": 3.0}, {}, {})]
    assert read(tmp_path / "none") == []


@pytest.mark.parametrize("message", ["the loss is nan at step 3", "Top-K met NaN in the weight"])
def test_a_run_that_diverges_counts_as_guessing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def diverge(config: Any) -> None:
        raise SwatError(message)

    monkeypatch.setattr(running, "train_run", diverge)
    runner = Runner(tmp_path)
    assert runner.estimate([job()]) == 0.0
    run = runner.run(job())
    assert run.diverged and run.accuracies == (0.1, 0.1) and run.losses == ()
    assert run.to_json()["accuracy"] == 0.1
    monkeypatch.undo()
    assert runner.run(job()) == run


def test_what_is_wrong_with_a_run_is_not_taken_for_divergence(tmp_path: pathlib.Path) -> None:
    wrong = replace(job(), network=Network("cifar/resnet20", "cifar10"))
    runner = Runner(tmp_path / "work", data_root=str(tmp_path))
    with pytest.raises(InputError):
        runner.run(wrong)
    assert runner.finished(wrong) is None


def test_estimates_scale_with_images_and_epochs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def tried(config: Any) -> Any:
        asked.append(config)
        return replace(result, seconds=1.28)

    result = train_run(job().config(None, max_steps=1))
    monkeypatch.setattr(running, "train_run", tried)
    jobs = [job(seed, limit=640, epochs=5) for seed in (0, 1)]
    # 128 images took 1.28 s; 640 of them 5 times, for two seeds.
    assert Runner(tmp_path).estimate(jobs) == pytest.approx(0.01 * 640 * 5 * 2)
    assert {(c.limit, c.max_steps, c.epochs, c.output_dir) for c in asked} == {(128, 4, 5, None)}
    assert len(asked) == 2  # one to warm up, and one for both seeds
    imagenet = replace(jobs[0], network=Network("resnet18", "imagenet"))
    assert Runner(tmp_path).estimate([imagenet]) is None


def test_time_as_text() -> None:
    assert running.minutes(29) == "0 min" and running.minutes(3660) == "1 h 1 min"
