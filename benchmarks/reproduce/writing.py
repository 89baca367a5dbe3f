"""What a reproduction says: JSON, Markdown and a picture beside each other, and text."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.reproduce import claims, recorded_claims, tables
from benchmarks.reproduce.experiments import Experiment
from benchmarks.reproduce.jobs import Scale
from benchmarks.reproduce.outcomes import DENSE, Outcome
from benchmarks.reproduce.plotting import draw
from benchmarks.reproduce.table_rows import Row

NOTES = (
    "Accuracy is of the last epoch, on test images; std is of the sample of seeds. Runs of one seed"
    " start from the same weights and see the same batches.",
)
_SMALL = (
    "Trained is {network}, not the paper's network: {images}, {epochs} epochs. The figures in print"
    " are of longer runs of larger networks."
)
_QUARTERS = ("layer", "1st", "2nd", "3rd", "4th")


def of_outcome(experiment: Experiment, outcome: Outcome) -> dict[str, Any]:
    """A JSON-able record of one network's runs, points and findings."""
    findings = experiment.judge(outcome)
    record: dict[str, Any] = {
        "model": outcome.network.model,
        "data": outcome.network.data,
        "points": outcome.points(),
        "findings": [finding.to_json() for finding in findings],
        "verdict": claims.combine(findings) if findings else None,
        "runs": [run.to_json() for runs in outcome.runs.values() for run in runs],
    }
    if experiment.recorded:
        (runs,) = outcome.runs.values()
        record["quarters"] = [
            {"seed": run.job.seed, "kind": kind, "layers": recorded_claims.quarters(run, kind)}
            for run in runs
            for kind in experiment.recorded
        ]
    return record


def result_of(
    experiment: Experiment,
    scale: Scale,
    command: str,
    accounting: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
) -> dict[str, Any]:
    """The whole result, JSON-able."""
    records = [of_outcome(experiment, outcome) for outcome in outcomes]
    verdicts = [
        claims.Finding("", rule="", verdict=record["verdict"])
        for record in records
        if record["verdict"] is not None
    ]
    used = {finding["rule"] for record in records for finding in record["findings"]}
    notes = list(NOTES) if outcomes else []
    for outcome in outcomes:
        if outcome.network not in experiment.networks:
            limit = "all images" if scale.limit is None else f"{scale.limit:,} images"
            epochs = scale.epochs_of(outcome.network)
            notes.append(_SMALL.format(network=outcome.network, images=limit, epochs=epochs))
    return {
        "benchmark": "reproduce",
        "name": experiment.name,
        "description": experiment.title,
        "date": common.today(),
        "command": command,
        "scale": {
            "name": scale.name,
            "limit": scale.limit,
            "epochs": scale.epochs,
            "batch_size": scale.batch_size,
            "seeds": scale.seeds,
        },
        "machine": common.machine(),
        "versions": common.versions(),
        "notes": notes,
        "claim": experiment.claim or None,
        "paper": experiment.paper or None,
        "rules": {name: rule for name, rule in claims.RULES.items() if name in used},
        "verdict": claims.combine(verdicts) if verdicts else None,
        "accounting": list(accounting),
        "accounting_summary": tables.summarise(accounting) if accounting else None,
        "outcomes": records,
    }


def sentence(result: Mapping[str, Any]) -> str:
    """The result in a line."""
    parts = []
    if result["accounting_summary"] is not None:
        parts.append(tables.sentence(result["accounting_summary"]))
    if result["verdict"] is not None:
        parts.append(f"{result['claim']}: {result['verdict']}")
    diverged = sum(run["diverged"] for record in result["outcomes"] for run in record["runs"])
    if diverged:
        parts.append(f"{diverged} runs diverged and count as guessing")
    return f"{result['name']}: " + ("; ".join(parts) or result["description"])


