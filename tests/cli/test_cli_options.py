"""No option of a command does nothing: what is given acts, or is refused in one line."""

from __future__ import annotations

import argparse
import pathlib

import pytest
import torch

import swatfx
from swatfx import models
from swatfx.cli.commands import main
from tests.nets import bad_commands

SIMULATE = ["simulate", "digits/cnn", "--accelerator", "scnn"]
REAL = ["--checkpoint", "a.ckpt", "--data", "digits"]
MODES = {
    "report": ["report", "digits/cnn", "--policy", "swat-u:0.8"],
    "simulate": SIMULATE,
    "simulate data": [*SIMULATE, "--data", "digits"],
    "simulate checkpoint": [*SIMULATE, "--checkpoint", "a.ckpt"],
    "simulate both": [*SIMULATE, *REAL],
    "simulate sweep": [*SIMULATE, "--sweep", "sparsity=0.5,0.9"],
    "simulate sweep batch": [*SIMULATE, "--sweep", "batch=1,2"],
    "simulate sweep both": [*SIMULATE, *REAL, "--sweep", "samples=1,2"],
    "simulate table6": [*SIMULATE, "--table6", "--seeds", "1"],
    "simulate table6 both": [*SIMULATE, "--table6", *REAL],
}
VALUES = {
    "policy": "swat-erk:0.5",
    "sparsity": "0.6",
    "num_classes": "64",
    "batch_size": "3",
    "input_shape": "1,16,16",
    "accelerator": "ideal",
    "samples": "2",
    "natural_density": "0.3",
    "seed": "5",
    "checkpoint": "a.ckpt",
    "data": "fake/1x8x8/10",
    "data_root": ".",
    "bandwidth": "0.5",
    "word_bytes": "4",
    "sweep": "bandwidth=1,2",
    "trace": "trace.json",
    "seeds": "2",
    "accounting": "exact",
    "activation_floor": "0.9",
    "topk_cost": "10,2",
    "device": "mps",
    "norm_saves": "int8",
    "value_dtype": "bf16",
    "kernels": "dense",
    "format": "markdown",
    "output": "out.txt",
}
# Table 6 is of convolutions, and a network may have one by the number of its classes.
MAY_DO_NOTHING = {("simulate table6", "num_classes")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("options")
    torch.manual_seed(0)
    swatfx.save(swatfx.compile(models.create("digits/cnn"), "swat-u:0.8"), path / "a.ckpt")
    return path


def _run(line: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    torch.manual_seed(0)
    code = main(line)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("mode", MODES)
def test_every_option_acts_or_is_refused(
    mode: str,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    line = MODES[mode]
    code, plain, error = _run(line, capsys)
    assert (code, error) == (0, "")
    idle, tried = [], 0
    for action in bad_commands.parsers()[line[0]]._actions:
        option = action.option_strings[-1] if action.option_strings else ""
        once = option in line and not isinstance(action, argparse._AppendAction)
        if not option or once or isinstance(action, argparse._HelpAction):
            continue
        given = [option] if action.nargs == 0 else [option, VALUES[action.dest]]
        before = set(folder.iterdir())
        code, out, error = _run([*line, *given], capsys)
        made = set(folder.iterdir()) - before
        tried += 1
        if code:
            assert code == 1 and not made and error.count("\n") == 1 and not out, (given, error)
        elif out == plain and not made and (mode, action.dest) not in MAY_DO_NOTHING:
            idle.append(option)
        for path in made:
            path.unlink()
    assert tried > 10 and not idle


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ([*SIMULATE, "--sweep", "seed=1,2", "--trace", "t"], "with --sweep (got '--trace')"),
        ([*SIMULATE, "--seeds", "3"], "without --table6 (got '--seeds')"),
        ([*SIMULATE, "--table6", "--trace", "t", "--seed", "0"], "(got '--trace, --seed')"),
        ([*SIMULATE, "--table6", "--policy", "swat-u:0.9"], "add --checkpoint and --data"),
        ([*SIMULATE, "--samples", "1", "--sweep", "batch=1,2"], "a sweep over batch"),
        ([*SIMULATE, "--checkpoint", "a.ckpt", "--sweep", "sparsity=0.1,0.2"], "one of its own"),
        ([*SIMULATE, "--data", "digits", "--sweep", "natural_density=0.1,0.2"], "with --data"),
        (["simulate", "--accelerator", "scnn:conflicts=1", "--sweep", "conflicts=1"], "twice"),
        (["report", "digits/cnn", "--json", "--format", "csv"], "--json is --format json"),
        (["compare", "digits/cnn", "--policies", "dense", "--json", "--format", "csv"], "--json"),
        (["compare", "digits/cnn", "--policies", "dense", "--quiet"], "without --train"),
        (["export", "digits/cnn", "--output", "a.safetensors", "--batch-size", "2"], "no batch"),
        ([*bad_commands.base("train", pathlib.Path()), "--data-root", "."], "from no folder"),
        ([*bad_commands.base("train", pathlib.Path()), "--workers", "1"], "only imagenet"),
        ([*bad_commands.base("compare --train", pathlib.Path()), "--workers", "1"], "only imagen"),
    ],
)
def test_what_would_do_nothing_is_named(
    line: list[str],
    named: str,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    code, out, error = _run(line, capsys)
    assert (code, out) == (1, "") and named in error and error.count("\n") == 1
    assert not (folder / "a.safetensors").exists()
