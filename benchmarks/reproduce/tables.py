"""The accounting columns of the paper's tables, from shapes alone, beside the figures in print.

Everything is computed on meta tensors by `swatfx.report(accounting="paper")`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import swatfx
from benchmarks.common import Row as Cells
from benchmarks.reproduce.jobs import Network
from benchmarks.reproduce.plotting import Line, Panel
from benchmarks.reproduce.table_rows import ACTIVATIONS, FIGURES, TRAINING, WEIGHTS, Row
from swatfx import models
from swatfx.policy import Policy, as_policy

BATCH = 32  # no figure depends on it
NEAR = 0.5  # percentage points
_CLASSES = {"cifar100": 100, "imagenet": 1000}
_HEADERS = {
    "weight_sparsity": "W %",
    "activation_sparsity": "Act %",
    "training_mac_reduction": "training MACs -%",
    "activation_reduction": "Act -%",
    "inference_mac_reduction": "inference MACs -%",
}


@functools.cache
def computed(network: Network, policy: Policy | str, floor: float) -> Mapping[str, float]:
    """Figures of `FIGURES` in percent."""
    classes = _CLASSES.get(network.data, 10)
    with torch.device("meta"):
        model = models.create(network.model, num_classes=classes)
        inputs = torch.empty(BATCH, *models.default_input_shape(network.model))
    gm = swatfx.compile(model, policy)
    totals = swatfx.report(gm, inputs, activation_floor=floor).totals
    return {figure: 100 * totals[figure] for figure in FIGURES}


def account(rows: Sequence[Row], tick: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
    """One JSON-able record a row.

    `computed` is with the row's activation floor, `without_floor` without it where it has one;
    `differences` are `computed` less `printed`, in percentage points; `targets` are figures that
    the policy is given, so that a small difference of theirs says nothing.
    """
    records = []
    for row in rows:
        ours: Mapping[str, float] = {}
        bare: Mapping[str, float] | None = None
        policy = row.counted or row.policy
        if policy is not None and not row.unknown:
            ours = computed(row.network, policy, row.floor)
            bare = computed(row.network, policy, 0.0) if row.floor else None
        records.append(
            {
                "model": row.network.model,
                "data": row.network.data,
                "method": row.method,
                "policy": row.policy,
                "printed": dict(row.printed),
                "computed": dict(ours) or None,
                "activation_floor": row.floor,
                "without_floor": bare and dict(bare),
                "targets": _targets(policy),
                "differences": {k: ours[k] - v for k, v in row.printed.items() if k in ours},
                "unknown": row.unknown,
                "remark": row.remark,
                "printed_accuracy": row.accuracy,
                "printed_accuracy_change": row.change,
            }
        )
        tick()
    return records


def _targets(policy: Policy | str | None) -> list[str]:
    if policy is None:
        return []
    uniform = as_policy(policy).distribution == "uniform"
    return [WEIGHTS, ACTIVATIONS] if uniform else [WEIGHTS]


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many figures in print come out, targets aside, and which is the furthest from it.

    `by_natural_zeros` of those within half a point are not without the row's activation floor.
    """
    gaps: list[tuple[float, str, float]] = []
    helped = 0
    for record in records:
        for figure, gap in record["differences"].items():
            if figure in record["targets"]:
                continue
            gaps.append((abs(gap), f"{record['model']} {record['policy']} {figure}", gap))
            bare = record["without_floor"]
            if bare and abs(gap) <= NEAR:
                helped += abs(bare[figure] - record["printed"][figure]) > NEAR
    furthest = max(gaps, default=(0.0, None, None))
    return {
        "figures": len(gaps),
        "within_half_a_point": sum(gap <= NEAR for gap, *_ in gaps),
        "by_natural_zeros": helped,
        "furthest": furthest[1],
        "furthest_difference": furthest[2],
        "rows_not_computed": sum(record["computed"] is None for record in records),
    }


def sentence(summary: Mapping[str, Any]) -> str:
    """`summarise` in a line."""
    if not summary["figures"]:
        return "the table prints targets and accuracies only"
    count = f"{summary['within_half_a_point']} of {summary['figures']} figures"
    parts = [f"{count} come out within half a point of the one in print"]
    if summary["by_natural_zeros"]:
        parts[0] += f", {summary['by_natural_zeros']} by the natural zeros in the remarks"
    parts.append(f"furthest: {summary['furthest']} ({summary['furthest_difference']:+.2f} points)")
    if summary["rows_not_computed"]:
        parts.append(f"{summary['rows_not_computed']} rows do not follow from shapes")
    return "; ".join(parts)


def table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Cells]]:
    """Figures that any row prints, as "ours (paper's, difference)"."""
    figures = [f for f in FIGURES if any(f in record["printed"] for record in records)]
    headers = ["network", "method", "policy", *(_HEADERS[f] for f in figures)]
    headers += ["top-1 in print (change)", "remark"]
    rows: list[Cells] = []
    for record in records:
        cells = [_cell(record, figure) for figure in figures]
        accuracy = f"{record['printed_accuracy']:g} ({record['printed_accuracy_change']:+g})"
        names = [record[key] for key in ("model", "method", "policy")]
        rows.append([*names, *cells, accuracy, _remark(record, figures)])
    return headers, rows


def _cell(record: Mapping[str, Any], figure: str) -> str:
    printed = record["printed"].get(figure)
    if record["computed"] is None:
        return "" if printed is None else f"- ({printed:g})"
    ours = f"{record['computed'][figure]:.1f}"
    if printed is None:
        return ours
    return f"{ours} ({printed:g}, {record['differences'][figure]:+.1f})"


def _remark(record: Mapping[str, Any], figures: Sequence[str]) -> str:
    if record["unknown"]:
        return str(record["unknown"])
    if not record["activation_floor"]:
        return str(record["remark"])
    bare, ours = record["without_floor"], record["computed"]
    changed = [f for f in figures if abs(bare[f] - ours[f]) > 1e-9]
    values = ", ".join(f"{_HEADERS[f]} {bare[f]:.1f}" for f in changed)
    return f"natural zeros {record['activation_floor']:.2f}; without: {values}"


def picture(records: Sequence[Mapping[str, Any]]) -> Panel:
    """Training reductions, or what the table has instead, ours beside those in print."""
    figures = [f for f in FIGURES if any(f in record["differences"] for record in records)]
    figure = TRAINING if TRAINING in figures else figures[-1]
    shown = [record for record in records if figure in record["printed"]]
    names = tuple(f"{record['model']}, {record['policy'] or record['method']}" for record in shown)
    at = tuple(float(i) for i in range(len(shown)))
    printed = tuple(record["printed"][figure] for record in shown)
    found = [(i, r["computed"][figure]) for i, r in enumerate(shown) if r["computed"]]
    ours = tuple(float(i) for i, _ in found), tuple(value for _, value in found)
    lines = Line("in print", at, printed, None, 0), Line("computed", *ours, None, 1)
    return Panel("", _HEADERS[figure], "", lines, bars=names)
