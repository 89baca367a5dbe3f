"""The file of a checkpoint: a zip of torch.save that ends with a checksum of all its bytes.

The checksum is SHA-256, in the zip's comment, so that torch.load reads the file as any other. Files
of version 1 have none: of them the CRC of every record is checked, which torch.load does not do.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from swatfx.errors import CheckpointError

_MAGIC = b"swatfx-sha256:"
_HEX = 64  # characters of the digest
_END = b"PK\x05\x06"  # a zip's last record: 22 bytes, the last two the length of the comment
_END_SIZE = 22
_CHUNK = 1 << 20


class _Stream:
    """What torch.save writes into: passes bytes on, and keeps back the zip's last record.

    It raises nothing: an exception in the middle of torch's writer can end the process. The first
    failure is kept in `error`, and nothing is written after it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.error: Exception | None = None
        self._file = file
        self._digest = hashlib.sha256()
        self._held = b""

    def write(self, data: bytes | memoryview) -> int:
        """Take `data`; return its length whether or not it could be written."""
        if len(data) >= _END_SIZE:
            self._put(self._held)
            self._put(data[:-_END_SIZE])
            self._held = bytes(data[-_END_SIZE:])
        else:
            joined = self._held + bytes(data)
            self._put(joined[:-_END_SIZE])
            self._held = joined[-_END_SIZE:]
        return len(data)

    def flush(self) -> None:
        """Nothing: `finish` does."""

    def finish(self) -> None:
        """Write what was kept back, with the checksum; raise the first failure there was."""
        if self.error is None and not self._held.startswith(_END):
            self.error = RuntimeError("torch.save wrote no zip file")
        length = (len(_MAGIC) + _HEX).to_bytes(2, "little")
        self._put(self._held[:-2] + length + _MAGIC)
        self._put(self._digest.hexdigest().encode())
        if self.error is not None:
            raise self.error
        self._file.flush()

    def _put(self, data: bytes | memoryview) -> None:
        if self.error is not None:
            return
        try:
            self._file.write(data)
            self._digest.update(data)
        except Exception as error:
            self.error = error


def write_file(content: dict[str, Any], path: Path) -> None:
    """Write `content` and its checksum; raises OSError or RuntimeError."""
    with path.open("wb") as file:
        stream = _Stream(file)
        torch.save(content, stream)  # type: ignore[arg-type]
        stream.finish()


def read_file(path: Path) -> tuple[Any, bool]:
    """What `write_file` was given, on the CPU, and whether a checksum vouches for it.

    Raises:
        CheckpointError: no such file, or one that is unreadable, cut short, damaged or no
            checkpoint.
    """
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "no such checkpoint"
        raise CheckpointError(what, value=str(path), remedy=_remedy(path))
    try:
        with path.open("rb") as file:
            checked = _has_checksum(file, path)
            source: BinaryIO = file if checked else _checked_copy(file)
            source.seek(0)
            return torch.load(source, map_location="cpu", weights_only=True), checked
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint: {error.strerror or error}", value=str(path)
        ) from error
    except Exception as error:  # torch.load raises whatever unzipping and unpickling raise
        raise CheckpointError(
            f"the file is cut short, or no checkpoint ({type(error).__name__})",
            value=str(path),
            remedy="use the checkpoint before it",
        ) from error


def _remedy(path: Path) -> str:
    """What to give instead of `path`, which is no file: a checkpoint in that folder, if any is."""
    folder = path if path.is_dir() else path.parent
    try:
        found = sorted(str(p) for p in folder.glob("*.ckpt") if p.is_file())
    except OSError:  # it may not be looked into
        found = []
    if found:
        return "there " + ("are " if len(found) > 1 else "is ") + ", ".join(found[:3])
    return "give the file that swatfx.save wrote, or checkpoint.ckpt of what swatfx train wrote"


def _has_checksum(file: BinaryIO, path: Path) -> bool:
    """Whether there is a checksum; raises CheckpointError if it is wrong."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _HEX - len(_MAGIC)))
    end = file.read()
    if not end.startswith(_MAGIC):
        return False
    file.seek(0)
    digest, left = hashlib.sha256(), size - _HEX
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    if not hmac.compare_digest(digest.hexdigest().encode(), end[-_HEX:]):
        raise CheckpointError(
            "the file is damaged: its bytes are not those that its checksum is of",
            value=str(path),
            remedy="use the checkpoint before it",
        )
    return True


def _checked_copy(file: BinaryIO) -> BinaryIO:
    """The zip `file` in memory, every record with a right CRC; raises what zipfile does.

    Not the file itself: torch's reader takes other fields of a zip's directory at their word, and
    leaves a tensor as it happens to lie in memory where one of them is damaged.
    """
    copy = io.BytesIO()
    file.seek(0)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as sound:
        for entry in archive.infolist():
            sound.writestr(entry.filename, archive.read(entry))
    return copy