def to_markdown(result: Mapping[str, Any], rows: Sequence[Row], picture: str | None) -> str:
    """The result as a page."""
    described = {**result["machine"], **result["versions"]}
    lines = [f"# {result['name']}: {result['description']}", ""]
    lines += [f"{result['date']}: `{result['command']}`", ""]
    lines += [", ".join(f"{k} {v}" for k, v in described.items() if v is not None), ""]
    lines += [*(f"{note}\n" for note in result["notes"])]
    if result["paper"]:
        lines += [f"The paper: {result['paper']}.", ""]
    lines += [f"**{sentence(result)}.**", ""]
    if result["accounting"]:
        lines += ["Ours (in print, difference), percent:", ""]
        lines += [common.as_markdown(*tables.table(result["accounting"])), ""]
    for record in result["outcomes"]:
        lines += [f"## {record['model']} on {record['data']}", ""]
        lines += [common.as_markdown(*_findings(record)), ""] if record["findings"] else []
        lines += [common.as_markdown(*_points(record, rows)), ""]
        for part in record.get("quarters", []):
            lines += [f"Mean {part['kind']} by quarter of training, seed {part['seed']}:", ""]
            rows_of = [[name, *map("{:.4g}".format, v)] for name, v in part["layers"].items()]
            lines += [common.as_markdown(_QUARTERS, rows_of), ""]
    for name, rule in result["rules"].items():
        lines += [f'- Rule "{name}": {rule}']
    if picture is not None:
        lines += ["", f"![{result['description']}]({picture})"]
    return "\n".join(lines).rstrip() + "\n"


def _findings(record: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    def number(finding: Mapping[str, Any], key: str) -> str | None:
        value = finding[key]
        if value is None:
            return None
        return f"{value:.4f}" if finding["rule"] == "every seed" else f"{100 * value:+.2f} points"

    headers = ["finding", "value", "noise", "rule", "verdict"]
    return headers, [
        [f["what"], number(f, "difference"), number(f, "noise"), f["rule"], f["verdict"]]
        for f in record["findings"]
    ]


def _points(record: Mapping[str, Any], rows: Sequence[Row]) -> tuple[list[str], list[common.Row]]:
    dense = next((p["accuracy_mean"] for p in record["points"] if p["curve"] == DENSE), None)
    headers = ["curve", "x", "accuracy", "std", "less dense", "weight density"]
    headers += ["activation density", "seeds", "diverged", "seconds a run"]
    headers += ["change in print"] if rows else []
    cells: list[common.Row] = []
    for point in record["points"]:
        mean, std = point["accuracy_mean"], point["accuracy_std"]
        line: common.Row = [
            point["curve"],
            None if point["x"] is None else f"{point['x']:g}",
            f"{mean:.2%}",
            None if std is None else f"{std:.2%}",
            None if dense is None else f"{100 * (mean - dense):+.2f}",
            point["weight_density"],
            point["activation_density"],
            point["seeds"],
            point["diverged"],
            f"{point['seconds_mean']:.0f}",
        ]
        own = [row for row in rows if row.policy == point["curve"]]
        if rows:
            line.append(", ".join(f"{row.network.model} {row.change:+g}" for row in own))
        cells.append(line)
    return headers, cells


def write(
    result: Mapping[str, Any],
    experiment: Experiment,
    outcomes: Sequence[Outcome],
    stem: pathlib.Path,
) -> list[pathlib.Path]:
    """Write `stem`.json, .md and, where matplotlib is installed, .png; return what was written."""
    panels = [experiment.panel(outcome) for outcome in outcomes]
    if result["accounting"]:
        panels.insert(0, tables.picture(result["accounting"]))
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "md", "png")]
    common.write_result(result, paths[0])
    drawn = draw(f"{experiment.name}: {experiment.title}", panels, paths[2])
    text = to_markdown(result, experiment.rows, paths[2].name if drawn else None)
    paths[1].write_text(text, encoding="utf-8")
    return paths if drawn else paths[:2]
