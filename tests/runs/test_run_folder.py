"""One process a run folder; leftovers of killed processes; several ranks are refused."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from swatfx.cli.commands import main
from swatfx.errors import CheckpointError, InputError
from swatfx.files import locks
from swatfx.files.atomic import leftovers, write_text
from swatfx.runs import run as runs
from swatfx.runs.config import RunConfig
from swatfx.runs.folder import FolderInUseError, RunFolder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
TRAIN = ["train", "--model", "digits/cnn", "--data", "digits", "--policy", "swat-u:0.9"]
TRAIN += ["--limit", "64", "--epochs", "1", "--threads", "1", "--device", "cpu"]


def _config(folder: pathlib.Path, **options: Any) -> RunConfig:
    return RunConfig(
        "digits/cnn",
        "digits",
        "swat-u:0.9",
        limit=64,
        epochs=1,
        threads=1,
        device="cpu",
        output_dir=str(folder),
        **options,
    )


HOLD = """
import sys, time
from swatfx.runs.folder import RunFolder
with RunFolder(sys.argv[1]).taken({}, resume=False):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(folder: pathlib.Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    holder = _holder(folder)
    try:
        assert main([*TRAIN, "--output-dir", str(folder)]) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        assert f"another process trains in the output folder (process {holder.pid})" in said.err
        assert [path.name for path in folder.iterdir()] == [".lock"]  # which may be looked at
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    assert main([*TRAIN, "--output-dir", str(folder), "--quiet"]) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.ckpt"}


def test_a_model_that_does_not_take_the_images_is_refused_before_anything_is_written(
    tmp_path: pathlib.Path,
) -> None:
    config = RunConfig(
        "cifar/resnet20", "digits", "dense", output_dir=str(tmp_path / "a"), device="cpu"
    )
    with pytest.raises(InputError, match=r"cannot take images of digits.*\(2, 1, 8, 8\)"):
        runs.train_run(config)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened_leaves_no_folder(tmp_path: pathlib.Path) -> None:
    config = RunConfig(
        "cifar/resnet20", "cifar10", "dense", data_root="absent", output_dir=str(tmp_path / "a/b")
    )
    with pytest.raises(InputError, match="is not there"):
        runs.train_run(config)
    assert not list(tmp_path.iterdir())


def test_one_lock_in_one_process_too(tmp_path: pathlib.Path) -> None:
    folder = RunFolder(str(tmp_path))
    with folder.taken({}, resume=False):
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):
            with RunFolder(str(tmp_path)).taken({}, resume=False):
                pass
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir()) and not locks._held
    with folder.taken({}, resume=False):
        pass


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_reader_holds_no_lock(tmp_path: pathlib.Path) -> None:
    """DataLoader workers outlive a killed parent for a while."""
    path = tmp_path / "lock"
    first = os.open(path, os.O_RDWR | os.O_CREAT)
    assert locks.try_lock(first) is True
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        locks.release(first)
        deadline = time.monotonic() + 5
        second = os.open(path, os.O_RDWR)
        while locks.try_lock(second) is False:  # until the child has closed what it inherited
            assert time.monotonic() < deadline
        locks.release(second)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_leftovers_of_killed_writers_are_removed(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    dead = [".checkpoint.0123456789ab.ckpt", ".config.0123456789ab.json", ".lock"]
    for name in dead:
        (folder / name).write_bytes(b"half")
    assert main([*TRAIN, "--output-dir", str(folder), "--quiet"]) == 0
    assert not any((folder / name).exists() for name in dead)

    report = tmp_path / "report.md"
    for name in (".report.0123456789ab.md", ".report.ba9876543210.md", ".report.other.md"):
        (tmp_path / name).write_text("half")
    alive = os.open(tmp_path / ".report.ba9876543210.md", os.O_RDWR)
    assert locks.try_lock(alive)
    write_text(report, "whole")
    names = {path.name for path in tmp_path.iterdir()} - {"run"}
    assert names == {"report.md", ".report.ba9876543210.md", ".report.other.md"}
    locks.release(alive)
    assert [path.name for path in leftovers(report)] == [".report.ba9876543210.md"]


def test_several_ranks_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*TRAIN, "--output-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "WORLD_SIZE=2" in said and "without torchrun" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([*TRAIN, "--quiet"]) == 0


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.ckpt"])
@pytest.mark.parametrize("damage", ["folder", "bytes", "empty"])
def test_a_run_folder_with_an_odd_file_is_refused(
    name: str, damage: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TRAIN, "--output-dir", str(tmp_path), "--quiet"]
    assert main(arguments) == 0
    path = tmp_path / name
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\0" if damage == "bytes" else b"")
    code = main([*arguments, "--resume"])
    said = capsys.readouterr().err
    assert code == (0 if (name, damage) == ("metrics.jsonl", "empty") else 1), said
    assert said.count("\n") == code and "Unexpected" not in said
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("field", ["progress", "record", "random_state"])
@pytest.mark.parametrize("value", [None, "[]", "{", [1], '{"epoch": -1}', torch.zeros(3)])
def test_a_checkpoint_of_no_run_is_not_resumed(
    field: str, value: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.train_run(_config(tmp_path))
    extra = runs.read_extra(tmp_path / "checkpoint.ckpt")
    monkeypatch.setattr(runs, "read_extra", lambda path: {**extra, field: value})
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="'extra' is not of a training run"):
        runs.train_run(_config(tmp_path, resume=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_metrics_on_a_full_disk_stay_whole_lines(tmp_path: pathlib.Path) -> None:
    resource = pytest.importorskip("resource")
    folder = RunFolder(str(tmp_path))
    with folder.taken({}, resume=False):
        folder.begin({"a": 1}, 0)
        folder.append({"epoch": 1})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(CheckpointError, match="cannot write the metrics: File too large"):
                folder.append({"long": "x" * 500})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, kept)
        assert (tmp_path / "metrics.jsonl").read_text() == json.dumps({"epoch": 1}) + "\n"


def _refused(folder: pathlib.Path, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    before = {path: path.read_bytes() for path in folder.glob("*")}
    assert main([*TRAIN, "--output-dir", str(folder), "--quiet", *options]) == 1
    assert {path: path.read_bytes() for path in folder.glob("*")} == before
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", "x"),
        ("config.json", ""),
        ("config.json", '{"model": "bert"}'),
        ("checkpoint.ckpt", "x"),
    ],
)
def test_a_folder_without_a_run_is_refused_with_and_without_resume(
    name: str, text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither sends to the other, which would refuse it as well."""
    (tmp_path / name).write_text(text)
    began = _refused(tmp_path, capsys=capsys)
    assert "not empty" in began and "no run" in began and "--resume" not in began
    resumed = _refused(tmp_path, "--resume", capsys=capsys)
    assert "no run to resume" in resumed and "leave --resume out" not in resumed
    assert "another, without --resume" in resumed


@pytest.mark.parametrize("there", [True, False])
def test_what_is_said_of_a_free_folder_can_be_done(
    there: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    assert "leave --resume out to begin one" in _refused(folder, "--resume", capsys=capsys)
    assert folder.exists() == there
    assert main([*TRAIN, "--output-dir", str(folder), "--quiet"]) == 0
    assert "continue the run in it with --resume" in _refused(folder, capsys=capsys)
    assert main([*TRAIN, "--output-dir", str(folder), "--quiet", "--resume"]) == 0
