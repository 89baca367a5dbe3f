"""Policies side by side on one network: what each costs and, if trained, what accuracy it reaches.

All policies are compiled from the same network and counted by the same accounting. Where a policy's
densities move while training and it was trained, its figures are those of the densities that
training had: of a training step averaged over the epochs, of the result the last epoch's.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
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
from swatfx.comparing.runs import Run, Trained
from swatfx.compiled import sparse_layers
from swatfx.costs import Report, known_device, report
from swatfx.density import Density
from swatfx.errors import InputError, PolicyError
from swatfx.options import CompileOptions
from swatfx.pipeline import compile as compile_model
from swatfx.policy import Policy, as_policy
from swatfx.tables import Shown, Table

__all__ = ["Comparison", "Row", "compare"]


@dataclass(frozen=True)
class Row:
    """One policy. Rates and reductions are fractions of 1, against the dense network.

    Attributes:
        policy: as it was asked for.
        densities: "fixed"; or where they move in training "planned" (their targets) or "trained":
            training MACs, activations and saved bytes of the mean over epochs and seeds, as seen at
            each epoch's end, and the rest of the last epoch.
        weight_sparsity: inactive fraction of all conv and linear weights.
        activation_sparsity: target, weighted by the elements of conv inputs; None: none is asked
            for ("default sparsity", DS in the paper's tables).
        training_mac_reduction: over forward, input gradient and weight gradient.
        inference_mac_reduction: forward, with the trained weights.
        activation_reduction: of conv and batch-norm inputs (appendix A.3); None as above.
        saved_bytes: kept for backward by the whole graph, planned for the example inputs.
        dense_saved_bytes: likewise with every layer dense.
        model_compression: conv and linear weights over those that stay, indices not counted; 1
            where the trained network is dense.
        kernels: "sparse", or "dense: " and why -> how many layers run so.
        accuracy_mean: of the test accuracies after the last epoch, over the seeds that finished.
        accuracy_std: their standard deviation (n - 1); None for fewer than two.
        best_accuracy_mean: mean of each seed's best accuracy after any epoch.
        seconds_mean: measured, of a run's training and testing.
        runs: one a seed; empty where nothing was trained.
    """

    policy: str
    densities: str
    weight_sparsity: float
    activation_sparsity: float | None
    training_mac_reduction: float
    inference_mac_reduction: float
    activation_reduction: float | None
    saved_bytes: int
    dense_saved_bytes: int
    model_compression: float
    kernels: Mapping[str, int] = field(default_factory=dict)
    accuracy_mean: float | None = None
    accuracy_std: float | None = None
    best_accuracy_mean: float | None = None
    seconds_mean: float | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Comparison(Shown):
    """A row a policy, and what they have in common.

    Attributes:
        model: its name.
        input_shapes: of the example inputs, batch first.
        accounting: "paper", "torch" or "exact".
        device: whose kernels are told.
        rows: in the order asked for.
        training: options of the runs; empty where nothing was trained.
    """

    model: str
    input_shapes: tuple[tuple[int, ...], ...]
    accounting: str
    rows: tuple[Row, ...]
    device: str = "cpu"
    training: Mapping[str, Any] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """By the attributes' names."""
        return asdict(self)

    def records(self) -> Table:
        """A row a policy: all fields of Row but the single runs and the kernels."""
        names = [f.name for f in fields(Row) if f.name not in ("runs", "kernels")]
        return Table.of({name: [getattr(row, name) for row in self.rows] for name in names})

    def blocks(self) -> list[Table | str]:
        """The table and its notes."""
        return [self._table(), *self._notes()]

    def _table(self) -> Table:
        rows = self.rows
        cells = {
            "policy": [row.policy + "*" * (row.densities != "fixed") for row in rows],
            "weights %": [_percent(row.weight_sparsity) for row in rows],
            "act %": [_percent(row.activation_sparsity, none="DS") for row in rows],
            "training MACs -%": [_percent(row.training_mac_reduction) for row in rows],
            "inference MACs -%": [_percent(row.inference_mac_reduction) for row in rows],
            "act -%": [_percent(row.activation_reduction, none="DS") for row in rows],
            "kept MB": [f"{row.saved_bytes / 1e6:.1f}" for row in rows],
            "of dense": [f"{row.saved_bytes / max(row.dense_saved_bytes, 1):.2f}" for row in rows],
            "compression x": [f"{row.model_compression:.1f}" for row in rows],
        }
        if self.training:
            cells["accuracy %"] = [_accuracy(row) for row in rows]
            cells["best %"] = [_percent(row.best_accuracy_mean, 2) for row in rows]
            cells["seconds"] = [
                "" if row.seconds_mean is None else f"{row.seconds_mean:.1f}" for row in rows
            ]
        return Table.of(cells)

    def _notes(self) -> list[str]:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        notes = [
            f"{self.model}, input {shapes}, {self.accounting} accounting. kept: for backward by the"
            " whole graph, modelled, parameters not counted. act -%: elements of conv and BN"
            " inputs, as the paper counts, no bytes. compression: weights over those that stay"
        ]
        notes += [
            f"kernels on {self.device}, {row.policy}: {_kernels(row.kernels)}"
            for row in self.rows
            if row.kernels
        ]
        kinds = {row.densities for row in self.rows}
        if "trained" in kinds:
            notes.append(
                "* densities moved: training MACs, act and kept are of their mean over the epochs,"
                " seen at each one's end; the rest is of the last epoch"
            )
        if "planned" in kinds:
            notes.append(
                "* densities move while training; these are the planned ones (a ramp's last; DST"
                " plans none), not the mean over a training"
            )
        if any(row.activation_sparsity is None for row in self.rows):
            notes.append(
                "DS: default sparsity, activations as they are; the paper's baselines are counted"
                " with half of them zero in the weight gradient (assumed_activation_density)"
            )
        if self.training:
            options = ", ".join(f"{k} {v}" for k, v in self.training.items() if v is not None)
            notes.append(
                f"trained with {options}. accuracy: after the last epoch, mean and standard"
                " deviation over seeds. seconds: of a run, measured"
            )
        failed = [(row.policy, run) for row in self.rows for run in row.runs if run.failure]
        return notes + [f"{policy}, seed {run.seed}: {run.failure}" for policy, run in failed]


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
            gm = compile_model(net, policy, **options)
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


def _kernels(found: Mapping[str, int]) -> str:
    sparse, layers = found.get("sparse", 0), sum(found.values())
    dense = [f"{why} ({n})" for why, n in found.items() if why != "sparse"]
    return "; ".join([f"{sparse} of {layers} sparse layers run sparse kernels", *dense])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _percent(value: float | None, digits: int = 1, none: str = "") -> str:
    return none if value is None else f"{100 * value:.{digits}f}"


def _accuracy(row: Row) -> str:
    failed = sum(run.failure is not None for run in row.runs)
    text = _percent(row.accuracy_mean, 2)
    if row.accuracy_std is not None:
        text += f" ± {100 * row.accuracy_std:.2f}"
    return f"{text} ({failed} of {len(row.runs)} failed)".strip() if failed else text
