"""Runs a grid of jobs once: what is finished is read from its folder, the rest trained or resumed.

A job's folder is named after all that decides its result, so that figures share runs. It holds what
`swatfx.runs.train_run` writes, the recording where one is asked for, and, at the end, `done.json`;
the checkpoint is deleted then. Commands that run side by side share the work: each leaves a job
that another is training for later, and finds it finished then.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import common
from benchmarks.reproduce.jobs import Job
from benchmarks.reproduce.recording import Recorded, read, recording
from swatfx.datasets import open_data
from swatfx.errors import SwatError
from swatfx.runs import CHECKPOINT, CONFIG, METRICS, train_run

try:
    import fcntl
except ImportError:  # not on Windows: there, side by side, a job may be trained twice
    fcntl = None  # type: ignore[assignment]

DONE = "done.json"
_TRIED_BATCHES = 4
_DIVERGED = ("the loss is", "Top-K met NaN")  # in the messages of what training raises then


@dataclass(frozen=True)
class Run:
    """What one job gave.

    Attributes:
        job: which.
        accuracies: fraction of test images classified rightly, an epoch each. Epochs after it
            had diverged count as guessing.
        losses: mean training loss of each epoch that has one.
        weight_density: of the weights that take part, in the last batch; None where none does.
        activation_density: likewise, the mean over layers.
        diverged: whether the loss or a weight left the finite numbers.
        steps: optimizer steps up to the last whole epoch.
        seconds: training and testing.
        date: when it ended.
        machine: what it ran on.
        recorded: the steps that were recorded.
    """

    job: Job
    accuracies: tuple[float, ...]
    losses: tuple[float, ...] = ()
    weight_density: float | None = None
    activation_density: float | None = None
    diverged: bool = False
    steps: int = 0
    seconds: float = 0.0
    date: str = ""
    machine: str = ""
    recorded: tuple[Recorded, ...] = field(default=(), repr=False)

    @property
    def accuracy(self) -> float:
        """After the last epoch."""
        return self.accuracies[-1]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict, without what was recorded."""
        return {
            **self.job.identity(),
            "accuracy": self.accuracy,
            "accuracies": list(self.accuracies),
            "losses": list(self.losses),
            "weight_density": self.weight_density,
            "activation_density": self.activation_density,
            "diverged": self.diverged,
            "steps": self.steps,
            "seconds": self.seconds,
            "date": self.date,
            "machine": self.machine,
        }


