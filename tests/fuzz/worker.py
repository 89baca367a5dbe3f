"""A process that checks the cases it reads, a line of JSON each, and answers in kind.

It warms up once and forks a child that does the work, and another when that dies: its own threads
were never started, so a fork is safe.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from typing import Any, TextIO

warnings.simplefilter("ignore")


def main() -> None:
    """Read {"kind", "case"} from stdin, write {"problems", "seconds"} where stdout was."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed is no answer
    from swatfx import kernels
    from tests.fuzz.kinds import KINDS

    for kind in KINDS.values():  # first calls import and build much
        kind.check(kind.read(kind.warm.to_json()))
    answers.write(json.dumps({"ready": kernels.instruction_set()}) + "\n")
    while True:
        child = os.fork()
        if not child:
            _serve(KINDS, answers)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        answers.write(json.dumps({"died": code}) + "\n")


def _serve(kinds: dict[str, Any], answers: TextIO) -> None:
    # Line by line and unbuffered: a case that kills this process shall be the last that it read.
    with os.fdopen(os.dup(0), "rb", buffering=0) as requests:
        while line := requests.readline():
            asked = json.loads(line)
            start = time.perf_counter()
            problems = _check(kinds[asked["kind"]], asked["case"])
            answer = {"problems": problems, "seconds": time.perf_counter() - start}
            answers.write(json.dumps(answer) + "\n")


def _check(kind: Any, case: dict[str, Any]) -> list[str]:
    try:
        problems: list[str] = kind.check(kind.read(case))
        return problems
    except Exception as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        at = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else ""
        return [f"harness: {type(error).__name__}: {str(error)[:200]} at {at}"]


if __name__ == "__main__":
    main()
