"""What a comparison holds: a row a policy, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from swatfx.comparing.runs import Run
from swatfx.tables import Shown, Table


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


def _kernels(found: Mapping[str, int]) -> str:
    sparse, layers = found.get("sparse", 0), sum(found.values())
    dense = [f"{why} ({n})" for why, n in found.items() if why != "sparse"]
    return "; ".join([f"{sparse} of {layers} sparse layers run sparse kernels", *dense])


def _percent(value: float | None, digits: int = 1, none: str = "") -> str:
    return none if value is None else f"{100 * value:.{digits}f}"


def _accuracy(row: Row) -> str:
    failed = sum(run.failure is not None for run in row.runs)
    text = _percent(row.accuracy_mean, 2)
    if row.accuracy_std is not None:
        text += f" ± {100 * row.accuracy_std:.2f}"
    return f"{text} ({failed} of {len(row.runs)} failed)".strip() if failed else text
