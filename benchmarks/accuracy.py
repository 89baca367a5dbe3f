"""A real training run, side by side: dense, reference and fast kernels, bf16, smaller saves.

    python -m benchmarks.accuracy --data DIR_OR_NPZ [--limit N] [--epochs N] [--seeds N] [--json]
                                  [--policies POLICY ...]

Trains cifar/resnet20 on the first `--limit` images of CIFAR-10, augmented, by the recipe of
`swatfx.runs.recipes` stretched to `--epochs`, and tests on all 10,000 test images. Runs of one seed
start from the same weights and see the same batches. With `--policies` these are compared with the
first of them, all with fast kernels. Beside the JSON file stands one in Markdown,
and the loss curves as PNG where matplotlib is installed. Runs that are finished are kept in the
file `--partial` until all are: started again with the same options, the runner takes them thence.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import common, options
from benchmarks.sides import Network, StepSide, make_model
from benchmarks.training_runs import (
    Partial,
    accuracy_of,
    add_arguments,
    fill,
    heading,
    load_data,
    train_epoch,
)
from swatfx import datasets, kernels
from swatfx.runs import make_optimizer, recipe_for

_EPOCHS = (12, 2)  # the second with --quick
_POINTS = 10  # of a loss curve, an epoch
_REFERENCE = "reference kernels"
_FAST = "fast kernels"


@dataclass(frozen=True)
class Side:
    """One way to train: a step's side, and whether the plain-torch kernels run it."""

    step: StepSide
    reference: bool = False

    def missing(self) -> str | None:
        """Why this side cannot run here, or None."""
        if not self.reference and self.step.policy and not kernels.available():
            return "no compiled kernels"
        return self.step.missing()


def sides(policy: str) -> dict[str, Side]:
    """What is trained, by name."""
    form = "channels_last"

    def fast(dtype: torch.dtype | None = None, **options: Any) -> Side:
        return Side(StepSide(form, policy, options, dtype=dtype))

    return {
        "dense": Side(StepSide(form)),
        "dense under bf16": Side(StepSide(form, dtype=torch.bfloat16)),
        _REFERENCE: Side(StepSide(form, policy), reference=True),
        _FAST: fast(),
        "under bf16": fast(torch.bfloat16),
        "int8 norms": fast(norm_saves="int8"),
        "int4 norms": fast(norm_saves="int4"),
        "bf16 values": fast(value_dtype="bf16"),
    }


def policy_sides(policies: list[str]) -> dict[str, Side]:
    """One a policy, under the policy's own text."""
    return {text: Side(StepSide("channels_last", text)) for text in policies}


