"""The output folder of a training run: its configuration, its metrics, its checkpoint."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from swatfx.errors import CheckpointError, InputError
from swatfx.files.atomic import as_path, leftovers, write_text
from swatfx.files.locks import release, try_lock

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.ckpt"
LOCK = ".lock"


class FolderInUseError(InputError):
    """Another process trains in the output folder."""


class RunFolder:
    """The output folder of a run: its configuration, its metrics, its checkpoint."""

    def __init__(self, path: str) -> None:
        self.path = as_path(path, "the output folder")
        self.checkpoint = self.path / CHECKPOINT

    @contextmanager
    def taken(self, identity: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """Hold the folder for this process, which lets go of it however it ends.

        A folder that was made for a run that then could not begin is removed again.

        Raises:
            InputError: the folder is not free or, with ``resume``, does not hold this very run;
                another process trains in it; it cannot be written to.
        """
        self._check(identity, resume=resume)  # before anything is written into a folder of others
        made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
        except OSError as error:
            _remove(made)
            raise InputError(
                f"cannot write to the output folder: {error.strerror or error}",
                value=str(self.path),
                remedy="give another --output-dir",
            ) from error
        try:
            self._check(identity, resume=resume)
            yield
        finally:
            with suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
            release(lock)
            _remove(made)

    def _lock(self) -> int:
        """The open lock file; raises FolderInUseError where another process holds it."""
        path = self.path / LOCK
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if try_lock(lock) is False:
                owner = os.read(lock, 100).decode("ascii", "replace").strip()
                os.close(lock)
                raise FolderInUseError(
                    f"another process trains in the output folder ({owner or 'unknown'})",
                    value=str(self.path),
                    remedy="wait for it or end it, or give another --output-dir",
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    break
            release(lock)  # its last owner removed it just now
        with suppress(OSError):  # a full disk: only a message would have told who it is
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()}\n".encode())
        return lock

    def _check(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Raise `InputError` unless the folder is free, or with ``resume`` holds this very run."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError("the output folder is a file", value=str(self.path))
        try:
            before = self._begun()
            in_use = self.path.exists() and self._in_use()
        except OSError as error:
            raise InputError(
                f"cannot read the output folder: {error.strerror or error}",
                value=str(self.path),
                remedy="give another --output-dir",
            ) from error
        if not resume:
            if in_use:
                raise self._not_free(before is not None)
            return
        if before is None:
            raise self._no_run(in_use)
        differing = list(_differences(before, identity))
        if differing:
            raise InputError(
                f"the run to resume is another one: {'; '.join(differing)}",
                remedy="give the options it was begun with, or another --output-dir",
            )

    def _not_free(self, begun: bool) -> InputError:
        what, how = "the output folder is not empty", "give another --output-dir"
        if begun:
            how = f"continue the run in it with --resume, or {how}"
        else:
            what += ", and what is in it is no run"
        return InputError(what, value=str(self.path), remedy=how)

    def _no_run(self, in_use: bool) -> InputError:
        why, how = (
            "the output folder is empty or not there",
            "leave --resume out to begin one there",
        )
        if in_use:
            why = f"the output folder holds other files, and no {CONFIG} of a run"
            how = "begin one in another, without --resume"
        return InputError(
            f"no run to resume: {why}",
            value=str(self.path),
            remedy=f"give the --output-dir of a run, or {how}",
        )

    def _begun(self) -> dict[str, Any] | None:
        """The configuration of the run in the folder; None if there is no run in it.

        Other programs' folders have a file of that name, too; those do not tell of a recipe.
        """
        try:
            config = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError, ValueError):
            return None
        return config if isinstance(config, dict) and "recipe" in config else None

    def _in_use(self) -> bool:
        """Whether it holds more than what a process leaves that was killed as it began."""
        ours = {LOCK, *(path.name for path in self._leftovers())}
        return any(path.name not in ours for path in self.path.iterdir())

    def _leftovers(self) -> Iterator[pathlib.Path]:
        for name in (CONFIG, METRICS, CHECKPOINT):
            yield from leftovers(self.path / name)

    def begin(self, config: Mapping[str, Any], epochs: int) -> None:
        """Write ``config``, and drop metrics of epochs that the checkpoint has not completed.

        What processes left that were killed while they wrote is removed.
        """
        for path in self._leftovers():
            with suppress(OSError):
                path.unlink()
        metrics = self.path / METRICS
        try:
            lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the metrics: {error}", value=str(metrics)) from error
        write_text(self.path / CONFIG, json.dumps(config, indent=2) + "\n")
        write_text(metrics, "".join(line + "\n" for line in lines[:epochs]))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        metrics = self.path / METRICS
        size = metrics.stat().st_size if metrics.exists() else 0
        try:
            with metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(metrics, size)
            raise CheckpointError(
                f"cannot write the metrics: {error.strerror or error}",
                value=str(metrics),
                remedy="free some space; --resume goes on from the last checkpoint",
            ) from error


def _remove(folders: list[pathlib.Path]) -> None:
    """Remove folders that are empty, the deepest first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _differences(before: Any, now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Name each field of `now` that `before` holds otherwise, nested ones with dots."""
    for key, value in now.items():
        old = before.get(key) if isinstance(before, dict) else None
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(old, value, f"{prefix}{key}.")
        elif old != value:
            yield f"{prefix}{key} was {old!r} and is {value!r}"
