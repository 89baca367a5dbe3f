"""Random layers, networks and programs, compiled by swatfx, against formulas in float64.

python -m tests.fuzz --layers 10000 --networks 2000 --programs 4000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from typing import Any

from tests.fuzz import libraries
from tests.fuzz.kinds import KINDS
from tests.fuzz.running import Failure, Worker, run
from tests.fuzz.shrinking import shrink, symptom


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if anything is wrong."""
    options = _parser().parse_args(arguments)
    names = libraries.here() if options.isa == "all" else [options.isa]
    results = [_run_on(name, options) for name in names]
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    return int(any(result["failures"] for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--layers", type=int, default=0, help="how many random layers")
    parser.add_argument("--networks", type=int, default=0, help="how many random networks")
    parser.add_argument("--programs", type=int, default=0, help="how many random programs")
    parser.add_argument("--seed", type=int, default=0, help="case i depends on (seed, i) alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--isa", choices=[*libraries.ALL, "auto", "all"], default="auto")
    parser.add_argument("--sanitize", action="store_true", help="kernels under gcc's sanitizers")
    parser.add_argument("--shrink", type=int, default=3, help="failures a symptom to make small")
    parser.add_argument("--json", metavar="FILE", help="write what was found there")
    return parser


def _run_on(name: str, options: argparse.Namespace) -> dict[str, Any]:
    first = options.first
    todo = [("layer", first + i) for i in range(options.layers)]
    todo += [("network", first + i) for i in range(options.networks)]
    todo += [("program", first + i) for i in range(options.programs)]
    with libraries.environment(name, options.sanitize) as environment:
        start = time.perf_counter()
        progress = _Progress(len(todo))
        failures = run(todo, options.seed, options.jobs, environment, progress)
        seconds = time.perf_counter() - start
        progress.close()
        said = f"{options.layers} layers, {options.networks} networks"
        said += f" and {options.programs} programs on {name}"
        said += " under sanitizers" if options.sanitize else ""
        print(f"{said}, seed {options.seed}: {len(failures)} wrong ({seconds:.0f} s)", flush=True)
        found = _explain(failures, options, environment)
    return {
        "kernels": name,
        "sanitized": options.sanitize,
        "layers": options.layers,
        "networks": options.networks,
        "programs": options.programs,
        "first": first,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "failures": found,
    }


def _explain(
    failures: list[Failure], options: argparse.Namespace, environment: dict[str, str]
) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[Failure]] = collections.defaultdict(list)
    for failure in failures:
        groups[failure.kind, symptom(failure.problems)].append(failure)
    worker = Worker(environment)
    found = []
    for (kind, said), members in sorted(groups.items(), key=lambda g: -len(g[1])):
        print(f"\n{len(members)} x {kind}: {said}")
        for failure in members[options.shrink :]:
            print(f"  {failure.number}: {'; '.join(failure.problems)[:150]}")
        for failure in members[: options.shrink]:

            def check(case: Any, kind: str = kind) -> list[str]:
                return worker.check(kind, case)

            small = shrink(failure.case, said, KINDS[kind].smaller, check)
            print(_script(kind, failure, small, check(small)), flush=True)
            found.append({"number": failure.number, "kind": kind, "small": str(small)})
        for failure in members[options.shrink :]:
            found.append({"number": failure.number, "kind": kind, "case": str(failure.case)})
        for entry, failure in zip(found[-len(members) :], members, strict=True):
            entry["problems"] = failure.problems
    worker.close()
    return found


def _script(kind: str, failure: Failure, case: Any, problems: list[str]) -> str:
    heading = f"# {kind} {failure.number}: {'; '.join(problems or failure.problems)}"
    return f"{heading}\n{KINDS[kind].source}\nprint(*check({case}), sep='\\n')\n"


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="case", disable=not sys.stderr.isatty())

    def __call__(self, kind: str) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


if __name__ == "__main__":
    raise SystemExit(main())
