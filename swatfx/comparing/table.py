"""Policies side by side on one network: what each costs and, if trained, what accuracy it reaches.

All policies are compiled from the same network and counted by the same accounting. Where a policy's
densities move while training and it was trained, its figures are those of the densities that
training had: of a training step averaged over the epochs, of the result the last epoch's.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swatfx import models
from swatfx.arguments import (
    COUNT,
    FUNCTION,
    INPUTS,
    MAPPING,
    MODEL,
    PATH,
    SEEDS,
    as_inputs,
    check,
    checked,
    instance,
    optional,
)
from swatfx.comparing import runs as comparing_runs
from swatfx.comparing.rows import Comparison, Row
from swatfx.comparing.runs import Trained
from swatfx.compiled import sparse_layers
from swatfx.costs import Report, known_device, report
from swatfx.density import Density
from swatfx.errors import InputError, PolicyError
from swatfx.options import CompileOptions
from swatfx.pipeline import compile as compile_model
from swatfx.policy import Policy, as_policy

__all__ = ["Comparison", "Row", "compare"]


@checked(
    model=MODEL,
    policies=instance(list, tuple, Mapping, str, Policy),
    example_inputs=INPUTS,
    num_classes=optional(COUNT),
    compile_options=optional(instance(Mapping, CompileOptions)),
    train=optional(MAPPING),
    tell=FUNCTION,
)
def compare(
    model: str | Callable[[], nn.Module],
    policies: Sequence[Policy | str] | Mapping[str, Policy | str],
    example_inputs: Sequence[Any] | Tensor | None = None,
    *,
    num_classes: int | None = None,
    accounting: str = "paper",
    activation_floor: float = 0.0,
    compile_options: CompileOptions | Mapping[str, Any] | None = None,
    device: str | None = None,
    train: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] = lambda text: None,
) -> Comparison:
    """Count what each policy costs on one network and, with `train`, how accurate it gets.

    Args:
        model: a name of `swatfx.models.create` or ``package.module:callable``; or, where nothing is
            trained, a callable that builds the network anew.
        policies: policies or their strings; a mapping gives them names of your own.
        example_inputs: positional inputs of one training step, batch first, best on the meta
            device. None, with `train`, takes the data set's shape and the batch trained on.
        num_classes: of a network by name; with `train` the data set's.
        accounting: "paper", "torch" or "exact", see `report`.
        activation_floor: natural activation sparsity, see `report`.
        compile_options: `norm_saves`, `value_dtype` and `kernels` of `compile`, those not at their
            defaults.
        device: tell the kernels that would run there; None: where training runs, else on the CPU.
        train: fields of `swatfx.runs.config.RunConfig` but for model, policy and seed, e.g.
            ``{"data": "cifar10", "data_root": "data", "epochs": 30}``; None trains nothing.
            Also "seeds": how many (1), from 0 on, or which. Its "output_dir" gets a folder a policy
            with a folder a seed in it: a run that is finished there is read, one that was
            interrupted goes on.
        tell: called with a line of text before and after each run.

    Raises:
        PolicyError: a policy that is unknown, given twice, or that the network cannot follow.
        InputError: options that do not fit together, or runs in "output_dir" made with others.
    """
    named = _named(policies)
    options = CompileOptions.of(compile_options)
    config = None
    if train is not None:
        seeds = train.get("seeds", 1)
        numbers = _numbers(seeds)
        of_one = {k: v for k, v in train.items() if k not in ("seeds", "output_dir")}
        check({"output_dir": train.get("output_dir")}, output_dir=optional(PATH))
        config = comparing_runs.run_config(model, {**of_one, **options.changed()})
        shape, num_classes = comparing_runs.data_shape(config)
        if example_inputs is None:
            example_inputs = torch.empty(shape, device="meta")
    if example_inputs is None:
        raise InputError(
            "a comparison wants example inputs: MACs depend on shapes",
            remedy='pass e.g. torch.empty(32, 3, 224, 224, device="meta"); nothing is computed',
        )
    inputs = as_inputs(example_inputs)
    trains_on = None if config is None else config.device or _default_device()
    where = known_device(trains_on or "cpu" if device is None else device)
    count = _Counter(model, num_classes, inputs, accounting, activation_floor, options, where)
    # All are counted before the first is trained: what cannot be compiled is better known early.
    rows = {name: count.planned(name, as_policy(policy)) for name, policy in named.items()}
    training: dict[str, Any] = {}
    if config is not None:
        assert train is not None  # whose configuration it is
        training = {k: v for k, v in train.items() if k not in ("quiet", "output_dir")}
        training["seeds"] = seeds if isinstance(seeds, int) else list(numbers)
        folder = train.get("output_dir")
        runs = comparing_runs.train_policies(config, named, numbers, folder, tell)
        for name, policy in named.items():
            rows[name] = count.trained(rows[name], as_policy(policy), runs[name])
    return Comparison(
        model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__),
        tuple(tuple(x.shape) for x in inputs if isinstance(x, Tensor)),
        accounting,
        tuple(rows.values()),
        where,
        training,
    )


def _numbers(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Which seeds are meant."""
    check({"seeds": seeds}, seeds=SEEDS)
    numbers = tuple(range(seeds) if isinstance(seeds, int) else seeds)
    if len(set(numbers)) < len(numbers):
        raise InputError("training wants seeds, each of them once", value=seeds)
    return numbers