class Runner:
    """Runs jobs in folders below `work`.

    `circumstances` are fields of `RunConfig` that a result does not depend on: data_root, device,
    workers.
    """

    def __init__(self, work: pathlib.Path, **circumstances: Any) -> None:
        self.work, self.circumstances = work, circumstances

    def finished(self, job: Job) -> Run | None:
        """The run of `job` if it has ended, and was recorded as the job asks."""
        folder = self.work / job.folder
        path = folder / DONE
        if not path.exists() or (job.every and not _notes(folder, job).exists()):
            return None
        done = json.loads(path.read_text(encoding="utf-8"))
        metrics = folder / "run" / METRICS
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        epochs = [json.loads(line) for line in lines]
        last = epochs[-1] if epochs else {}
        guessed = [done["guessing"]] * (job.epochs - len(epochs))
        return Run(
            job,
            tuple([epoch["test_accuracy"] for epoch in epochs] + guessed),
            tuple(epoch["train_loss"] for epoch in epochs),
            last.get("weight_density", {}).get("mean"),
            last.get("activation_density", {}).get("mean"),
            done["diverged"],
            last.get("step", 0),
            sum(epoch["seconds"] for epoch in epochs),
            done["date"],
            done["machine"],
            tuple(read(_notes(folder, job))),
        )

    def run(self, job: Job) -> Run:
        """The run of `job`, trained now unless it has been.

        Raises:
            SwatError: the configuration does not hold together.
        """
        with self._claimed(job):
            run = self.finished(job)
            if run is None:
                self._train(job)
                run = self.finished(job)
                assert run is not None
        return run

    @contextlib.contextmanager
    def _claimed(self, job: Job) -> Iterator[None]:
        """Hold `job` against other processes; waits for the one that holds it.

        The lock goes with the process, however it ends. Its file stays: who deleted it could
        delete another's.
        """
        with self._lock_file(job).open("w") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _taken(self, job: Job) -> bool:
        """Whether another process is training `job`."""
        if fcntl is None:
            return False
        with self._lock_file(job).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _lock_file(self, job: Job) -> pathlib.Path:
        self.work.mkdir(parents=True, exist_ok=True)
        return self.work / f"{job.folder}.lock"

    def _train(self, job: Job) -> None:
        folder = self.work / job.folder
        if job.every and not _notes(folder, job).exists():
            shutil.rmtree(folder, ignore_errors=True)  # begun, or ended, without being recorded
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "run"
        config = job.config(str(output), resume=(output / CONFIG).exists(), **self.circumstances)
        watch = recording(_notes(folder, job), job.every) if job.every else contextlib.nullcontext()
        guessing = None
        try:
            with watch:
                train_run(config)
        except SwatError as error:
            if not _diverged(error):
                raise
            data = open_data(config.data, config.data_root, limit=config.limit)
            guessing = 1 / data.num_classes
        done = {
            **job.identity(),
            "diverged": guessing is not None,
            "guessing": guessing,
            "date": common.today(),
            "machine": _machine(config.device),
        }
        common.write_result(done, folder / DONE)
        (output / CHECKPOINT).unlink(missing_ok=True)

    def run_all(self, jobs: Sequence[Job]) -> dict[Job, Run]:
        """All of them, with a line on standard error for each that had to be trained."""
        runs = {job: run for job in jobs if (run := self.finished(job)) is not None}
        waiting = deque(job for job in dict.fromkeys(jobs) if job not in runs)
        count = len(waiting)
        started = time.perf_counter()
        while waiting:
            while self._taken(waiting[0]) and not all(map(self._taken, waiting)):
                waiting.rotate(-1)
            job = waiting.popleft()
            run = runs[job] = self.run(job)
            spent = time.perf_counter() - started
            left = spent / (count - len(waiting)) * len(waiting)
            print(
                f"[{count - len(waiting)}/{count}] {job}: {run.accuracy:.2%} in"
                f" {run.seconds:.0f} s, {minutes(left)} left",
                file=sys.stderr,
                flush=True,
            )
        return runs

    def estimate(self, jobs: Sequence[Job]) -> float | None:
        """Seconds that those not finished will take; None where no subset can be tried.

        Each policy is trained for a few batches, and tested on a fifth as many images.
        """
        waiting = [job for job in dict.fromkeys(jobs) if self.finished(job) is None]
        if any(job.network.data == "imagenet" for job in waiting):
            return None
        seconds: dict[Job, float] = {}
        for job in waiting:
            like = _first_seed(job)
            if like not in seconds:
                if not seconds:
                    self._seconds_an_image(job)  # libraries are loaded and memory is mapped
                seconds[like] = self._seconds_an_image(job) * self._images(job) * job.epochs
        return sum(seconds[_first_seed(job)] for job in waiting)

    def _seconds_an_image(self, job: Job) -> float:
        images = _TRIED_BATCHES * (job.batch_size or job.network.recipe.batch_size)
        # As many epochs as the job, since policies have schedules; the run stops in the first.
        trial = replace(job, limit=images)
        config = trial.config(None, max_steps=_TRIED_BATCHES, quiet=True, **self.circumstances)
        try:
            return train_run(config).seconds / images
        except SwatError as error:
            if not _diverged(error):
                raise
            return 0.0  # the run itself will not last either

    def _images(self, job: Job) -> int:
        root = self.circumstances.get("data_root")
        size = job.batch_size or job.network.recipe.batch_size
        data = open_data(job.network.data, root, limit=job.limit)
        return data.train_batch_count(size) * size


def _diverged(error: SwatError) -> bool:
    return any(sign in str(error) for sign in _DIVERGED)


def _notes(folder: pathlib.Path, job: Job) -> pathlib.Path:
    return folder / f"recording-{job.every}.jsonl"


def _first_seed(job: Job) -> Job:
    return replace(job, seed=0, policy=replace(job.policy, seed=0))


def minutes(seconds: float) -> str:
    """A stretch of time as text, to the minute."""
    whole = round(seconds / 60)
    return f"{whole // 60} h {whole % 60} min" if whole >= 60 else f"{whole} min"


def _machine(device: str | None) -> str:
    found = common.machine()
    accelerator = found["accelerator"]
    if accelerator is not None and not str(device or "cuda").startswith("cpu"):
        return f"{accelerator}, torch {torch.__version__}"
    return (
        f"{found['processor']}, {found['threads']} threads, kernels {found['swatfx_kernels']},"
        f" torch {torch.__version__}"
    )
