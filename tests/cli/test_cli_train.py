"""The command `swatfx train`: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest

from swatfx.cli import commands as cli
from swatfx.runs import run as runs


def _main(*options: str) -> int:
    always = ["train", "--model", "digits/cnn", "--data", "digits", "--policy", "swat-u:0.9"]
    always += ["--device", "cpu", "--threads", "1", "--limit", "64", "--epochs", "1"]
    return cli.main([*always, *options])


def test_the_command_prints_its_result_and_no_progress_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _main() == 0
    printed = capsys.readouterr()
    assert "test accuracy" in printed.out and printed.err == ""
    assert _main("--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert _main("--quiet") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_terminal_gets_a_progress_bar_unless_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert _main() == 0
    assert "1/1" in capsys.readouterr().err
    assert _main("--quiet") == 0
    assert capsys.readouterr().err == ""


def test_the_command_refuses_a_folder_in_use(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "precious").write_text("")
    assert _main("--output-dir", str(tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "not empty" in printed.err and "another" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_the_command_interrupted_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "learning_rate", interrupt)
        assert _main("--output-dir", str(tmp_path / "run")) == 130
    assert "--resume" in capsys.readouterr().err
    assert _main("--output-dir", str(tmp_path / "run"), "--resume") == 0