def train(
    side: Side,
    data: datasets.Dataset,
    args: argparse.Namespace,
    seed: int,
    tick: Callable[[], object],
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """One run; `keep` gets what there is after every epoch."""
    torch.manual_seed(seed)
    form = side.step.form
    model = make_model(Network(args.model, args.batch_size), side.step)
    optimizer = make_optimizer(recipe_for(args.model, args.dataset), model)
    run: dict[str, Any] = {"losses": [], "epoch_losses": [], "accuracies": [], "seconds": 0.0}
    for epoch in range(args.epochs):
        start = time.perf_counter()
        with kernels.reference_only() if side.reference else nullcontext():
            losses = train_epoch(
                model, optimizer, data, args, seed, epoch, form, tick, dtype=side.step.dtype
            )
            accuracy = accuracy_of(model, data, form, side.step.dtype)
        run["losses"] += _means(losses, _POINTS)
        run["epoch_losses"].append(statistics.fmean(losses))
        run["accuracies"].append(accuracy)
        run["seconds"] += time.perf_counter() - start
        keep(run)
    return run


def _means(values: list[float], parts: int) -> list[float]:
    """Means of `parts` (or fewer) stretches of almost equal length."""
    parts = min(parts, len(values))
    edges = [len(values) * i // parts for i in range(parts + 1)]
    return [statistics.fmean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sides with all seeds."""
    fill(args, epochs=_EPOCHS)
    data = load_data(args)
    if args.policies:
        chosen, base = policy_sides(args.policies), args.policies[0]
    else:
        chosen = {name: side for name, side in sides(args.policy).items() if name in args.sides}
        base = next((name for name in (_REFERENCE, _FAST) if name in chosen), args.sides[0])
    unavailable = {name: why for name, side in chosen.items() if (why := side.missing())}
    names = [name for name in chosen if name not in unavailable]
    keys = ("model", "dataset", "policy", "epochs", "batch_size")
    settings: dict[str, Any] = {key: getattr(args, key) for key in keys}
    if args.policies:
        settings["policy"] = " ".join(args.policies)
    settings |= {"train_images": len(data.train_images), "test_images": len(data.test_images)}
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    versions = common.versions() | {"kernels": kernels.instruction_set(), "allocator": tunables}
    partial = Partial(args.partial, settings | versions)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    steps = data.train_batch_count(args.batch_size) * args.epochs
    with common.progress(args.seeds * len(names) * steps, "accuracy") as bar:
        for seed in range(args.seeds):
            for name in names:
                key = f"{name}, seed {seed}"
                if key in partial.runs:
                    bar.update(steps)
                else:

                    def keep(run: dict[str, Any], key: str = key) -> None:
                        partial.keep(key, run, finished=False)

                    run = train(chosen[name], data, args, seed, bar.update, keep)
                    partial.keep(key, run, finished=True)
                runs[name].append({"seed": seed, **partial.run(key)})
    partial.remove()
    summary = {name: summarise(found) for name, found in runs.items()}
    differences = {
        name: compare(runs[name], runs[base]) for name in names if base in runs and name != base
    }
    return {
        "settings": settings,
        "unavailable": unavailable,
        "summary": summary,
        "base": base,
        "differences_to_base": differences,
        "runs": runs,
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Final accuracy over seeds, and time; the deviation is of the sample."""
    final = [run["accuracies"][-1] for run in runs]
    return {
        "final_accuracy_mean": statistics.fmean(final),
        "final_accuracy_std": statistics.stdev(final) if len(final) > 1 else None,
        "final_loss_mean": statistics.fmean(run["epoch_losses"][-1] for run in runs),
        "seconds_mean": statistics.fmean(run["seconds"] for run in runs),
        "seeds": len(runs),
    }


def compare(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, float]:
    """How far `runs` are from `base`, seed by seed."""
    pairs = list(zip(runs, base, strict=True))
    gaps = [a["accuracies"][-1] - b["accuracies"][-1] for a, b in pairs]
    curves = [abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=True)]
    return {
        "final_accuracy_mean": statistics.fmean(gaps),
        "final_accuracy_largest": max(abs(gap) for gap in gaps),
        "first_loss_largest": max(abs(a["losses"][0] - b["losses"][0]) for a, b in pairs),
        "loss_largest": max(curves),
        "loss_mean": statistics.fmean(curves),
    }


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a side."""
    headers = ["side", "accuracy, mean", "std", "seeds", "loss", "seconds a run"]
    headers.append(f"accuracy less {measured['base']}")
    rows: list[common.Row] = []
    for name, summary in measured["summary"].items():
        gap = measured["differences_to_base"].get(name, {})
        std = summary["final_accuracy_std"]
        rows.append(
            [
                name,
                f"{summary['final_accuracy_mean']:.2%}",
                None if std is None else f"{std:.2%}",
                summary["seeds"],
                summary["final_loss_mean"],
                f"{summary['seconds_mean']:.0f}",
                f"{gap['final_accuracy_mean']:+.2%}" if gap else None,
            ]
        )
    for name, reason in measured["unavailable"].items():
        rows.append([name, reason, *[None] * 5])
    return headers, rows


def curves(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row an epoch: training loss and test accuracy of every side, means over seeds."""
    names = list(measured["runs"])
    headers = ["epoch", *(f"{name}: loss" for name in names), *(f"{n}: accuracy" for n in names)]
    rows: list[common.Row] = []
    for epoch in range(measured["settings"]["epochs"]):
        row: common.Row = [epoch + 1]
        for key, form in (("epoch_losses", ".4f"), ("accuracies", ".2%")):
            for name in names:
                mean = statistics.fmean(run[key][epoch] for run in measured["runs"][name])
                row.append(format(mean, form))
        rows.append(row)
    return headers, rows


def write_companions(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """The Markdown file beside the JSON one, and the picture if it can be drawn."""
    lines = heading(result)
    for allocator, measured in result["allocators"].items():
        settings = ", ".join(f"{k} {v}" for k, v in measured["settings"].items())
        lines += ["", f"## Allocator: {allocator}", "", settings]
        lines += [
            "",
            common.as_markdown(*table(measured)),
            "",
            common.as_markdown(*curves(measured)),
        ]
        picture = path.with_name(f"{path.stem}-{allocator}.png")
        if _draw(measured, picture):
            lines += ["", f"![training loss]({picture.name})"]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _draw(measured: Mapping[str, Any], path: pathlib.Path) -> bool:
    """Loss curves, a line a run; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found]
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="training loss")
    for index, (name, runs) in enumerate(measured["runs"].items()):
        for run in runs:
            points = len(run["losses"]) / measured["settings"]["epochs"]
            xs = [(i + 1) / points for i in range(len(run["losses"]))]
            label = name if run is runs[0] else None
            axes.plot(xs, run["losses"], color=f"C{index}", label=label, linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    names = list(sides("dense"))
    parser.add_argument(
        "--policy", type=options.policy, default="swat-u:0.9", help="of all sides but the dense one"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        type=options.policy,
        metavar="POLICY",
        help="to train, in place of --policy and --sides",
    )
    parser.add_argument("--sides", nargs="+", choices=names, default=names, help="to train")
    add_arguments(parser, seeds=2, epochs=_EPOCHS[0])


BENCHMARK = common.Benchmark(
    "accuracy",
    "training with fast and reference kernels, with smaller saves, and dense",
    _add_arguments,
    measure,
    table,
    (
        "All sides of a seed start from the same weights and see the same batches. Accuracy is of",
        "the last epoch, on all test images; std is of the sample of seeds.",
    ),
    allocator="tuned",
    companions=write_companions,
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
