"""What benchmarks that train share: options, epochs by the recipe, tests, and kept runs."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common, options
from benchmarks.sides import as_form
from swatfx import datasets
from swatfx.runs import learning_rate, recipe_for
from swatfx.timing.steps import autocast

_TEST_BATCH = 500


def add_arguments(parser: argparse.ArgumentParser, *, seeds: int, epochs: int) -> None:
    """Add what is trained on what for how long; `fill` gives the rest its defaults."""
    add = parser.add_argument
    add("--data", type=options.given, metavar="PATH", help="folder or .npz that holds the data set")
    add("--dataset", type=options.given, help="of swatfx.datasets (default: cifar10)")
    add("--model", type=options.given, help="of swatfx.models.create (default: cifar/resnet20)")
    add("--seeds", type=options.positive, default=seeds, help="runs of each kind")
    add("--epochs", type=options.positive, help=f"default: {epochs}")
    add("--batch-size", type=options.positive, help="default: 128")
    add("--limit", type=options.positive, help="training images (default: 20000)")
    add("--partial", type=options.output, metavar="FILE", help="runs so far")


def fill(args: argparse.Namespace, **more: tuple[int, int]) -> None:
    """Give options that were left out their default, or that of --quick."""
    defaults: dict[str, tuple[Any, Any]] = {
        "dataset": ("cifar10", "digits"),
        "model": ("cifar/resnet20", "digits/cnn"),
        "batch_size": (128, 32),
        "limit": (20_000, 96),
        **more,
    }
    for key, (value, quick) in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, quick if args.quick else value)


def load_data(args: argparse.Namespace) -> datasets.Dataset:
    """The first `--limit` training images, and all test images."""
    data = datasets.load(args.dataset, args.data)
    chosen = slice(args.limit)
    return replace(
        data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen]
    )


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: datasets.Dataset,
    args: argparse.Namespace,
    seed: int,
    epoch: int,
    form: str,
    tick: Callable[[], object],
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[float]:
    """One epoch of the recipe stretched to `--epochs`, or its first `steps`; the losses.

    Forward and loss run under autocast to `dtype`, if it is given.
    """
    recipe = recipe_for(args.model, args.dataset)
    count = data.train_batch_count(args.batch_size)
    losses: list[float] = []
    model.train()
    batches = data.train_batches(args.batch_size, seed=seed, epoch=epoch, device="cpu")
    for index, (images, labels) in enumerate(islice(batches, steps)):
        rate = learning_rate(recipe, epoch, (index + 0.5) / count, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with autocast(dtype):
            loss = F.cross_entropy(model(as_form(images, form)), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        tick()
    return losses


def accuracy_of(
    model: nn.Module, data: datasets.Dataset, form: str, dtype: torch.dtype | None = None
) -> float:
    """Fraction of the test images that are classified rightly, under autocast to `dtype`."""
    model.eval()
    right = count = 0
    with torch.no_grad(), autocast(dtype):
        for images, labels in data.test_batches(_TEST_BATCH, device="cpu"):
            right += int((model(as_form(images, form)).argmax(dim=1) == labels).sum().item())
            count += len(labels)
    return right / count


class Partial:
    """Runs so far, in a file, by (kind, seed); those of other settings are not taken."""

    def __init__(self, path: pathlib.Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.runs: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] == settings:
                self.runs = {k: r for k, r in stored["runs"].items() if r["finished"]}

    def keep(self, key: str, run: Mapping[str, Any], finished: bool) -> None:
        """Note a run, and write the file."""
        self.runs[key] = {**run, "finished": finished}
        if self.path is not None:
            common.write_result({"settings": self.settings, "runs": self.runs}, self.path)

    def run(self, key: str) -> dict[str, Any]:
        """What was kept."""
        return {k: v for k, v in self.runs[key].items() if k != "finished"}

    def remove(self) -> None:
        """Delete the file, at the end."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def heading(result: Mapping[str, Any]) -> list[str]:
    """First lines of the Markdown file beside a result: what, when, how, on what."""
    described = {**result["machine"], **result["versions"]}
    told = ", ".join(f"{k} {v}" for k, v in described.items() if v is not None)
    return [f"# {result['description']}", "", f"{result['date']}: `{result['command']}`", "", told]
