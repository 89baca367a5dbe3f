"""The paper's tables as data: what each row trains, and the figures it prints.

Figures are percent. Rows that SWAT is compared with stand beside the policy that trains them; where
the accounting cannot follow from shapes alone, `unknown` says why, and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.reproduce.jobs import Network
from swatfx.policy import Policy, per_layer, set_

WEIGHTS, ACTIVATIONS = "weight_sparsity", "activation_sparsity"
TRAINING, KEPT = "training_mac_reduction", "activation_reduction"
INFERENCE = "inference_mac_reduction"
FIGURES = (WEIGHTS, ACTIVATIONS, TRAINING, KEPT, INFERENCE)

_MOVING = "densities move in training, and the figure in print is their mean over it"
_LEARNED = "the sparsity of each layer is learned"
_OFFLINE = "prunes a trained network; no training method"
_TRUNCATED = "44.94 and 43.84 come out, and their whole numbers are in print"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        network: that the paper trains.
        method: as the paper calls it.
        policy: string of the policy that trains it; None where nothing here does.
        printed: figure of `FIGURES` -> percent in print; what the table does not give is not there.
        accuracy: top-1 accuracy in percent, in print.
        change: of accuracy against dense training, in points, in print.
        floor: natural activation sparsity that explains the figures in print (fraction of 1).
        unknown: why no accounting is computed.
        counted: policy that the accounting takes, where it is not the one that trains.
        remark: what a reader of the differences has to know.
    """

    network: Network
    method: str
    policy: str | None
    printed: Mapping[str, float]
    accuracy: float
    change: float
    floor: float = 0.0
    unknown: str = ""
    counted: Policy | None = None
    remark: str = ""


def _figures(*values: float | None) -> dict[str, float]:
    return {k: v for k, v in zip(FIGURES, values, strict=True) if v is not None}


def _table2() -> tuple[Row, ...]:
    vgg, wrn, densenet = (
        Network(f"cifar/{name}", "cifar10") for name in ("vgg16", "wrn-16-8", "densenet121")
    )
    f = _figures
    return (
        Row(vgg, "SNFS", "snfs:0.95", f(95, None, 57, None, 62.9), 93.31, -0.10, unknown=_MOVING),
        Row(vgg, "DST", "dst", f(96.2, None, 75.7, None, 83.2), 93.02, -0.73, unknown=_LEARNED),
        Row(vgg, "SWAT-U", "swat-u:0.9", f(90, 90, 89.7, 36.2, 89.5), 91.95, -1.35),
        Row(vgg, "SWAT-ERK", "swat-erk:0.95", f(95, 82, 89.5, 33, 89.5), 92.50, -0.80),
        Row(vgg, "SWAT-M", "swat-m:0.95", f(95, 65, 64, 25, 58.4), 93.41, 0.11, unknown=_MOVING),
        Row(wrn, "SNFS", "snfs:0.95", f(95, None, 81.8, None, 88), 94.38, -1.05, unknown=_MOVING),
        Row(wrn, "DST", "dst", f(95.4, None, 83.3, None, 91.4), 94.73, -0.45, unknown=_LEARNED),
        Row(wrn, "SWAT-U", "swat-u:0.9", f(90, 90, 90, 49, 90), 95.13, 0.03),
        Row(wrn, "SWAT-ERK", "swat-erk:0.95", f(95, 84, 91.4, 45.8, 91.7), 95.00, -0.10, 0.57),
        Row(
            wrn, "SWAT-M", "swat-m:0.95", f(95, 78, 86.3, 42.5, 85.9), 94.97, -0.13, unknown=_MOVING
        ),
        Row(
            densenet,
            "SWAT-U",
            "swat-u:0.9",
            f(90, 90, 89.8, 44, 89.8),
            94.48,
            0.02,
            remark=_TRUNCATED,
        ),
        Row(
            densenet,
            "SWAT-ERK",
            "swat-erk:0.9",
            f(90, 88, 89.7, 43, 89.6),
            94.14,
            -0.32,
            remark=_TRUNCATED,
        ),
        Row(
            densenet,
            "SWAT-M",
            "swat-m:0.9",
            f(90, 86, 84.2, 42, 83.6),
            94.29,
            -0.17,
            unknown=_MOVING,
        ),
    )


