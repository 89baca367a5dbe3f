"""Assertions and `if ...: raise` while tracing: the branch that raises is not taken but checked.

A branch on a traced value cannot be followed, but where one side of it only raises, the other is
the model. The condition stays in the graph as a check.
"""

from __future__ import annotations

import builtins
import dis
import os
from types import CodeType, FrameType
from typing import NamedTuple

_JUMPS = {"POP_JUMP_IF_TRUE": True, "POP_JUMP_IF_FALSE": False}
_TESTS = ("COMPARE_OP", "CONTAINS_OP", "TO_BOOL")  # from Python 3.12 on they ask for the bool
_SKIPPED = ("NOT_TAKEN", "EXTENDED_ARG", "NOP")


class Guard(NamedTuple):
    """The outcome of a condition that leads to an error, which error, and where it stands."""

    outcome: bool
    error: str
    where: str


def refuse(condition: object, outcome: bool, error: str, where: str) -> None:
    """Raise the builtin exception named `error` if `condition` has this outcome."""
    if bool(condition) is outcome:
        kind: type[Exception] = getattr(builtins, error, ValueError)
        raise kind(f"the model refuses this input ({where})")


def find_guard(frame: FrameType) -> Guard | None:
    """The guard clause whose condition `frame` is asking for, if it is one."""
    code = frame.f_code
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _SKIPPED]
    at = next((n for n, i in enumerate(instructions) if i.offset == frame.f_lasti), None)
    if at is None:
        return None
    if instructions[at].opname in _TESTS:
        at += 1
    while at < len(instructions) and instructions[at].opname == "TO_BOOL":
        at += 1
    jump = instructions[at]
    wanted = _JUMPS.get(jump.opname.replace("FORWARD_", "").replace("BACKWARD_", ""))
    if wanted is None:
        return None
    target = next((n for n, i in enumerate(instructions) if i.offset >= jump.argval), None)
    for start, outcome in ((target, wanted), (at + 1, not wanted)):
        error = None if start is None else _raised(instructions[start:], code)
        if error is not None:
            where = f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
            return Guard(outcome, error, where)
    return None


def _raised(instructions: list[dis.Instruction], code: CodeType) -> str | None:
    """What straight-line code raises, out of its function, if that is how it ends; or None."""
    name = None
    for instruction in instructions:
        if "JUMP" in instruction.opname or instruction.opname.startswith(("RETURN", "YIELD")):
            return None
        if "ASSERTION_ERROR" in instruction.opname or instruction.argval is AssertionError:
            name = name or "AssertionError"
        elif name is None and instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            name = str(instruction.argval)
        elif instruction.opname == "RAISE_VARARGS":
            covered = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
            caught = any(e.start <= instruction.offset < e.end for e in covered)
            return None if caught or name is None else name
    return None
