"""A training run from beginning to end: what `swatfx train` does.

A run is a model, a data set, a policy and a recipe. Into its output folder go ``config.json``
(what the run is), ``metrics.jsonl`` (one line an epoch) and ``checkpoint.ckpt`` (written anew after
each epoch, in one step). A run that was stopped, however it was stopped, goes on from its last
checkpoint with `resume`; on a CPU its weights and metrics then equal those of a run that was never
stopped bit for bit, seconds apart. (On a GPU that holds as far as its kernels are deterministic.)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from swatfx import models
from swatfx.checkpoint import load, read_extra, save
from swatfx.compiled import all_plans, evaluation_mode, observe
from swatfx.datasets import Dataset, open_data
from swatfx.errors import CheckpointError, InputError, SwatError
from swatfx.options import CompileOptions
from swatfx.pipeline import compile as compile_model
from swatfx.policy import Policy, as_policy
from swatfx.runs.config import RunConfig, RunResult
from swatfx.runs.folder import RunFolder
from swatfx.runs.recipes import Recipe, learning_rate, make_optimizer, recipe_for, recipe_named
from swatfx.training import attach

__all__ = ["RunConfig", "RunResult", "train_run"]

_TEST_BATCH = 500  # images; nothing depends on it but speed and memory
_LOSSES_IN_FLIGHT = 32  # steps on a GPU between two looks at the losses, each of which waits for it


@dataclass
class _Progress:
    """Where a run stands; goes into the checkpoint as JSON (which keeps floats exactly)."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done of the next one
    step: int = 0
    loss_sum: float = 0.0  # over the images of those batches
    images: int = 0
    best_test_accuracy: float = 0.0
    seconds: float = 0.0


def train_run(config: RunConfig) -> RunResult:
    """Train as ``config`` says, and return how it went.

    Raises `SwatError` before anything is written where the configuration does not hold together,
    the output folder is in use, or the run to resume is another one; and while training where the
    loss is no longer finite (the checkpoint then is that of the last epoch before).
    """
    _refuse_ranks()
    device = _device(config.device)
    with _private_state(config, device), contextlib.ExitStack() as held:
        return _Run(config, device, held).go()


def _refuse_ranks() -> None:
    """Raise where torchrun started several processes: each would train, and write, by itself."""
    world = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    ranks = int(world) if world.isdecimal() else 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = max(ranks, torch.distributed.get_world_size())
    if ranks > 1:
        raise InputError(
            "a run is one process, and this is one of several",
            value=f"WORLD_SIZE={ranks}",
            remedy="start it without torchrun; to train data-parallel, wrap swatfx.compile's model"
            " in DistributedDataParallel in a loop of your own",
        )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise InputError("unknown device", value=name, remedy="use cpu or cuda") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type)
    if count is None:
        raise InputError("runs train on cpu or cuda", value=name, remedy="use --device cpu")
    if count == 0:
        raise InputError("PyTorch sees no GPU", value=name, remedy="use --device cpu")
    if (device.index or 0) >= count:
        raise InputError(f"there are {count} devices of this kind", value=name)
    return device


