"""`swatfx train`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields

from swatfx.cli.arguments import (
    MOST_THREADS,
    add_compile_options,
    file,
    given,
    number,
    refuse_idle_data,
    seed,
    whole,
)
from swatfx.runs import RunConfig, RunResult, train_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `swatfx train` to ``parser``; `main` takes what it then parses."""
    add = parser.add_argument
    add(
        "--model", required=True, type=given, help="e.g. cifar/resnet18, or package.module:callable"
    )
    add(
        "--data",
        required=True,
        type=given,
        help="digits, cifar10, cifar100, imagenet or fake[/CxHxW/classes]",
    )
    add("--data-root", type=file, metavar="DIR", help="where the data set's files are")
    add(
        "--policy",
        required=True,
        type=given,
        help='e.g. swat-u:0.9, "swat-erk:0.9,period=100", dense',
    )
    add(
        "--recipe",
        type=given,
        metavar="NAME",
        help="recipe of the paper (default: by model and data)",
    )
    add("--epochs", type=whole(), help="the recipe's schedule is scaled to them (default: its own)")
    add("--batch-size", type=whole(), help="images a step; the learning rate is not adapted to it")
    add(
        "--lr",
        type=number(above=0, below=1e6),
        help="first learning rate; later ones keep their ratio to it",
    )
    add("--seed", type=seed, default=0)
    add("--device", type=given, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--output-dir", type=file, metavar="DIR", help="for config, metrics and checkpoint")
    add("--resume", action="store_true", help="continue the run in --output-dir")
    add("--limit", type=whole(), metavar="N", help="train on the first N images only")
    add("--max-steps", type=whole(), metavar="N", help="stop after N steps, with a checkpoint")
    add("--threads", type=whole(1, MOST_THREADS), metavar="N", help="CPU threads")
    add(
        "--workers",
        type=whole(0, MOST_THREADS),
        metavar="N",
        help="reader processes (imagenet)",
    )
    add_compile_options(parser)
    add("--compile", action="store_true", help="torch.compile the training step")
    add("--tensorboard", action="store_true", help="write TensorBoard events, too")
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="no progress bar and, without --json, no result")


def main(args: argparse.Namespace) -> int:
    """Run `swatfx train`; return 0, or 130 if interrupted. Raises SwatError."""
    refuse_idle_data(args)
    options = {field.name: getattr(args, field.name) for field in fields(RunConfig)}
    options["workers"] = args.workers or 0
    try:
        result = train_run(RunConfig(**options))
    except KeyboardInterrupt:
        hint = "; --resume continues from its last checkpoint" if args.output_dir else ""
        print(f"swatfx train: interrupted{hint}", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(asdict(result)))
    elif not args.quiet:
        print(_summary(result))
    return 0


def _summary(result: RunResult) -> str:
    def density(value: float | None) -> str:
        return "1 (all dense)" if value is None else f"{value:.4f}"

    rows = {
        "epochs": f"{result.epochs}" + ("" if result.finished else " (stopped early)"),
        "steps": f"{result.steps}",
        "train loss": f"{result.train_loss:.4f}",
        "test accuracy": f"{result.test_accuracy:.2%}, best {result.best_test_accuracy:.2%}",
        "weight density": density(result.mean_weight_density),
        "activation density": density(result.mean_activation_density) + " (mean of the layers)",
        "seconds": f"{result.seconds:.1f}",
        "written to": result.output_dir or "nowhere (--output-dir DIR would)",
    }
    return "\n".join(f"{name:20}{value}" for name, value in rows.items())
