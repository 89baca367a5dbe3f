"""The training runs of a comparison: a run a policy and seed, read or taken up where it is there.

Runs go one after the other through `swatfx.runs.train_run`, into ``FOLDER/POLICY/seed-N``.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from swatfx.datasets import Dataset, open_data
from swatfx.errors import CheckpointError, InputError, PolicyError, SwatError, UnknownNameError
from swatfx.policy import Policy
from swatfx.runs import (
    CONFIG,
    METRICS,
    FolderInUseError,
    RunConfig,
    recipe_for,
    recipe_named,
    train_run,
)

__all__ = ["OPTIONS", "Run", "Trained", "folder_name", "last_densities", "mean_densities"]
__all__ += ["data_shape", "run_config", "train_policies"]

_OURS = {"model", "policy", "seed", "output_dir", "resume", "max_steps"}
OPTIONS = tuple(f.name for f in fields(RunConfig) if f.name not in _OURS)
"""Fields of RunConfig that hold for every run of a comparison."""

_IMAGENET = (3, 224, 224)


@dataclass(frozen=True)
class Run:
    """How one seed ended; accuracies are fractions of the test images.

    Attributes:
        seed: of initialisation, order and augmentation.
        accuracy: after the last epoch; None where the run failed.
        best_accuracy: the best after any epoch.
        seconds: measured, training and testing.
        failure: why there is no accuracy: what went wrong while it trained.
    """

    seed: int
    accuracy: float | None = None
    best_accuracy: float | None = None
    seconds: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Trained:
    """A run, and the weight densities by layer that each of its epochs ended with."""

    run: Run
    densities: tuple[Mapping[str, float], ...] = ()


def run_config(model: object, options: Mapping[str, Any]) -> RunConfig:
    """The part of the configuration that all runs share; its policy and seed are placeholders.

    Raises:
        UnknownNameError: an option that is none of OPTIONS.
        InputError: no data set, or a model without a name.
    """
    for name in options:
        if name not in OPTIONS:
            raise UnknownNameError("training option", name, OPTIONS)
    if not isinstance(model, str):
        raise InputError(
            "a run that can be resumed wants a model by name",
            value=getattr(model, "__name__", type(model).__name__),
            remedy="name it as package.module:callable",
        )
    if options.get("data") is None:
        raise InputError("training wants a data set", remedy="name one, e.g. cifar10 (--data)")
    return RunConfig(model=model, policy="dense", **options)


def data_shape(config: RunConfig) -> tuple[tuple[int, ...], int]:
    """(shape of a training batch, number of classes) of what the runs train on."""
    recipe = recipe_named(config.recipe) if config.recipe else recipe_for(config.model, config.data)
    data = open_data(config.data, config.data_root, limit=config.limit)
    sample = tuple(data.train_images.shape[1:]) if isinstance(data, Dataset) else _IMAGENET
    return (config.batch_size or recipe.batch_size, *sample), data.num_classes


def folder_name(policy: str) -> str:
    """What the folder of a policy's runs is called."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", policy)


def train_policies(
    config: RunConfig,
    policies: Mapping[str, Policy | str],
    seeds: Sequence[int],
    output_dir: str | None,
    tell: Callable[[str], object],
) -> dict[str, list[Trained]]:
    """Train every policy with every seed, and return the runs by the policy's name.

    Args:
        config: from `run_config`.
        policies: by name.
        seeds: one run each.
        output_dir: where the runs are, or are to be; None uses a temporary folder.
        tell: called with a line before and after each run.

    Raises:
        SwatError: as `train_run` before it trains, and where a checkpoint cannot be written. What
            else goes wrong (a loss that is not finite) is that run's failure; the others go on.
    """
    places = {name: folder_name(name) for name in policies}
    for name, place in places.items():
        if list(places.values()).count(place) > 1:
            raise PolicyError("two policies of this name", value=name, remedy="give each its own")
    found: dict[str, list[Trained]] = {name: [] for name in policies}
    count = len(policies) * len(seeds)
    with tempfile.TemporaryDirectory() if output_dir is None else nullcontext(output_dir) as root:
        for name, policy in policies.items():
            for seed in seeds:
                done = sum(map(len, found.values())) + 1
                tell(f"{name}, seed {seed}: run {done} of {count}")
                folder = Path(root, places[name], f"seed-{seed}")
                trained = _train(replace(config, policy=policy, seed=seed), folder)
                found[name].append(trained)
                tell(f"{name}, seed {seed}: {_outcome(trained.run)}")
    return found


def _train(config: RunConfig, folder: Path) -> Trained:
    before = _begun(folder)  # a finished run is resumed, too, and trains no step more
    config = replace(config, output_dir=str(folder), resume=before is not None)
    try:
        result = train_run(config)
    except SwatError as error:
        # Options that do not fit are found before a run writes its configuration. What goes wrong
        # from then on is the run's: NaN in the loss, or in what Top-K is to rank.
        if _begun(folder) == before or isinstance(error, (CheckpointError, FolderInUseError)):
            raise
        return Trained(Run(config.seed, failure=str(error)))
    run = Run(config.seed, result.test_accuracy, result.best_test_accuracy, result.seconds)
    return Trained(run, tuple(_epoch_densities(folder / METRICS)))


def _begun(folder: Path) -> tuple[int, int] | None:
    """Tells one writing of a run's configuration from the next; None where there is none."""
    try:
        found = (folder / CONFIG).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


def _outcome(run: Run) -> str:
    if run.accuracy is None or run.best_accuracy is None:
        return f"failed: {run.failure}"
    best = f"best {run.best_accuracy:.2%}"
    return f"test accuracy {run.accuracy:.2%}, {best}, {run.seconds:.1f} seconds"


def _epoch_densities(metrics: Path) -> Iterator[Mapping[str, float]]:
    for line in metrics.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["weight_density"]["layers"]


def mean_densities(runs: Sequence[Trained]) -> dict[str, float]:
    """Layers' weight densities, mean over epochs and seeds; empty where no run finished."""
    return _mean([epoch for run in runs for epoch in run.densities])


def last_densities(runs: Sequence[Trained]) -> dict[str, float]:
    """Layers' weight densities after the last epoch, mean over seeds."""
    return _mean([run.densities[-1] for run in runs if run.densities])


def _mean(epochs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(epoch[name] for epoch in epochs) for name in epochs[0]} if epochs else {}