def _table3() -> tuple[Row, ...]:
    resnet, wide = Network("resnet50", "imagenet"), Network("wide_resnet50_2", "imagenet")
    f = _figures
    # (method, policy, activation floor, unknown), then a line for each of the two sparsities.
    methods = {
        ("DSR", "dsr:{}", 0.0, _MOVING): (
            (0.8, f(80, None, 51.6, None, 59.4), 74.1, -2.7),
            (0.9, f(90, None, 58.9, None, 70.7), 71.9, -4.9),
        ),
        ("SNFS", "snfs:{}", 0.0, _MOVING): (
            (0.8, f(80, None, 45.8, None, 43.3), 74.9, -2.1),
            (0.9, f(90, None, 57.6, None, 59.7), 72.9, -4.1),
        ),
        ("RigL", "rigl:{}", 0.0, ""): (
            (0.8, f(80, None, 67.2, None, 77.7), 74.6, -2.2),
            (0.9, f(90, None, 74.1, None, 87.4), 72.0, -4.8),
        ),
        ("DST", "dst", 0.0, _LEARNED): (
            (0.8, f(80.4, None, 67.1, None, 84.9), 74.0, -2.8),
            (0.9, f(90.1, None, 75.8, None, 91.3), 72.8, -4.0),
        ),
        ("SWAT-U", "swat-u:{}", 0.0, ""): (
            (0.8, f(80, 80, 76.1, 39.2, 77.7), 75.2, -1.6),
            (0.9, f(90, 90, 85.6, 44, 87.4), 72.1, -4.7),
        ),
        ("SWAT-ERK", "swat-erk:{}", 0.40, ""): (
            (0.8, f(80, 52, 60, 25.5, 58.9), 76.0, -0.8),
            (0.9, f(90, 64, 79, 31.4, 77.8), 73.8, -3.0),
        ),
        ("SWAT-M", "swat-m:{}", 0.0, _MOVING): (
            (0.8, f(80, 49, 45.9, 23.7, 45), 74.6, -2.2),
            (0.9, f(90, 57, 65.4, 27.2, 64.8), 74.0, -2.8),
        ),
    }
    # "SET and DSR do not sparsify downsampling layers" (section 4.2): what SET's weight column
    # prints is the sparsity of the others, and the figure over all layers is not in print.
    rows = [
        Row(
            resnet,
            "SET",
            f"set:{sparsity}",
            f(None, None, training, None, inference),
            accuracy,
            change,
            counted=per_layer(
                {"*.downsample.0": "dense"}, default=set_(sparsity, distribution="uniform")
            ),
            remark="uniform, downsampling layers dense",
        )
        for sparsity, training, inference, accuracy, change in (
            (0.8, 58.1, 73.0, 73.4, -3.4),
            (0.9, 63.8, 82.1, 71.3, -5.5),
        )
    ]
    rows += [
        Row(resnet, method, policy.format(sparsity), printed, accuracy, change, floor, unknown)
        for (method, policy, floor, unknown), lines in methods.items()
        for sparsity, printed, accuracy, change in lines
    ]
    rows += [
        Row(wide, "SWAT-U", "swat-u:0.8", f(80, 80, 78.6, 39.1, 79.2), 76.4, -2.1),
        Row(wide, "SWAT-U", "swat-u:0.9", f(90, 90, 88.4, 43.9, 89), 74.7, -3.8),
    ]
    return tuple(rows)


def _structured(
    network: Network, *lines: tuple[float, float, float, float, float, float]
) -> list[Row]:
    """Rows of SWAT-U by channels: (percent, training, act, inference, accuracy, change)."""
    return [
        Row(
            network,
            "SWAT-U, channels",
            f"swat-u:{percent / 100:g},weight_selector=channel",
            _figures(percent, percent, training, kept, inference),
            accuracy,
            change,
        )
        for percent, training, kept, inference, accuracy, change in lines
    ]


