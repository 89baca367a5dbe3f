"""Tuned densities against uniform and ERK ones, at equal budget, on real training runs.

    python -m benchmarks.tune --data DIR_OR_NPZ [--sparsity S] [--epochs N] [--seeds N] [--json]

The budget is what `swat-u:S` costs a training step. ERK's sparsity is raised until it costs no
more. The tuned densities come from `swatfx.tune`, once, after a short dense warm-up by a seed that
no other run has. Then each policy is trained from scratch with `--seeds` seeds: cifar/resnet20 on
the first `--limit` images of CIFAR-10, augmented, by the recipe of `swatfx.runs.recipes` shrunk to
`--epochs`; tested on all 10,000 test images. Runs of one seed start from the same weights and see
the same batches. What is finished is kept in the file `--partial` until all is: started again with
the same options, the runner takes it thence.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import swatfx
from benchmarks import common, options
from benchmarks.sides import as_form
from benchmarks.training_runs import (
    Partial,
    accuracy_of,
    add_arguments,
    fill,
    heading,
    load_data,
    train_epoch,
)
from swatfx import datasets, models
from swatfx.policy import Policy
from swatfx.runs import make_optimizer, recipe_for
from swatfx.tuning import cost, tune

_WARM_UP_SEED = 1000  # beyond those of the runs that are compared
_EPOCHS, _WARM_UP = (15, 2), (150, 3)  # the second with --quick
_FORM = "channels_last"
TUNED, UNIFORM, ERK = "tuned", "uniform", "erk"


def new_model(args: argparse.Namespace) -> nn.Module:
    """The network, as the seed makes it."""
    return models.create(args.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def example_inputs(args: argparse.Namespace) -> Tensor:
    """A batch without values."""
    shape = (args.batch_size, *models.default_input_shape(args.model))
    return torch.empty(shape, device="meta")


def train(
    model: nn.Module,
    data: datasets.Dataset,
    args: argparse.Namespace,
    seed: int,
    tick: Callable[[], object],
    steps: int | None = None,
) -> list[float]:
    """Train in place, the recipe's whole schedule or the first `steps`; mean losses of epochs."""
    optimizer = make_optimizer(recipe_for(args.model, args.dataset), model)
    count = data.train_batch_count(args.batch_size)
    left = args.epochs * count if steps is None else steps
    means = []
    for epoch in range(math.ceil(left / count)):
        losses = train_epoch(model, optimizer, data, args, seed, epoch, _FORM, tick, left)
        left -= len(losses)
        means.append(statistics.fmean(losses))
    return means


def tuned_policy(args: argparse.Namespace, data: datasets.Dataset) -> Policy:
    """`swatfx.tune` at the budget, after a dense warm-up."""
    torch.manual_seed(_WARM_UP_SEED)
    model = new_model(args)
    train(model, data, args, _WARM_UP_SEED, lambda: None, args.warm_up)
    gm = swatfx.compile(model, f"swat-u:{args.sparsity},first_dense=False")
    # Batches that the warm-up has not seen in this form.
    unseen = data.train_batches(
        args.batch_size, seed=_WARM_UP_SEED, epoch=args.epochs, device="cpu"
    )
    return tune(
        gm,
        ((as_form(images, _FORM), labels) for images, labels in unseen),
        args.objective,
        budget=swatfx.compile(model, f"swat-u:{args.sparsity}"),
        batches=args.batches,
        separate=args.separate,
    )


def erk_policy(args: argparse.Namespace) -> Policy:
    """ERK of the smallest sparsity, in steps of 1e-4, that costs no more than the budget."""
    model, inputs = new_model(args), example_inputs(args)
    allowed = cost(swatfx.compile(model, f"swat-u:{args.sparsity}"), inputs, args.objective)
    low, high = 0, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        gm = swatfx.compile(model, swatfx.swat_erk(middle / 10_000))
        if cost(gm, inputs, args.objective).total <= allowed.total:
            high = middle
        else:
            low = middle
    return swatfx.swat_erk(high / 10_000)


