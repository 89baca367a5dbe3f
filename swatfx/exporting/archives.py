"""What the files of exports share: the packages that they want, and archives of programs."""

from __future__ import annotations

import importlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from swatfx.errors import ExportError
from swatfx.files.atomic import write_atomically


def need(package: str, extra: str) -> Any:
    """The module of an optional package.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"the package {package!r} is not installed", remedy=f"pip install swatfx[{extra}]"
        ) from error


def save_program(program: torch.export.ExportedProgram, path: Path, *, small: bool = False) -> None:
    """Write a program as torch.export does; `small`: without example inputs, and compressed, as the
    text of a graph is many times larger than it has to be.
    """
    # By way of memory: torch's own writer ends the process where the disk is full.
    buffer = io.BytesIO()
    if small:
        program._example_inputs = None
    torch.export.save(program, buffer)
    if small:
        buffer = _deflated(buffer)

    def write(temporary: Path) -> None:
        temporary.write_bytes(buffer.getbuffer())

    write_atomically(path, write)


def _deflated(archive: io.BytesIO) -> io.BytesIO:
    """The same ZIP archive, its entries compressed: torch reads them likewise."""
    out = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out