@contextlib.contextmanager
def _private_state(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Seed the global random state and set the threads, and put both back at the end."""
    threads = torch.get_num_threads()
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class _Run:
    """One run: its parts, made in the order that the random state is used in."""

    def __init__(self, config: RunConfig, device: torch.device, held: contextlib.ExitStack) -> None:
        self.config, self.device = config, device
        preset = (
            recipe_named(config.recipe) if config.recipe else recipe_for(config.model, config.data)
        )
        policy = as_policy(config.policy)
        if isinstance(config.policy, str) and "period" not in config.policy:
            policy = replace(policy, period=preset.period)
        self.recipe = preset if config.lr is None else preset.with_base_rate(config.lr)
        self.epochs = config.epochs or preset.epochs
        self.batch_size = config.batch_size or preset.batch_size
        self.folder = None if config.output_dir is None else RunFolder(config.output_dir)
        identity = self._identity(policy, preset)
        if self.folder is not None:
            held.enter_context(self.folder.taken(identity, resume=config.resume))

        self.data = open_data(
            config.data, config.data_root, limit=config.limit, workers=config.workers
        )
        if isinstance(self.data, Dataset):
            self.data = self.data.to(device)
        self.batches = self.data.train_batch_count(self.batch_size)
        model = models.resolve(config.model, self.data.num_classes).to(device)
        example = self._try_model(model)
        self.progress = _Progress()
        self.record: dict[str, Any] = {}  # the last line of the metrics
        # Over the model, whose parameters the graph shares: the order of an optimizer's parameters
        # is part of its state, and the graph need not keep it.
        self.optimizer = make_optimizer(self.recipe, model)
        if config.resume and self.folder is not None and self.folder.checkpoint.exists():
            self.gm = load(
                self.folder.checkpoint, model, optimizer=self.optimizer, example_inputs=example
            )
            self._restore(read_extra(self.folder.checkpoint))
        else:
            options: Any = config.compile_options()
            self.gm = compile_model(model, policy, example_inputs=example, **options)
        self.sizes = {name: plan.parameters for name, plan in all_plans(self.gm).items()}
        self.board: Any = self._open_board() if config.tensorboard else None
        self.gm.train()
        self.step_module: Callable[..., Any] = self.gm
        if config.compile:
            self.step_module = torch.compile(self.gm)
        if self.folder is not None:
            self.folder.begin(identity | self._circumstances(), self.progress.epoch)

    def _try_model(self, model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        """The input of a training step, without values.

        Raises:
            InputError: `model` does not give a number a class for images of the data set.
        """
        images, _ = next(iter(self.data.test_batches(2, device=self.device)))
        shape, classes = tuple(images.shape), self.data.num_classes
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), evaluation_mode(model), torch.no_grad():
            try:
                output = model(images)
            except Exception as error:  # of the user's own code, too
                raise InputError(
                    f"the model cannot take images of {self.config.data}:"
                    f" {type(error).__name__}: {error}",
                    value=shape,
                    remedy="train a model for images of this shape",
                ) from error
        if isinstance(output, Tensor) and (output.dim() != 2 or output.shape[1] < classes):
            raise InputError(
                f"the model gives no number for each of the {classes} classes of"
                f" {self.config.data}",
                value=tuple(output.shape),
                remedy="let it return (images, classes), and take num_classes= where it is built",
            )
        return (torch.empty(self.batch_size, *shape[1:], device="meta"),)

    def go(self) -> RunResult:
        """Train the epochs that are left."""
        handle = attach(
            self.gm,
            self.optimizer,
            steps_per_epoch=self.batches,
            total_steps=self.epochs * self.batches,
        )
        silent = self.config.quiet or not sys.stderr.isatty()
        record = self.record
        total = self.epochs * self.batches
        with tqdm(total=total, initial=self.progress.step, unit="step", disable=silent) as bar:
            try:
                while self.progress.epoch < self.epochs and not self._stopped():
                    record = self.record = self._epoch(bar)
                    bar.set_postfix(
                        epoch=record["epoch"],
                        loss=f"{record['train_loss']:.4f}",
                        accuracy=f"{record['test_accuracy']:.2%}",
                    )
            finally:
                handle.detach()
                if self.board is not None:
                    self.board.close()
        progress = self.progress
        return RunResult(
            epochs=progress.epoch,
            steps=progress.step,
            finished=progress.epoch == self.epochs,
            train_loss=record["train_loss"],
            test_accuracy=record["test_accuracy"],
            best_test_accuracy=max(progress.best_test_accuracy, record["test_accuracy"]),
            mean_weight_density=record["weight_density"]["mean"],
            mean_activation_density=record["activation_density"]["mean"],
            seconds=progress.seconds,
            output_dir=self.config.output_dir,
        )

    def _stopped(self) -> bool:
        return self.config.max_steps is not None and self.progress.step >= self.config.max_steps

    def _epoch(self, bar: Any) -> dict[str, Any]:
        """Train one epoch, or what is left of it; test; write metrics, then the checkpoint."""
        started = time.perf_counter()
        progress = self.progress
        pending: list[tuple[int, Tensor, int]] = []
        in_flight = _LOSSES_IN_FLIGHT if self.device.type == "cuda" else 1
        rate, seen = 0.0, None
        for images, labels in self.data.train_batches(
            self.batch_size,
            seed=self.config.seed,
            epoch=progress.epoch,
            device=self.device,
            start_batch=progress.batch,
        ):
            # Half a step on: warm-up then starts above zero, and no step stands on a boundary.
            done = (progress.batch + 0.5) / self.batches
            rate = learning_rate(self.recipe, progress.epoch, done, self.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            progress.batch += 1
            progress.step += 1
            last = progress.batch == self.batches or self._stopped()
            # Observation wants the graph itself: compiled code has nothing to observe.
            with observe(self.gm) if last else contextlib.nullcontext() as watched:
                logits = (self.gm if last else self.step_module)(images)
            seen = watched if last else seen
            loss = functional.cross_entropy(
                _logits(logits), labels, label_smoothing=self.recipe.label_smoothing
            )
            pending.append((progress.step, loss.detach(), len(labels)))
            if last or len(pending) >= in_flight:
                self._count(pending)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            bar.update()
            if last:
                break
        whole = progress.batch == self.batches
        accuracy = self._test_accuracy()
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        record = {
            "epoch": progress.epoch + 1,
            "complete": whole,
            "step": progress.step,
            "lr": rate,
            "train_loss": progress.loss_sum / progress.images,
            "test_accuracy": accuracy,
            "weight_density": _densities(seen.weight_density if seen else {}, self.sizes),
            "activation_density": _densities(seen.activation_density if seen else {}, {}),
            "seconds": seconds,
        }
        if whole:
            progress.epoch, progress.batch = progress.epoch + 1, 0
            progress.loss_sum, progress.images = 0.0, 0
            progress.best_test_accuracy = max(progress.best_test_accuracy, accuracy)
        self._keep(record)
        return record

    def _count(self, pending: list[tuple[int, Tensor, int]]) -> None:
        """Move losses still on the device into the epoch's sum; raise if one is not finite."""
        for step, loss, images in pending:
            value = loss.item()
            if not math.isfinite(value):
                raise SwatError(
                    f"the loss is {value} at step {step}, in epoch {self.progress.epoch + 1}",
                    remedy="lower the learning rate (--lr); the checkpoint, if one was written, "
                    "is that of the last epoch before",
                )
            self.progress.loss_sum += value * images
            self.progress.images += images
        pending.clear()

    def _test_accuracy(self) -> float:
        """Fraction of the test images that the network classifies rightly."""
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        count = 0
        self.gm.eval()
        with torch.no_grad():
            for images, labels in self.data.test_batches(_TEST_BATCH, device=self.device):
                right += (self.gm(images).argmax(dim=1) == labels).sum()
                count += len(labels)
        self.gm.train()
        return int(right) / count

    def _keep(self, record: dict[str, Any]) -> None:
        """Write one epoch down: metrics first, since a resume drops a line without checkpoint."""
        if self.board is not None:
            for name, value in _scalars(record):
                self.board.add_scalar(name, value, record["epoch"])
            self.board.flush()
        if self.folder is None:
            return
        self.folder.append(record)
        random_state = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random_state.append(torch.cuda.get_rng_state(self.device))
        extra = {
            "progress": json.dumps(asdict(self.progress)),
            "record": json.dumps(record),
            "random_state": random_state,
        }
        save(self.gm, self.folder.checkpoint, optimizer=self.optimizer, extra=extra)

    def _restore(self, extra: Mapping[str, Any]) -> None:
        """Take up where the checkpoint's `extra` left off."""
        try:
            stored = json.loads(extra["progress"])
            progress = _Progress(**{field.name: stored[field.name] for field in fields(_Progress)})
            record = json.loads(extra["record"])
            states = [state.cpu() for state in extra["random_state"]]
            for name, kind in typing.get_type_hints(_Progress).items():
                value = getattr(progress, name)
                if not isinstance(value, (kind, int)) or not value >= 0:
                    raise ValueError(f"progress.{name} is {value!r}")
            record["epoch"], record["weight_density"]["mean"]
            torch.set_rng_state(states[0])
            if self.device.type == "cuda" and len(states) > 1:
                torch.cuda.set_rng_state(states[1], self.device)
        except Exception as error:  # what is odd in any of them raises in its own way
            raise CheckpointError(
                f"the checkpoint's 'extra' is not of a training run: {error!r}",
                value=self.config.output_dir,
                remedy="give a folder that swatfx train wrote",
            ) from error
        self.progress, self.record = progress, record

    def _identity(self, policy: Policy, preset: Recipe) -> dict[str, Any]:
        """What makes this run this run: what a resume may not change, as plain JSON."""
        identity: dict[str, Any] = {
            "model": self.config.model,
            "data": self.config.data,
            "limit": self.config.limit,
            "policy": policy.to_json(),
            "recipe": asdict(preset),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.recipe.learning_rates[0][1],
            "seed": self.config.seed,
        } | CompileOptions(**self.config.compile_options()).changed()
        return dict(json.loads(json.dumps(identity)))  # tuples become the lists of a JSON file

    def _circumstances(self) -> dict[str, Any]:
        """What a resume may change, for the record."""
        return {
            "data_root": self.config.data_root,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "compile": self.config.compile,
            "torch": str(torch.__version__),
        }

    def _open_board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SwatError(
                f"TensorBoard cannot be imported: {error}",
                remedy="run pip install tensorboard, or leave --tensorboard out",
            ) from error
        folder = pathlib.Path(self.config.output_dir or ".", "tensorboard")
        return SummaryWriter(str(folder), purge_step=self.progress.epoch + 1)


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputError(
            "the model returns no logits in training",
            value=type(output).__name__,
            remedy="train one that returns a tensor (N, classes)",
        )
    return output


def _densities(by_layer: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Layers' densities with their mean, weighted by `sizes`; None where no layer takes part."""
    layers = {name: float(density) for name, density in by_layer.items()}
    kept = sum(sizes.get(name, 1) * density for name, density in layers.items())
    mean = kept / sum(sizes.get(name, 1) for name in layers) if layers else None
    return {"mean": mean, "layers": layers}


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("lr", "train_loss", "test_accuracy", "seconds"):
        yield name, record[name]
    for name in ("weight_density", "activation_density"):
        if record[name]["mean"] is not None:
            yield f"{name}/mean", record[name]["mean"]
        for layer, density in record[name]["layers"].items():
            yield f"{name}/{layer}", density
