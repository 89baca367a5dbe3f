"""Every option of every benchmark runner with odd values: a usage error, and no traceback."""

from __future__ import annotations

import argparse
import importlib
import pathlib
from collections.abc import Iterator

import pytest

from benchmarks import common
from benchmarks.reproduce.__main__ import _parser as reproduce_parser
from benchmarks.reproduce.__main__ import main as reproduce
from tests.nets import bad_commands

RUNNERS = [
    *(
        "accuracy",
        "compile_cost",
        "export_sizes",
        "gpu",
        "kernel_choice",
        "layers",
        "memory",
        "patterns",
    ),
    *("simulator", "small", "step", "topk", "tune"),
]
WORDS = ["", " ", "\0", "\udcff", "no such", "a:b:c:d", "swat-u:nan", "cuda:99", "-1", "nan"]
# What is right although it looks odd: whole numbers, rates, and text of which a run is told more.
COUNTS = {"+1", "2147483647"}
RIGHT = {
    "lr": {"1.5", "+1", "2147483647", "99999999999999999999"},
    "threads": {"+1"},
    "layers": {"+1"},
    "limit": COUNTS,
    "workers": {"+1", "0", "-0"},
    "tag": {*bad_commands.NUMBERS, "nan"} - {"1,2", "½", "٣", "+1", " 1 "},
}
TOLD_LATER = {"models", "model", "dataset", "data", "names", "output", "partial", "work"}


def _parsers() -> dict[str, tuple[argparse.ArgumentParser, list[str]]]:
    found = {}
    for name in RUNNERS:
        benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
        found[name] = (common._parser(benchmark), [])
    return found | {"reproduce": (reproduce_parser(), ["table2"])}


def _lines() -> Iterator[tuple[argparse.ArgumentParser, list[str], str, str]]:
    for parser, base in _parsers().values():
        for action in parser._actions:
            if not action.option_strings or action.nargs == 0:
                continue
            for value in [*bad_commands.NUMBERS, *WORDS]:
                yield parser, [*base, f"{action.option_strings[-1]}={value}"], action.dest, value


def test_odd_values_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    tried, wrong = 0, []
    for parser, line, option, value in _lines():
        tried += 1
        try:
            parser.parse_args(line)
        except SystemExit as leave:
            said = capsys.readouterr().err
            if leave.code != 2 or "error: argument" not in said or "Traceback" in said:
                wrong.append(f"{parser.prog} {line!a}: {leave.code}, {said[-200:]}")
        except Exception as error:
            wrong.append(f"{parser.prog} {line!a}: {type(error).__name__}: {error}")
        else:
            right = RIGHT.get(option, COUNTS)
            if value not in right and not (option in TOLD_LATER and value.strip()):
                wrong.append(f"{parser.prog} {line!a} was taken")
    assert tried > 1000 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("runner", "line"),
    [
        ("accuracy", "--dataset=no"),
        ("accuracy", "--dataset=cifar10 --data=nowhere"),
        ("accuracy", "--model=no/such"),
        ("compile_cost", "--models no/such"),
        ("export_sizes", "--models no/such"),
        ("memory", "--model=no/such --weigh=swat"),
        ("step", "--model no/such"),
        ("tune", "--dataset=imagenet"),
        ("tune", "--model=no/such"),
        ("gpu", "--model=no/such --device=cpu"),
    ],
)
def test_what_a_run_finds_is_one_line(
    runner: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = importlib.import_module(f"benchmarks.{runner}").BENCHMARK
    with pytest.raises(SystemExit) as leave:
        common.run(benchmark, [*line.split(), "--quick", "--allocator=current"])
    said = capsys.readouterr().err
    assert leave.value.code == 2 and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"python -m benchmarks.{runner}: ")


@pytest.mark.parametrize(
    "line", ["table2 --dataset=no", "table2 --model=no/such", "nothing", "table2 --data=nowhere"]
)
def test_reproduce_says_it_in_one_line(
    line: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"--work={tmp_path / 'runs'}", f"--output={tmp_path / 'results'}"]
    try:
        code: object = reproduce([*line.split(), "--train", *paths])
    except SystemExit as leave:
        code = leave.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said and "error: " in said.splitlines()[-1]


def test_a_result_that_cannot_be_written_is_seen_beforehand(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("x")
    parser = _parsers()["topk"][0]
    for bad in (tmp_path, tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--output={bad}"])
    for good in (tmp_path / "file", tmp_path / "new" / "deep" / "x.json"):
        assert parser.parse_args([f"--output={good}"]).output == good