def _named(
    policies: Sequence[Policy | str] | Mapping[str, Policy | str],
) -> dict[str, Policy | str]:
    """Each policy under its own name, or under its string; raises PolicyError for what is none."""
    if isinstance(policies, Mapping):
        pairs = list(policies.items())
    else:
        single = isinstance(policies, (str, Policy))
        listed: list[Any] = [policies] if single else list(policies)
        pairs = [(_name(policy), policy) for policy in listed]
    if not pairs:
        raise PolicyError("there is no policy to compare", remedy="name one, e.g. swat-u:0.9")
    for name, policy in pairs:
        as_policy(policy)
        if [other for other, _ in pairs].count(name) > 1:
            raise PolicyError(
                "a policy is there twice", value=name, remedy="a mapping can name each as you like"
            )
    return dict(pairs)


def _name(policy: Policy | str) -> str:
    if not isinstance(policy, Policy):
        return str(policy).strip()
    return f"{policy.name}:{policy.sparsity:g}" if policy.sparsity else policy.name


@dataclass(frozen=True)
class _Counter:
    """Counts what policies cost on the network and the inputs of one comparison."""

    model: str | Callable[[], nn.Module]
    num_classes: int | None
    inputs: tuple[Any, ...]
    accounting: str
    activation_floor: float
    options: CompileOptions
    device: str

    def planned(self, name: str, policy: Policy) -> Row:
        """The row of a policy at the densities that it aims at."""
        found = self._report(name, policy, None)
        return _row(name, policy, "planned" if policy.moves_densities else "fixed", found, found)

    def trained(self, row: Row, policy: Policy, runs: Sequence[Trained]) -> Row:
        """`row` with its runs, and counted anew where densities moved."""
        mean = comparing_runs.mean_densities(runs)
        if policy.moves_densities and mean:
            steps = self._report(row.policy, policy, mean)
            last = self._report(row.policy, policy, comparing_runs.last_densities(runs))
            row = _row(row.policy, policy, "trained", steps, last)
        done = [t.run for t in runs if t.run.failure is None]
        accuracies = [run.accuracy for run in done if run.accuracy is not None]
        return replace(
            row,
            accuracy_mean=_mean(accuracies),
            accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            best_accuracy_mean=_mean([run.best_accuracy for run in done]),
            seconds_mean=_mean([run.seconds for run in done]),
            runs=tuple(t.run for t in runs),
        )

    def _report(self, name: str, policy: Policy, densities: Mapping[str, float] | None) -> Report:
        """Costs at the densities given by layer; None: at the planned ones."""
        model = self.model
        # Anew each time: a policy may zero weights of the network that it is compiled from.
        net = models.resolve_on_meta(model, self.num_classes) if isinstance(model, str) else model()
        try:
            options: Any = self.options.to_json()
            gm = compile_model(net, policy, example_inputs=self.inputs, **options)
        except (PolicyError, InputError) as error:
            raise PolicyError(
                f"policy {name!r} on this network: {error.problem}",
                layer=error.layer,
                value=error.value,
                remedy=error.remedy,
            ) from error
        for layer in sparse_layers(gm):
            # Costs are linear in a layer's densities: counted at their mean, they are the mean.
            if layer.plan.rule.moves_densities:
                planned = layer.plan.weight_density
                value = None if densities is None else densities.get(layer.plan.name)
                layer.set_density(planned if value is None else Density(value))
        return report(
            gm,
            self.inputs,
            accounting=self.accounting,
            activation_floor=self.activation_floor,
            device=self.device,
        )


def _row(name: str, policy: Policy, densities: str, step: Report, last: Report) -> Row:
    """A row from the costs of a training step, and from those when training ends."""
    rules = [policy, *(rule for _, rule in policy.rules)]
    sparse = any(rule.sees_activation for rule in rules)
    assumed = any(rule.assumed_activation_density is not None for rule in rules)
    default = assumed and not sparse
    return Row(
        name,
        densities,
        last.totals["weight_sparsity"],
        None if default else step.totals["activation_sparsity"],
        step.totals["training_mac_reduction"],
        last.totals["inference_mac_reduction"],
        None if default else step.totals["activation_reduction"],
        step.totals["saved_bytes"],
        step.totals["dense_saved_bytes"],
        _compression(policy, last),
        dict(Counter(layer.kernels for layer in step.layers if layer.kernels)),
    )


def _compression(policy: Policy, last: Report) -> float:
    weights, stay = 0, 0.0
    for layer in last.layers:
        rule = policy.rule_for(layer.name)[1]
        sparse = rule.forward_weight or rule.zeroes_inactive
        weights += layer.parameters
        stay += layer.parameters * (layer.weight_density if sparse else 1.0)
    return weights / stay if stay else 1.0


def _default_device() -> str:
    """Where a run trains that says nothing of it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
