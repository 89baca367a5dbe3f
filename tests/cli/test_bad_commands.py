"""Every option of every subcommand with every odd value: one line on stderr, never a traceback."""

from __future__ import annotations

import os
import pathlib
import re

import pytest

from swatfx.cli import commands as cli
from swatfx.cli import demo
from tests.nets import bad_commands

# What is right although it looks odd, by option; all else that a command takes is an error of ours.
_COUNT = {"+1", "2147483647"}
TAKEN = {
    "--num-classes": {"+1"},
    "--batch-size": _COUNT,
    "--epochs": _COUNT,
    "--limit": _COUNT,
    "--max-steps": _COUNT,
    "--threads": {"+1"},
    "--period": _COUNT,
    "--rounds": _COUNT,
    "--seconds": {*_COUNT, "1.5", "99999999999999999999"},
    "--seeds": {"+1"},
    "--samples": {"+1"},
    "--word-bytes": {"+1"},
    "--seed": {*_COUNT, "0", "-1"},
    "--sparsity": {"0", "-0.0"},
    "--activation-floor": {"0", "-0.0"},
    "--natural-density": {"+1"},
    "--bandwidth": {*_COUNT, "0", "-0.0", "1.5", "99999999999999999999"},
    "--lr": {"1.5", "+1"},
    "--accelerator": {"scnn:", "SCNN"},
    # Kernels are told for devices that are not here.
    "--device": {"cuda", "cuda:0", "cuda:99", "mps", "xpu", "cpu:7", "meta"},
    # A file may be written anew, read from, or a folder be made.
    "--output": {"file"},
    "--trace": {"file"},
    "--output-dir": {"absent/x", ""},
}
ENDLESS = {
    ("compare --train", "--epochs=2147483647"),
    ("demo", "--epochs=2147483647"),
    ("bench", "--batch-size=2147483647"),
}


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run", lambda *_: None)
    return tmp_path


def _is_right(what: str, folder: pathlib.Path) -> bool:
    option, _, value = what.partition("=")
    value = value.removeprefix(str(folder)).removeprefix("/").removeprefix("dev/")
    return value in TAKEN.get(option, ())


def _try(
    name: str, what: str, line: list[str], folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """What is wrong with how the command line was answered; nothing if all is right."""
    try:
        code: object = cli.main(line)
    except SystemExit as leave:
        code = leave.code
    said = capsys.readouterr()
    if code == 0:
        return "" if name == "demo" or _is_right(what, folder) else "was taken"
    if code not in (1, 2) or said.out:
        return f"exit code {code}, said {said.out[:200]!r}"
    if said.err.count("\n") != 1 or not said.err.startswith("swatfx"):
        return f"said {said.err[:500]!r}"
    return said.err if re.search("Unexpected|Traceback", said.err) else ""


def _wrong(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], every: int
) -> tuple[int, list[str]]:
    wrong, tried = [], 0
    for number, (name, what, line) in enumerate(bad_commands.commands(folder)):
        if number % every or (name, what) in ENDLESS:
            continue
        tried += 1
        if answer := _try(name, what, line, folder, capsys):
            wrong.append(f"{name} {what[:80]!a}: {answer}")
    return tried, wrong


@pytest.mark.parametrize("name", bad_commands.parsers())
def test_the_right_command_line_works(
    name: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(bad_commands.base(name, folder)) == 0


def test_a_sample_of_bad_command_lines(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried, wrong = _wrong(folder, capsys, 17)
    assert tried > 100 and not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_bad_command_line(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried, wrong = _wrong(folder, capsys, 1)
    assert tried > 2000 and not wrong, "\n".join(wrong)


MODULES = {
    "raises": "raise ZeroDivisionError('a\\nb')",
    "leaves": "import sys; sys.exit(3)",
    "broken": "def build(:",
    "nothing": "def build(): return None",
    "forgets": "def build(num_classes): return undefined",
    "interrupted": "def build(num_classes=1): raise SystemExit('no')",
    "refuses": "def build(num_classes=1): raise RuntimeError('no such width')",
    "hides": "class build:\n def __call__(self): pass\n __init__ = None",
    "identity": "from torch import nn\ndef build(num_classes=1): return nn.Identity()",
    "wide": "from torch.nn import *\ndef build(): return Sequential(Flatten(), Linear(9, 9))",
    "lazy": "from torch.nn import *\ndef build(): return Sequential(Flatten(), LazyLinear(9))",
    "throws": (
        "from torch import nn\nclass build(nn.Module):\n def __init__(self):\n"
        "  super().__init__(); self.a = nn.Linear(8, 8); self.b = nn.Linear(8, 8)\n"
        " def forward(self, x): raise KeyError('deep\\nin it')"
    ),
    "tuple": (
        "from torch import nn\nclass build(nn.Module):\n def __init__(self):\n"
        "  super().__init__(); self.a = nn.Linear(8, 8); self.b = nn.Linear(8, 8)\n"
        " def forward(self, x): return [self.b(self.a(x))]"
    ),
}
COMMANDS = {
    "report": ["report", "{}", "--input-shape", "1,8,8"],
    "bench": [
        *("bench", "{}", "--input-shape", "1,8,8", "--batch-size", "2", "--dtype", "fp32"),
        *("--rounds", "1", "--seconds", "0.001"),
    ],
    "export": ["export", "{}", "--input-shape", "1,8,8", "--output", "a.pt2"],
    "compare": ["compare", "{}", "--policies", "swat-u:0.5", "--input-shape", "1,8,8"],
    "simulate": ["simulate", "{}", "--input-shape", "1,8,8", "--accelerator", "ideal"],
    "train": [
        *("train", "--model", "{}", "--data", "fake/1x8x8/3", "--policy", "swat-u:0.5"),
        *("--epochs", "1", "--limit", "8", "--batch-size", "4", "--device", "cpu", "--quiet"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("module", [*MODULES, "latin", "null"])
def test_modules_of_the_user_that_go_wrong(
    command: str,
    module: str,
    folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    name = f"odd_{module}_{command}"
    text = MODULES.get(module, "").encode()
    text = {"latin": b"build = '\xe9'", "null": b"build = 1\0"}.get(module, text)
    (folder / f"{name}.py").write_bytes(text)
    line = [word.format(f"{name}:build") for word in COMMANDS[command]]
    answer = _try(command, "", line, folder, capsys)
    may = {"tuple": "report bench export compare simulate", "throws": "", "identity": ""}
    if answer == "was taken":
        assert command in may.get(module, "").split()
    else:
        assert not answer
    assert not (folder / "a.pt2").exists() or module == "tuple"
    assert not [path for path in os.listdir(folder) if path.startswith(".")]
