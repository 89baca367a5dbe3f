"""Where constants are kept: a file in the user's cache, and those that swatfx comes with.

The file is `swatfx/kernel_times.json` in `$XDG_CACHE_HOME`, or else in `~/.cache`. It holds
constants of several machines (one home directory serves many), by processor, library and threads.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from swatfx import kernels
from swatfx.errors import InputError, SwatWarning
from swatfx.files.atomic import write_text
from swatfx.forecast.constants import Constants

FORMAT = 1
# A tile of AMX makes 512 products a cycle, the processors of the defaults 32 or 64; what a whole
# layer makes of it is less. Not measured: sparse kernels are not to lose to it unawares.
MATRIX_UNIT = 8
_SHIPPED = Path(__file__).with_name("defaults.json")


def path() -> Path:
    """Of the user's file, which need not be there.

    Raises:
        InputError: there is neither $XDG_CACHE_HOME nor a home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given and os.path.isabs(given):  # others are to be ignored, by the XDG specification
        return Path(given) / "swatfx" / "kernel_times.json"
    try:
        return Path.home() / ".cache" / "swatfx" / "kernel_times.json"
    except RuntimeError as error:
        raise InputError(
            "there is no folder for the constants", remedy="set XDG_CACHE_HOME"
        ) from error


class Machine(NamedTuple):
    """What constants hold for: the processor's name, the kernels' library, threads."""

    processor: str
    kernels: str
    threads: int


def this_machine() -> Machine:
    """As it is set now."""
    return Machine(processor(), kernels.instruction_set(), torch.get_num_threads())


@functools.cache
def processor() -> str:
    """Its name, as the system has it, and its family: virtual machines call many "AMD EPYC"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name, family = (re.search(rf"{key}\s*:\s*(.+)", text) for key in ("model name", "cpu family"))
    if name is None:
        return platform.processor()
    return name[1].strip() + (f", family {family[1].strip()}" if family else "")


def read(machine: Machine) -> tuple[Constants, str]:
    """(constants for a machine, where they are from).

    Those measured with as many threads, or else with the nearest number, or else the defaults. A
    file that is damaged, or of another version, is passed over with one warning a process.
    """
    try:
        file = path()
        changed = file.stat().st_mtime_ns
    except (InputError, OSError):  # nobody fitted anything
        return shipped(machine.kernels, machine.processor)
    found = [
        (abs(known.threads - machine.threads), known.threads, constants)
        for known, constants in _of_file(file, changed).items()
        if known[:2] == machine[:2]
    ]
    if not found:
        return shipped(machine.kernels, machine.processor)
    _, threads, constants = min(found, key=lambda each: each[:2])
    return constants, f"measured here, {constants.date}, threads: {threads}"


def made_path() -> Path:
    """`path`, in a folder that is there and can be written: worth asking before one measures.

    Raises:
        InputError: there is no such folder.
    """
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            f"no folder for the constants: {error.strerror}",
            value=str(file.parent),
            remedy="set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return file


def write(constants: Constants) -> Path:
    """Add constants to the user's file, in place of those of the same machine; its path.

    Raises:
        InputError, CheckpointError: there is no such folder, or it cannot be written.
    """
    file = made_path()
    found = _of_file(file, file.stat().st_mtime_ns) if file.exists() else {}
    own = _machine_of(constants)
    machines = [c.to_json() for c in {**found, own: constants}.values()]
    write_text(file, json.dumps({"format": FORMAT, "machines": machines}, indent=1) + "\n")
    return file


@functools.cache
def shipped(library: str, name: str = "") -> tuple[Constants, str]:
    """(constants that swatfx comes with, told so): those of the `library` on the processor of that
    `name` (as `processor` has it), or else on another, or else of another library.
    """
    found = _parsed(_SHIPPED.read_text(encoding="utf-8"))
    fitting = [constants for constants in found if constants.kernels == library] or found
    best = next((constants for constants in fitting if constants.processor == name), fitting[0])
    where = f"{best.processor}, {best.date}"
    if has_matrix_unit():
        best = best.with_dense_products(MATRIX_UNIT)
        where += f"; its matrix unit taken for {MATRIX_UNIT} times as fast at dense bf16 products"
    return best, f"defaults ({where}; swatfx bench --fit measures this machine)"


@functools.cache
def has_matrix_unit() -> bool:
    """Whether torch multiplies bf16 matrices by AMX tiles here."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch has no public question
    return bool(asked and asked())


@functools.lru_cache(maxsize=4)
def _of_file(file: Path, changed: int) -> dict[Machine, Constants]:
    """By machine; empty, with a warning, where the file is no such file."""
    try:
        found = _parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"{file} holds no constants of kernels that this version reads, and is passed over:"
            f" {(str(error).splitlines() or [type(error).__name__])[0]}. Write it anew: swatfx"
            " bench --fit",
            SwatWarning,
            stacklevel=2,
        )
        return {}
    return {_machine_of(c): c for c in found}


def _parsed(text: str) -> list[Constants]:
    data: Any = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("machines"), list):
        raise ValueError("it is no file of constants")
    if data.get("format") != FORMAT:
        raise ValueError(f"its format is {data.get('format')!r}, not {FORMAT}")
    return [Constants.from_json(each) for each in data["machines"]]


def _machine_of(constants: Constants) -> Machine:
    return Machine(constants.processor, constants.kernels, constants.threads)
