"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from swatfx.errors import CheckpointError, InputError
from swatfx.files.locks import release, try_lock


def as_path(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """`path`, known to be able to name a file.

    Raises:
        InputError: it is no path, is empty, or holds a character that no path can.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{argument} wants a path: a str or os.PathLike", value=path)
    text = os.fspath(path)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        remedy = "is a shell variable unset?" if not text else None
        raise InputError(f"{argument} names no file", value=text, remedy=remedy)
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise InputError(f"{argument} is no name in this system's encoding", value=text) from error
    return Path(text)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there.

    What is there and no file (/dev/stdout, a named pipe) is written to, not replaced. What an
    earlier process left when it was killed while it wrote `path` is removed.

    Raises:
        InputError: `path` cannot name a file.
        CheckpointError: the disk is full, the folder is not there or read-only, or `path` is a
            folder; what `path` held is untouched.
    """
    given = as_path(path)
    temporary: Path | None = None
    lock: int | None = None
    try:
        if given.is_dir():
            raise IsADirectoryError("it is a folder")
        if given.exists() and not given.is_file():
            write(given)
            return
        target = given.resolve()  # a symbolic link goes on to point where it did
        _remove_leftovers(target)
        temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
        # Not tempfile's: what that makes, nobody but the owner may read.
        lock = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try_lock(lock)
        write(temporary)
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as RuntimeError.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"cannot write the file: {(reason.splitlines() or [''])[0]}",
            value=str(path),
            remedy=_remedy(error),
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if lock is not None:
            release(lock)


def _remedy(error: OSError | RuntimeError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "make the folder first, or choose another"
    return "free some space or choose another folder; the old file, if any, is untouched"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; raises what `write_atomically` raises."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def leftovers(target: Path) -> Iterator[Path]:
    """Temporary files of writers of `target`, those that still write included."""
    name = re.compile(rf"\.{re.escape(target.stem)}\.[0-9a-f]{{12}}{re.escape(target.suffix)}")
    try:
        found = [entry for entry in os.scandir(target.parent) if name.fullmatch(entry.name)]
    except OSError:
        return
    yield from (Path(entry.path) for entry in found if entry.is_file(follow_symlinks=False))


def _remove_leftovers(target: Path) -> None:
    """Remove those that nobody writes any more: a writer holds a lock on its file."""
    for path in leftovers(target):
        try:
            descriptor = os.open(path, os.O_WRONLY)
        except OSError:
            continue
        try:
            if try_lock(descriptor):
                path.unlink(missing_ok=True)
        except OSError:
            continue  # of another user: theirs to remove
        finally:
            release(descriptor)
