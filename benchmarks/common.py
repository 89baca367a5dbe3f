"""What every runner shares: alternating timers, spread, the machine, dated result files.

A runner hands `run` a `Benchmark`. Sides that are compared take turns within one process, and their
ratio is taken round by round, so that a slow minute of the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import options
from swatfx.errors import SwatError
from swatfx.timing.machine import ALLOCATOR, TUNED, machine, today, versions
from swatfx.timing.rounds import (
    Rounds,
    Side,
    Spread,
    alternate,
    fastest,
    ratio,
    spread,
    summary,
    timed,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PATHS = ("--output", "--data", "--partial")  # options whose value names a folder

Row = list[Any]
Table = Callable[[Mapping[str, Any]], tuple[list[str], list[Row]]]

__all__ = [
    "Benchmark",
    "RESULTS",
    "ROOT",
    "Rounds",
    "Row",
    "Side",
    "Spread",
    "TUNED",
    "against",
    "alternate",
    "as_markdown",
    "cell",
    "command",
    "fastest",
    "geometric_mean",
    "growth_exponent",
    "machine",
    "progress",
    "ratio",
    "render",
    "run",
    "spread",
    "summary",
    "timed",
    "today",
    "versions",
    "with_spread",
    "worker_environment",
    "write_result",
]


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive values."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def against(wanted: float, measured: float) -> dict[str, Any]:
    """A measured ratio, of which more is better, beside the one that is wanted."""
    return {"wanted": wanted, "measured": measured, "met": measured >= wanted}


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size): 1 is linear."""
    xs, ys = [math.log(n) for n in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(xs, ys).slope


def command(name: str, argv: Sequence[str]) -> str:
    """The command line of a run, without the folders of its files."""
    words = ["python", "-m", f"benchmarks.{name}"]
    for index, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if index > 0 and argv[index - 1] in _PATHS:
            word = pathlib.PurePath(word).name
        elif equals and option in _PATHS:
            word = f"{option}={pathlib.PurePath(value).name}"
        words.append(word)
    return shlex.join(words)


def write_result(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Write `result` as JSON; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Benchmark:
    """One runner.

    Attributes:
        name: of its module and its result files.
        description: one line, for --help and the result file.
        add_arguments: adds the runner's own options.
        measure: options -> JSON-able result, under one allocator.
        table: a result of `measure` -> (headers, rows) to print.
        notes: what a reader of the figures has to know.
        allocator: glibc's settings to measure under where the command line does not say.
        further: makes more tables of the same, to print behind it.
        companions: (result, path of its file) -> None; writes more files beside it.
    """

    name: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    table: Table
    notes: tuple[str, ...] = ()
    allocator: str = "both"
    further: tuple[Table, ...] = ()
    companions: Callable[[Mapping[str, Any], pathlib.Path], None] | None = None


def run(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print, and write the dated result file."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(benchmark)
    args = parser.parse_args(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.worker:
            print(json.dumps(benchmark.measure(args)))
            return 0
        return _measured(benchmark, args, given)
    except SwatError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _measured(benchmark: Benchmark, args: argparse.Namespace, given: Sequence[str]) -> int:
    allocator = args.allocator or ("current" if args.quick else benchmark.allocator)
    measured = {}
    for one in ("tuned", "default") if allocator == "both" else (allocator,):
        measured[one] = (
            benchmark.measure(args) if one == "current" else _in_worker(benchmark.name, given, one)
        )
    result = {
        "benchmark": benchmark.name,
        "description": benchmark.description,
        "date": today(),
        "command": command(benchmark.name, given),
        "quick": args.quick,
        "machine": machine(),
        "versions": versions(),
        "notes": list(benchmark.notes),
        "tuned_allocator": f"{ALLOCATOR}={TUNED}",
        "allocators": measured,
    }
    path = args.output
    if path is None and not args.quick:
        path = RESULTS / f"{result['date']}-{benchmark.name}.json"
    if path is not None:
        write_result(result, path)
        if benchmark.companions is not None:
            benchmark.companions(result, path)
    print(json.dumps(result, indent=1) if args.json else render(benchmark, result))
    return 0


def render(benchmark: Benchmark, result: Mapping[str, Any]) -> str:
    """`result` as text."""
    described = {**result["machine"], **result["versions"]}
    lines = [
        f"{benchmark.name}: {benchmark.description}",
        f"{result['date']}  {result['command']}",
        ", ".join(f"{key} {value}" for key, value in described.items() if value is not None),
        *benchmark.notes,
    ]
    for allocator, measured in result["allocators"].items():
        lines += ["", f"allocator: {allocator}"]
        for table in (benchmark.table, *benchmark.further):
            headers, rows = table(measured)
            cells = [[cell(value) for value in row] for row in rows]
            lines += [tabulate(cells, headers, disable_numparse=True), ""]
        lines.pop()
    return "\n".join(lines)


def as_markdown(headers: Sequence[str], rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    cells = [[cell(value) for value in row] for row in rows]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def cell(value: Any) -> str:
    """A table's cell as text."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def with_spread(values: Mapping[str, float]) -> str:
    """A spread as text: median, and minimum to maximum."""
    return f"{values['median']:.3g} [{values['minimum']:.3g}, {values['maximum']:.3g}]"


def progress(total: int, description: str) -> tqdm[Any]:
    """A progress bar on standard error, where that is a terminal."""
    return tqdm(total=total, desc=description, disable=None, leave=False)


def worker_environment(allocator: str) -> dict[str, str]:
    """The environment of a process that runs under `allocator`: "tuned" or "default"."""
    environment = {k: v for k, v in os.environ.items() if k != ALLOCATOR}
    if allocator == "tuned":
        if platform.libc_ver()[0] != "glibc":
            raise SystemExit("the tuned allocator is glibc's: use --allocator default")
        environment[ALLOCATOR] = TUNED
    return environment


def _in_worker(name: str, argv: Sequence[str], allocator: str) -> dict[str, Any]:
    """`measure` in a process of its own: the allocator reads its settings when it starts."""
    words = [sys.executable, "-m", f"benchmarks.{name}", *argv, "--worker"]
    environment = worker_environment(allocator)
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the measurement under the {allocator} allocator failed, see above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}", description=benchmark.description
    )
    benchmark.add_arguments(parser)
    parser.add_argument("--repeats", type=options.positive, help="rounds that are recorded")
    parser.add_argument("--threads", type=options.threads, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the runner out")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--output",
        type=options.output,
        metavar="FILE",
        help=f"result file (default: benchmarks/results/DATE-{benchmark.name}.json; no file with"
        " --quick)",
    )
    parser.add_argument(
        "--allocator",
        choices=("both", "tuned", "default", "current"),
        help="glibc's settings, each in a process of its own, or as they are in this process"
        f" (default: {benchmark.allocator}, with --quick current)",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser
