"""The figures of the paper: what is trained for each, and by which rule its claim is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.reproduce import figures, recorded_claims
from benchmarks.reproduce.claims import Finding
from benchmarks.reproduce.jobs import Arm, Network, Scale
from benchmarks.reproduce.outcomes import (
    Outcome,
    accuracy_over_epochs,
    accuracy_over_x,
)
from benchmarks.reproduce.plotting import Panel
from benchmarks.reproduce.table_rows import TABLES, Row

_RESNET18 = (Network("cifar/resnet18", "cifar100"),)
_SENSITIVITY = (
    Network("cifar/densenet121", "cifar100"),
    Network("cifar/vgg16", "cifar100"),
    *_RESNET18,
)


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        name: on the command line.
        title: what it shows.
        claim: of the paper, to be judged.
        paper: what the paper's text says about it; points that it only draws are not invented.
        networks: that the paper trains.
        arms: (network, scale) -> grid.
        judge: outcome on one network -> findings.
        panel: outcome on one network -> picture.
        recorded: kinds of `recorded_claims.quarters` that results list; runs are recorded if any.
        rows: of a table with accounting.
    """

    name: str
    title: str
    claim: str
    paper: str
    networks: tuple[Network, ...]
    arms: Callable[[Network, Scale], list[Arm]]
    judge: Callable[[Outcome], list[Finding]]
    panel: Callable[[Outcome], Panel]
    recorded: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


def _over_sparsity(outcome: Outcome) -> Panel:
    return accuracy_over_x(outcome, "sparsity")


def _table(name: str, title: str) -> Experiment:
    rows = TABLES[name]
    return Experiment(
        name,
        title,
        "",
        "",
        tuple(dict.fromkeys(row.network for row in rows)),
        figures.table_arms(rows),
        figures.no_judge,
        accuracy_over_epochs,
        rows=rows,
    )


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        _table("table2", "Unstructured SWAT on CIFAR-10"),
        _table("table3", "Unstructured SWAT on ImageNet"),
        _table("table4", "Structured SWAT on CIFAR-10"),
        _table("table5", "Structured SWAT on ImageNet"),
        _table("appendix-table1", "Unstructured SWAT on CIFAR-100"),
        _table("appendix-table2", "Structured SWAT on CIFAR-100"),
        Experiment(
            "figure4",
            "Weight thresholds over training, SWAT-U at 90%",
            "thresholds settle",
            "the K-th largest magnitude of a layer is almost constant during training (section"
            " 3.3.3; four layers of ResNet-18 on CIFAR-100)",
            _RESNET18,
            figures.figure4,
            recorded_claims.judge_thresholds,
            recorded_claims.threshold_panel,
            recorded=("threshold",),
        ),
        Experiment(
            "appendix-figure2",
            "Realised sparsity under a period of 100 steps, SWAT-U at 90%",
            "realised sparsity concentrates around the target",
            "sparsity in training is concentrated around the target of 90%, and fluctuates less as"
            " training goes on (appendix A.6; ResNet-18 on CIFAR-100)",
            _RESNET18,
            figures.appendix_figure2,
            recorded_claims.judge_sparsity,
            recorded_claims.sparsity_panel,
            recorded=("weight sparsity", "activation sparsity"),
        ),
        Experiment(
            "figure1",
            "Sensitivity of the forward pass",
            "weights tolerate sparsity in forward better than activations",
            "convergence is more robust to Top-K of weights than of activations in forward; high"
            " activation sparsity hurts after a certain point (section 3.2; three networks on"
            " CIFAR-100, mean of three runs)",
            _SENSITIVITY,
            figures.figure1,
            figures.judge_figure1,
            _over_sparsity,
        ),
        Experiment(
            "figure2",
            "Sensitivity of the backward pass",
            "gradients do not tolerate sparsity in backward, weights and activations do",
            "convergence is relatively insensitive to sparse weights and activations in backward,"
            " and sensitive to sparse output gradients (section 3.2; networks of figure 1)",
            _SENSITIVITY,
            figures.figure2,
            figures.judge_figure2,
            _over_sparsity,
        ),
        Experiment(
            "saw-meprop",
            "SAW against meProp (appendix A.7)",
            "SAW tolerates 80% where meProp does not tolerate 50%",
            "meProp reaches a good solution at 30%, overfits at 50% and stays below 45% accuracy;"
            " SAW reaches a higher one even at 80% (ResNet-18 on ImageNet)",
            (Network("resnet18", "imagenet"),),
            figures.saw_meprop,
            figures.judge_saw_meprop,
            accuracy_over_epochs,
        ),
        Experiment(
            "figure5",
            "Period of Top-K",
            "periods up to 1000 do no harm",
            "up to a period of 1000 iterations, 391 of them an epoch, accuracy is not degraded"
            " significantly (section 3.3.3; ResNet-18 on CIFAR-100)",
            _RESNET18,
            figures.figure5,
            figures.judge_figure5,
            lambda outcome: accuracy_over_x(outcome, "period, steps", log_x=True),
        ),
        Experiment(
            "figure7",
            "Masking the updates of inactive weights",
            "masking inactive updates hurts",
            "it is important to update inactive weights (section 4.5; ResNet-18 on CIFAR-100)",
            _RESNET18,
            figures.figure7,
            figures.judge_figure7,
            _over_sparsity,
        ),
        Experiment(
            "figure8",
            "Freezing the active set, SWAT-U at 90%",
            "freezing early hurts",
            "freezing the topology early is harmful to convergence and reduces final accuracy"
            " (section 4.5; ResNet-18 on CIFAR-100)",
            _RESNET18,
            figures.figure8,
            figures.judge_figure8,
            lambda outcome: accuracy_over_x(outcome, "epoch"),
        ),
        Experiment(
            "appendix-figure1",
            "Scopes of Top-K, SAW",
            "nchw >= chw >= hw > random",
            "random selection works at low sparsity only, every Top-K is considerably better at"
            " high sparsity, and the more constrained it is the less accurate (appendix A.5;"
            " ResNet-18 on CIFAR-100)",
            _RESNET18,
            figures.appendix_figure1,
            figures.judge_appendix_figure1,
            _over_sparsity,
        ),
    )
}
