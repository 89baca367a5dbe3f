"""Training runs: what they write, and that a run that was stopped goes on as if it was not."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from swatfx import models
from swatfx.checkpoint.saving import load
from swatfx.errors import InputError, SwatError, UnknownNameError
from swatfx.runs import run as runs
from swatfx.runs.folder import CHECKPOINT, CONFIG, METRICS
from swatfx.runs.run import RunConfig, RunResult, train_run

# 320 images make five steps of 64 an epoch.
BASE = RunConfig(
    model="digits/cnn",
    data="digits",
    policy="swat-u:0.9",
    epochs=3,
    limit=320,
    device="cpu",
    threads=1,
)
STEPS = 5

# Dropout draws from the global random state, so a resume has to bring that back too.
MODEL_FILE = """
from torch import nn

def with_dropout(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, num_classes),
    )

def no_module(num_classes):
    return 7

class Pair(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.flatten, self.fc = nn.Flatten(), nn.Linear(64, num_classes)

    def forward(self, x):
        return self.fc(self.flatten(x)), x
"""


class Killed(BaseException):
    """Stands for whatever ends a process; no handler of the library may swallow it."""


def _metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _timeless(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in _metrics(folder)]


def _weights(folder: pathlib.Path, spec: str = BASE.model) -> dict[str, Tensor]:
    gm = load(folder / CHECKPOINT, models.resolve(spec, 10))
    return {name: tensor.clone() for name, tensor in gm.state_dict().items()}


def _assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def _raise_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: type) -> None:
    """Let the `call`-th call of `runs.<name>` raise."""
    function: Callable[..., Any] = getattr(runs, name)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return function(*args, **options)

    monkeypatch.setattr(runs, name, counted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, RunResult]:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train_run(replace(BASE, output_dir=str(folder)))


@pytest.fixture
def my_models(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder with networks of one's own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "swatfx_test_models.py").write_text(MODEL_FILE)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    monkeypatch.delitem(sys.modules, "swatfx_test_models", raising=False)
    return "swatfx_test_models"


def test_a_run_writes_its_configuration_and_a_line_an_epoch(
    whole: tuple[pathlib.Path, RunResult],
) -> None:
    folder, result = whole
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, METRICS, CHECKPOINT])
    config = json.loads((folder / CONFIG).read_text())
    assert (config["model"], config["policy"]["sparsity"], config["epochs"]) == (
        "digits/cnn",
        0.9,
        3,
    )
    lines = _metrics(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.1, 0.004])
    assert all(line["complete"] and line["seconds"] > 0 for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    for line in lines:
        weights, activations = line["weight_density"], line["activation_density"]
        # Of the four convolutions and the classifier, the first convolution is dense.
        assert len(weights["layers"]) == len(activations["layers"]) == 4
        for density in weights["layers"].values():
            assert density == pytest.approx(0.1, abs=0.01)
        for density in activations["layers"].values():
            assert 0 < density < 0.11
        assert activations["mean"] == pytest.approx(sum(activations["layers"].values()) / 4)
    assert result.finished and (result.epochs, result.steps) == (3, 3 * STEPS)
    assert result.test_accuracy == lines[-1]["test_accuracy"]
    assert result.best_test_accuracy == max(line["test_accuracy"] for line in lines)
    assert result.mean_weight_density == lines[-1]["weight_density"]["mean"]


def test_the_same_run_twice_gives_the_same(
    whole: tuple[pathlib.Path, RunResult], tmp_path: pathlib.Path
) -> None:
    before = torch.get_rng_state()
    train_run(replace(BASE, output_dir=str(tmp_path / "run")))
    assert torch.equal(before, torch.get_rng_state())
    assert _timeless(tmp_path / "run") == _timeless(whole[0])
    _assert_same(_weights(tmp_path / "run"), _weights(whole[0]))


@pytest.mark.parametrize(
    ("name", "call", "lines_left"),
    [
        ("learning_rate", STEPS + 3, 1),  # in the middle of epoch 2
        ("learning_rate", 3, 0),  # before there is a checkpoint
        ("save", 2, 2),  # after the metrics of epoch 2, before its checkpoint
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    whole: tuple[pathlib.Path, RunResult],
    tmp_path: pathlib.Path,
    name: str,
    call: int,
    lines_left: int,
) -> None:
    config = replace(BASE, output_dir=str(tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        _raise_at(patch, name, call, Killed)
        with pytest.raises(Killed):
            train_run(config)
    assert len(_metrics(tmp_path / "run")) == lines_left
    with (tmp_path / "run" / METRICS).open("a") as file:
        file.write('{"epoch": 2, "st')  # a line cut short by the kill
    result = train_run(replace(config, resume=True))
    assert result.steps == 3 * STEPS
    assert _timeless(tmp_path / "run") == _timeless(whole[0])
    _assert_same(_weights(tmp_path / "run"), _weights(whole[0]))


@pytest.mark.parametrize("policy", ["swat-u:0.8,period=3", "swat-m:0.8,period=3"])
def test_dropout_and_moving_densities_resume_bit_for_bit(
    tmp_path: pathlib.Path, my_models: str, policy: str
) -> None:
    spec = f"{my_models}:with_dropout"
    config = replace(BASE, model=spec, policy=policy, output_dir=str(tmp_path / "whole"))
    train_run(config)
    config = replace(config, output_dir=str(tmp_path / "parts"))
    with pytest.MonkeyPatch.context() as patch:
        _raise_at(patch, "learning_rate", STEPS + 3, Killed)
        with pytest.raises(Killed):
            train_run(config)
    train_run(replace(config, resume=True))
    assert _timeless(tmp_path / "parts") == _timeless(tmp_path / "whole")
    _assert_same(_weights(tmp_path / "parts", spec), _weights(tmp_path / "whole", spec))


def test_max_steps_stops_within_an_epoch_and_resumes(
    whole: tuple[pathlib.Path, RunResult], tmp_path: pathlib.Path
) -> None:
    config = replace(BASE, output_dir=str(tmp_path / "run"))
    first = train_run(replace(config, max_steps=STEPS + 2))
    assert (first.epochs, first.steps, first.finished) == (1, STEPS + 2, False)
    assert [line["complete"] for line in _metrics(tmp_path / "run")] == [True, False]
    train_run(replace(config, resume=True))
    assert _timeless(tmp_path / "run") == _timeless(whole[0])
    _assert_same(_weights(tmp_path / "run"), _weights(whole[0]))


def test_resuming_a_finished_run_changes_nothing(tmp_path: pathlib.Path) -> None:
    config = replace(BASE, epochs=1, limit=64, output_dir=str(tmp_path / "run"))
    first = train_run(config)
    stamp = (tmp_path / "run" / CHECKPOINT).stat().st_mtime_ns
    assert train_run(replace(config, resume=True)) == first
    assert (tmp_path / "run" / CHECKPOINT).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"policy": "swat-u:0.8"}, "policy.sparsity was 0.9 and is 0.8"),
        ({"policy": "swat-erk:0.9"}, "policy.name was 'swat-u' and is 'swat-erk'"),
        ({"model": "cifar/resnet20"}, "model was 'digits/cnn' and is 'cifar/resnet20'"),
        ({"recipe": "cifar-resnet"}, "recipe.name was 'digits' and is 'cifar-resnet'"),
        ({"epochs": 4}, "epochs was 3 and is 4"),
        ({"batch_size": 32}, "batch_size was 64 and is 32"),
        ({"lr": 0.05}, "lr was 0.1 and is 0.05"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"limit": None}, "limit was 320 and is None"),
    ],
)
def test_resuming_another_run_names_what_differs(
    whole: tuple[pathlib.Path, RunResult], change: dict[str, Any], field: str
) -> None:
    config = replace(BASE, output_dir=str(whole[0]), resume=True, **change)
    with pytest.raises(InputError) as caught:
        train_run(config)
    assert field in str(caught.value)


def test_there_must_be_a_run_to_resume(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        train_run(replace(BASE, output_dir=str(tmp_path / "nothing"), resume=True))
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        train_run(replace(BASE, output_dir=str(tmp_path / "file")))


def test_nothing_is_written_without_an_output_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train_run(replace(BASE, max_steps=1))
    assert result.output_dir is None and list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: pathlib.Path) -> None:
    config = replace(BASE, policy="dense", output_dir=str(tmp_path / "run"), lr=1e30)
    with pytest.raises(SwatError, match=r"the loss is (nan|inf) at step \d+, in epoch 1.*--lr"):
        train_run(config)
    assert _metrics(tmp_path / "run") == []


def test_the_period_comes_from_the_recipe_unless_the_policy_says(
    tmp_path: pathlib.Path,
) -> None:
    for policy, period in (("swat-u:0.9", 1000), ("swat-u:0.9,period=5", 5)):
        folder = tmp_path / str(period)
        config = replace(BASE, policy=policy, recipe="imagenet", batch_size=32, max_steps=2)
        result = train_run(replace(config, output_dir=str(folder)))
        assert result.steps == 2
        written = json.loads((folder / CONFIG).read_text())
        assert written["policy"]["period"] == period
        # Half a step into the 5/90 of 3 epochs of ten steps that the warm-up takes.
        assert _metrics(folder)[0]["lr"] == pytest.approx(0.1 * 1.5 / 10 * 30 / 5)


def test_the_mean_weight_density_counts_weights_and_not_layers() -> None:
    result = train_run(replace(BASE, policy="swat-erk:0.9", max_steps=1))
    assert result.mean_weight_density == pytest.approx(0.1, abs=0.001)


def test_a_dense_run_reports_no_densities() -> None:
    result = train_run(replace(BASE, policy="dense", max_steps=1))
    assert result.mean_weight_density is None and result.mean_activation_density is None


def test_augmented_colour_images_train() -> None:
    config = replace(BASE, model="cifar/resnet20", data="fake", limit=32, batch_size=16)
    result = train_run(replace(config, max_steps=2))
    assert result.steps == 2 and result.mean_weight_density == pytest.approx(0.1, abs=0.01)


def test_tensorboard_events_are_written(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorboard")
    train_run(replace(BASE, output_dir=str(tmp_path / "run"), tensorboard=True, max_steps=1))
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"test_accuracy" in events.read_bytes()


def test_tensorboard_that_is_missing_says_what_to_install(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SwatError, match="pip install tensorboard"):
        train_run(replace(BASE, output_dir=str(tmp_path / "run"), tensorboard=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"resume": True}, "--output-dir"),
        ({"tensorboard": True}, "--output-dir"),
    ],
)
def test_a_configuration_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(BASE, **change)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown device"):
        train_run(replace(BASE, device="abacus"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU"):
        train_run(replace(BASE, device="cuda"))


def test_models_by_name_and_by_import(my_models: str) -> None:
    assert isinstance(models.resolve("digits/cnn", 7), type(models.create("digits/cnn")))
    assert models.resolve(f"{my_models}:with_dropout", 7)[-1].out_features == 7
    with pytest.raises(UnknownNameError, match="digits/cnn"):
        models.resolve("digit/cnn", 10)
    for wrong in (f"{my_models}:absent", "no_such_module_here:net", ":", "a:"):
        with pytest.raises(InputError, match="cannot import the model"):
            models.resolve(wrong, 10)
    with pytest.raises(InputError, match="no torch.nn.Module"):
        models.resolve(f"{my_models}:no_module", 10)


def test_a_model_that_returns_no_logits_is_refused(my_models: str) -> None:
    with pytest.raises(InputError, match="returns no logits"):
        train_run(replace(BASE, model=f"{my_models}:Pair", policy="dense"))


@pytest.mark.slow
def test_digits_reach_97_percent_at_90_percent_sparsity() -> None:
    result = train_run(replace(BASE, epochs=None, limit=None))
    assert result.epochs == 15 and result.test_accuracy >= 0.97


@pytest.mark.slow
def test_compiled_steps_learn_what_eager_ones_do(whole: tuple[pathlib.Path, RunResult]) -> None:
    result = train_run(replace(BASE, compile=True))
    assert result.finished
    assert result.train_loss == pytest.approx(whole[1].train_loss, rel=0.02)
