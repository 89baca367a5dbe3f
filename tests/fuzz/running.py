"""Many cases over worker processes, which a case may kill."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.fuzz.kinds import KINDS
from tests.nets.places import ROOT

PATIENCE_SECONDS = 300.0


class Worker:
    """One process; a new one takes its place when it dies.

    Args:
        environment: what is set for it besides ours.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {"OMP_NUM_THREADS": "1", **environment}
        self.process: subprocess.Popen[str] | None = None
        self.instruction_set = ""

    def check(self, kind: str, case: Any) -> list[str]:
        """What is wrong with `case`: an answer that does not come is wrong, too."""
        process = self.process or self._start()
        assert process.stdin is not None
        said = self._said.seek(0, os.SEEK_END)
        process.stdin.write(json.dumps({"kind": kind, "case": case.to_json()}) + "\n")
        process.stdin.flush()
        answer = self._read()
        if answer is None:
            self.close()
            return [f"no answer within {PATIENCE_SECONDS:g} s"]
        if "died" in answer:
            return [f"died with exit code {answer['died']}{self._last_words(said)}"]
        problems: list[str] = answer["problems"]
        return problems

    def close(self) -> None:
        """End the process and its child."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None
            self._said.close()

    def _start(self) -> subprocess.Popen[str]:
        self._said = tempfile.TemporaryFile("w+")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.environment},
        )
        ready = self._read()
        if ready is None:
            said = self._last_words(0)
            self.close()
            raise RuntimeError(f"a worker does not start{said}")
        self.instruction_set = ready["ready"]
        return self.process

    def _read(self) -> dict[str, Any] | None:
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE_SECONDS)[0]:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def _last_words(self, since: int) -> str:
        self._said.seek(since)
        lines = self._said.read().splitlines()
        reports = [line for line in lines if "Sanitizer" in line or "runtime error" in line]
        last = (reports or lines[-1:] or [""])[0].strip()
        return f": {last[:200]}" if last else ""


@dataclass(frozen=True)
class Failure:
    """A case that fails.

    Attributes:
        kind: in `kinds.KINDS`.
        number: of the case in its run.
        case: as drawn.
        problems: what is wrong.
    """

    kind: str
    number: int
    case: Any
    problems: list[str]


def run(
    todo: list[tuple[str, int]],
    seed: int,
    jobs: int,
    environment: dict[str, str],
    done: Callable[[str], None],
) -> list[Failure]:
    """Check case after case over `jobs` workers; the failures, in order.

    Args:
        todo: (kind, number) of the cases.
        seed: of the run.
        jobs: processes.
        environment: of theirs.
        done: called with every case's kind.
    """
    failures: list[Failure] = []
    errors: list[BaseException] = []
    lock = threading.Lock()
    queue: Iterator[tuple[str, int]] = iter(todo)

    def serve() -> None:
        worker = Worker(environment)
        try:
            while not errors:
                with lock:
                    item = next(queue, None)
                if item is None:
                    return
                kind, number = item
                case = KINDS[kind].draw(seed, number)
                problems = worker.check(kind, case)
                with lock:
                    if problems:
                        failures.append(Failure(kind, number, case, problems))
                    done(kind)
        except BaseException as error:
            errors.append(error)
        finally:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sorted(failures, key=lambda f: (f.kind, f.number))