def _table4() -> tuple[Row, ...]:
    return (
        *_structured(
            Network("cifar/resnet18", "cifar10"),
            (50, 49.8, 26.0, 49.8, 94.73, 0.14),
            (60, 59.8, 31.2, 59.8, 94.68, 0.09),
            (70, 69.8, 36.4, 69.8, 94.65, 0.06),
        ),
        *_structured(
            Network("cifar/densenet121", "cifar10"),
            (50, 49.9, 25.0, 49.9, 95.04, 0.53),
            (60, 59.9, 30.0, 59.9, 94.82, 0.31),
            (70, 69.9, 35.0, 69.9, 94.81, 0.30),
        ),
    )


def _table5() -> tuple[Row, ...]:
    resnet = Network("resnet50", "imagenet")

    def rival(method: str, inference: float, accuracy: float, change: float) -> Row:
        printed = {INFERENCE: inference}
        return Row(resnet, method, None, printed, accuracy, change, unknown=_OFFLINE)

    return (
        rival("DCP", 55.0, 74.95, -1.06),
        rival("CCP", 48.8, 75.50, -0.65),
        rival("AOFP", 56.73, 75.11, -0.23),
        Row(
            resnet,
            "Soft-Pruning",
            "soft-filter:0.3",
            {INFERENCE: 41.8},
            74.61,
            -1.54,
            remark="in print as its authors count: the next layer's input channels go as well",
        ),
        *_structured(
            resnet,
            (50, 47.6, 24.5, 48.6, 76.51, -0.29),
            (60, 57.1, 29.5, 58.3, 76.35, -0.45),
            (70, 66.6, 34.3, 68.0, 75.67, -1.13),
        ),
        *_structured(
            Network("wide_resnet50_2", "imagenet"),
            (50, 49.1, 24.5, 49.5, 78.08, -0.42),
            (60, 58.9, 29.4, 59.4, 77.55, -0.95),
            (70, 68.7, 34.2, 69.3, 77.19, -1.31),
        ),
    )


def _appendix_table1() -> tuple[Row, ...]:
    remarks = {
        "vgg16": "natural zeros of 0.50 would give 69.5",
        "densenet121": "table 2 prints 88.0 for the same densities",
    }
    rows = []
    for name, lines in {
        "vgg16": ((90.0, 69.8, -2.3), (69.6, 71.8, -0.3), (59.9, 72.2, 0.1)),
        "wrn-16-8": ((90.0, 77.6, -1.7), (77.6, 78.5, -0.8), (73.3, 77.9, -1.4)),
        "densenet121": ((90.0, 77.2, -0.4), (90.0, 76.5, -1.1), (84.2, 75.5, -2.1)),
    }.items():
        network = Network(f"cifar/{name}", "cifar100")
        for method, (activations, accuracy, change) in zip("U ERK M".split(), lines, strict=True):
            rows.append(
                Row(
                    network,
                    f"SWAT-{method}",
                    f"swat-{method.lower()}:0.9",
                    {WEIGHTS: 90.0, ACTIVATIONS: activations},
                    accuracy,
                    change,
                    floor=0.57 if (name, method) == ("wrn-16-8", "ERK") else 0.0,  # as in table 2
                    unknown=_MOVING if method == "M" else "",
                    remark=remarks.get(name, "") if method == "ERK" else "",
                )
            )
    return tuple(rows)


def _appendix_table2() -> tuple[Row, ...]:
    return tuple(
        Row(
            Network(f"cifar/{name}", "cifar100"),
            "SWAT-U, channels",
            f"swat-u:{percent / 100:g},weight_selector=channel",
            {WEIGHTS: percent, ACTIVATIONS: percent},
            accuracy,
            change,
        )
        for name, lines in {
            "resnet18": ((50, 76.4, -0.4), (60, 76.2, -0.6), (70, 75.6, -1.2)),
            "densenet121": ((50, 78.7, 0.9), (60, 78.5, 0.4), (70, 78.1, 0.3)),
        }.items()
        for percent, accuracy, change in lines
    )


TABLES = {
    "table2": _table2(),
    "table3": _table3(),
    "table4": _table4(),
    "table5": _table5(),
    "appendix-table1": _appendix_table1(),
    "appendix-table2": _appendix_table2(),
}
