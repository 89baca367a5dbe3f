"""What is trained: scales, networks, arms of a grid, and the jobs that they come to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from swatfx.errors import SwatError
from swatfx.policy import Policy, as_policy
from swatfx.runs import Recipe, RunConfig, recipe_for


@dataclass(frozen=True)
class Network:
    """A name of `swatfx.models.create`, and a data set of `swatfx.datasets`."""

    model: str
    data: str

    def __str__(self) -> str:
        return f"{self.model} on {self.data}"

    @property
    def recipe(self) -> Recipe:
        """Hyperparameters it is trained with."""
        return recipe_for(self.model, self.data)


@dataclass(frozen=True)
class Scale:
    """How big runs are.

    Attributes:
        name: on the command line.
        network: what is trained; None means what the paper trains.
        limit: training images, of which a fifth as many are tested; None means all.
        epochs: None means the recipe's.
        batch_size: None means the recipe's.
        seeds: runs an arm.
        every: steps between two that are recorded, where something is.
        whole_grid: whether every arm of the paper's figure is trained, or a few of them.
    """

    name: str
    network: Network | None
    limit: int | None
    epochs: int | None
    batch_size: int | None
    seeds: int
    every: int
    whole_grid: bool = False

    def epochs_of(self, network: Network) -> int:
        """Epochs that `network` is trained for."""
        return self.epochs or network.recipe.epochs


SCALES = {
    scale.name: scale
    for scale in (
        Scale("tiny", Network("digits/cnn", "digits"), 160, 2, 32, 2, 1),
        Scale("small", Network("cifar/resnet20", "cifar10"), 8_000, 10, None, 2, 4),
        Scale("paper", None, None, None, None, 3, 100, whole_grid=True),
    )
}


@dataclass(frozen=True)
class Arm:
    """One point of a figure: a policy, the curve it belongs to, and where it stands on it."""

    curve: str
    x: float | None
    policy: Policy

    def __str__(self) -> str:
        return self.curve if self.x is None else f"{self.curve} {self.x:g}"


@dataclass(frozen=True)
class Job:
    """One training run.

    Everything here decides its result, but `every`: the number of steps between two whose
    thresholds and densities are recorded. 0 records nothing.
    """

    network: Network
    policy: Policy
    seed: int
    epochs: int
    limit: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    every: int = 0

    def identity(self) -> dict[str, Any]:
        """What tells it from other jobs, as JSON.

        Of the policy, only what differs from a field's default, so that a field that is new in the
        library leaves old runs what they are.
        """
        data = asdict(self) | {"policy": _told(self.policy)}
        del data["every"]
        return dict(json.loads(json.dumps(data)))

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and another one for another identity."""
        text = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        words = f"{self.network.model}-{self.network.data}-{self.policy.name}-{self.seed}"
        return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', words)}-{digest}"

    def __str__(self) -> str:
        return f"{self.network}, {told(self.policy)}, seed {self.seed}"

    def config(self, output_dir: str | None, **circumstances: Any) -> RunConfig:
        """The run that it stands for."""
        return RunConfig(
            self.network.model,
            self.network.data,
            self.policy,
            epochs=self.epochs,
            limit=self.limit,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self.seed,
            output_dir=output_dir,
            **circumstances,
        )


def told(policy: Policy) -> str:
    """A policy as the string that makes it (its seed and rules left out)."""
    sparsity = policy.gradient_sparsity or policy.sparsity
    name = f"{policy.name}:{sparsity:g}" if sparsity else policy.name
    try:
        base = as_policy(name)
    except SwatError:  # it has parts that no string gives
        base = Policy(policy.name, policy.sparsity)
    own, usual = asdict(policy), asdict(base)
    given = {k: v for k, v in own.items() if v != usual[k] and k not in ("seed", "rules")}
    return ",".join([name, *(f"{k}={v}" for k, v in given.items())])


def _told(policy: Policy) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(Policy) if f.default is not MISSING}
    data = {k: v for k, v in policy.to_json().items() if k not in defaults or v != defaults[k]}
    data["rules"] = [[pattern, _told(rule)] for pattern, rule in policy.rules]
    return data


def fitted(policy: Policy, seed: int, period: int) -> Policy:
    """`policy` with a seed for what it draws at random, and the recipe's period if it has none."""
    rules = tuple((pattern, fitted(rule, seed, period)) for pattern, rule in policy.rules)
    own = policy.period if policy.period > 1 else period
    return replace(policy, seed=seed, period=own, rules=rules)


def jobs_of(
    arms: Sequence[Arm], network: Network, scale: Scale, *, lr: float | None, every: int
) -> Iterator[tuple[Arm, Job]]:
    """(arm, job) for every seed of every arm: first all arms with the first seed.

    A run that is broken off then leaves whole grids of fewer seeds behind.
    """
    for seed in range(scale.seeds):
        for arm in arms:
            job = Job(
                network,
                fitted(arm.policy, seed, network.recipe.period),
                seed,
                scale.epochs_of(network),
                scale.limit,
                scale.batch_size,
                lr,
                every,
            )
            yield arm, job
