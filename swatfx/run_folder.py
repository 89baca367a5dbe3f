"""The output folder of a training run: its configuration, its metrics, its checkpoint."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from swatfx.errors import InputError

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.ckpt"


class RunFolder:
    """The output folder of a run: its configuration, its metrics, its checkpoint."""

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        self.checkpoint = self.path / CHECKPOINT

    def check(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Raise `InputError` unless the folder is free, or with ``resume`` holds this very run."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError("the output folder is a file", value=str(self.path))
        if not resume:
            if self.path.exists() and any(self.path.iterdir()):
                raise InputError(
                    "the output folder is not empty",
                    value=str(self.path),
                    remedy="continue the run in it with --resume, or give another --output-dir",
                )
            return
        try:
            before = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"no run to resume: {error}",
                value=str(self.path),
                remedy="check --output-dir, or leave --resume out to begin a run",
            ) from error
        differing = list(_differences(before, identity))
        if differing:
            raise InputError(
                f"the run to resume is another one: {'; '.join(differing)}",
                remedy="give the options it was begun with, or another --output-dir",
            )

    def begin(self, config: Mapping[str, Any], epochs: int) -> None:
        """Write ``config``, and drop metrics of epochs that the checkpoint has not completed."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(CONFIG, json.dumps(config, indent=2) + "\n")
        metrics = self.path / METRICS
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        self._write(METRICS, "".join(line + "\n" for line in lines[:epochs]))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Replace a file in one step."""
        partial = self.path / (name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)


def _differences(before: Any, now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Name each field of `now` that `before` holds otherwise, nested ones with dots."""
    for key, value in now.items():
        old = before.get(key) if isinstance(before, dict) else None
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(old, value, f"{prefix}{key}.")
        elif old != value:
            yield f"{prefix}{key} was {old!r} and is {value!r}"