def described(policy: Policy, args: argparse.Namespace) -> dict[str, Any]:
    """What a policy costs, and its densities."""
    inputs = example_inputs(args)
    gm = swatfx.compile(new_model(args), policy)
    report = swatfx.report(gm, inputs)
    return {
        "policy": policy.to_json(),
        "cost_fraction": cost(gm, inputs, args.objective).fraction,
        "weight_sparsity": report.totals["weight_sparsity"],
        "training_mac_reduction": report.totals["training_mac_reduction"],
        "densities": {
            layer.name: [layer.weight_density, layer.activation_density] for layer in report.layers
        },
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All policies with all seeds."""
    fill(args, epochs=_EPOCHS, warm_up=_WARM_UP)
    data = load_data(args)
    keys = ("model", "dataset", "sparsity", "objective", "separate", "epochs", "batch_size")
    settings: dict[str, Any] = {key: getattr(args, key) for key in keys}
    settings |= {"warm_up_steps": args.warm_up, "tuning_batches": args.batches}
    settings |= {"train_images": len(data.train_images), "test_images": len(data.test_images)}
    partial = Partial(args.partial, settings | common.versions())
    if "policies" not in partial.runs:
        chosen_policies = {
            UNIFORM: swatfx.swat_u(args.sparsity),
            ERK: erk_policy(args),
            TUNED: tuned_policy(args, data),
        }
        found = {name: described(policy, args) for name, policy in chosen_policies.items()}
        partial.keep("policies", found, finished=True)
    policies = partial.run("policies")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in policies}
    steps = data.train_batch_count(args.batch_size) * args.epochs
    with common.progress(args.seeds * len(policies) * steps, "tune") as bar:
        for seed in range(args.seeds):
            for name, policy in policies.items():
                key = f"{name}, seed {seed}"
                if key in partial.runs:
                    bar.update(steps)
                else:
                    start = time.perf_counter()
                    torch.manual_seed(seed)
                    gm = swatfx.compile(new_model(args), Policy.from_json(policy["policy"]))
                    losses = train(gm, data, args, seed, bar.update)
                    run = {"losses": losses, "accuracy": accuracy_of(gm, data, _FORM)}
                    run["seconds"] = time.perf_counter() - start
                    partial.keep(key, run, finished=True)
                runs[name].append({"seed": seed, **partial.run(key)})
    partial.remove()
    return {
        "settings": settings,
        "policies": policies,
        "summary": {name: summarise(found) for name, found in runs.items()},
        "tuned_against": {name: compare(runs[TUNED], runs[name]) for name in (UNIFORM, ERK)},
        "runs": runs,
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy and last loss over seeds; deviations are of the sample."""
    accuracies = [run["accuracy"] for run in runs]
    return {
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "last_loss_mean": statistics.fmean(run["losses"][-1] for run in runs),
        "seconds_mean": statistics.fmean(run["seconds"] for run in runs),
        "seeds": len(runs),
    }


def compare(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Gain in accuracy, also in deviations: the root mean square of those of the two sides."""
    ours, theirs = [r["accuracy"] for r in runs], [r["accuracy"] for r in base]
    gain = statistics.fmean(ours) - statistics.fmean(theirs)
    deviations = None
    if len(runs) > 1:
        pooled = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / 2)
        deviations = gain / pooled if pooled else None
    beats = deviations is not None and deviations > 2
    return {"accuracy_gain": gain, "in_deviations": deviations, "by_more_than_two": beats}


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a policy."""
    headers = ["densities", "cost of dense", "weight sparsity", "accuracy, mean", "std", "seeds"]
    headers += ["loss", "tuned gains", "in deviations"]
    rows: list[common.Row] = []
    for name, summary in measured["summary"].items():
        policy, std = measured["policies"][name], summary["accuracy_std"]
        gap = measured["tuned_against"].get(name)
        deviations = gap and gap["in_deviations"]
        rows.append(
            [
                name,
                f"{policy['cost_fraction']:.3%}",
                f"{policy['weight_sparsity']:.2%}",
                f"{summary['accuracy_mean']:.2%}",
                None if std is None else f"{std:.2%}",
                summary["seeds"],
                summary["last_loss_mean"],
                f"{gap['accuracy_gain']:+.2%}" if gap else None,
                None if deviations is None else f"{deviations:+.1f}",
            ]
        )
    return headers, rows


def densities(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a layer: weight and activation density in per cent under each policy."""
    policies = measured["policies"]
    rows: list[common.Row] = []
    for layer in policies[TUNED]["densities"]:
        row: common.Row = [layer]
        for policy in policies.values():
            weight, activation = (f"{100 * d:.3g}" for d in policy["densities"][layer])
            row.append(weight if weight == activation else f"{weight} / {activation}")
        rows.append(row)
    return ["layer", *(f"{name} %" for name in policies)], rows


def write_companions(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """The Markdown file beside the JSON one."""
    lines = [*heading(result), "", *BENCHMARK.notes]
    for measured in result["allocators"].values():
        lines += ["", ", ".join(f"{k} {v}" for k, v in measured["settings"].items())]
        lines += [
            "",
            common.as_markdown(*table(measured)),
            "",
            common.as_markdown(*densities(measured)),
        ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sparsity", type=options.sparsity, default=0.95, help="of SWAT-U, whose cost is met"
    )
    parser.add_argument(
        "--objective", type=options.objective, default="macs", help="what the budget counts"
    )
    parser.add_argument(
        "--separate", action="store_true", help="tune weight and activation densities apart"
    )
    parser.add_argument("--warm-up", type=options.positive, help="dense steps (default: 150)")
    parser.add_argument("--batches", type=options.positive, default=16, help="that tune looks at")
    add_arguments(parser, seeds=3, epochs=_EPOCHS[0])


BENCHMARK = common.Benchmark(
    "tune",
    "tuned densities against uniform and ERK ones at equal budget",
    _add_arguments,
    measure,
    table,
    (
        "All policies of a seed start from the same weights and see the same batches. Accuracy is",
        "that after the last epoch, on all test images; deviations are of the sample of seeds, and",
        "a gain in deviations is over the root mean square of both sides' own.",
    ),
    allocator="tuned",
    companions=write_companions,
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
