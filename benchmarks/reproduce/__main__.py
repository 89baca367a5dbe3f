"""The paper's tables and figures from one command.

    python -m benchmarks.reproduce list
    python -m benchmarks.reproduce NAME [--scale small] [--data PATH] [--dry-run]

Tables compare the accounting alone, in seconds, unless `--train` is given; figures train. Runs are
kept below `--work`: started again, the command goes on where it was stopped, and figures share the
runs that they have in common.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import common, options
from benchmarks.reproduce import tables, writing
from benchmarks.reproduce.experiments import EXPERIMENTS, Experiment
from benchmarks.reproduce.jobs import SCALES, Arm, Job, Network, Scale, jobs_of, told
from benchmarks.reproduce.outcomes import Outcome
from benchmarks.reproduce.running import Runner, minutes
from swatfx.cli import arguments as cli_types
from swatfx.errors import SwatError

WORK = common.ROOT / "runs" / "reproduce"
Grid = dict[Network, list[tuple[Arm, Job]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with a line on standard error where it does not fit."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args = parser.parse_args(given)
    if args.names == ["list"]:
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:18}{experiment.title}")
        return 0
    chosen = _chosen(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    runner = Runner(
        args.work,
        data_root=args.data,
        device=args.device,
        workers=args.workers,
    )
    scale = _scale(args)
    try:
        _announce(chosen, scale, args, runner)
        for experiment in [] if args.dry_run else chosen:
            _reproduce(experiment, scale, args, runner, _command(given))
    except SwatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _chosen(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Experiment]:
    names = list(EXPERIMENTS) if "all" in args.names else args.names
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; `list` prints what there is")
    # Recorded runs first: they serve the figures that need no recording, but not the reverse.
    chosen = [EXPERIMENTS[name] for name in dict.fromkeys(names)]
    chosen.sort(key=lambda experiment: not experiment.recorded)
    if args.train is False:
        chosen = [experiment for experiment in chosen if experiment.rows]
        if not chosen:
            parser.error("--no-train leaves nothing of a figure")
    return chosen


def _scale(args: argparse.Namespace) -> Scale:
    scale = SCALES[args.scale]
    given = {k: getattr(args, k) for k in ("epochs", "seeds", "batch_size")}
    scale = replace(scale, **{k: v for k, v in given.items() if v is not None})
    return scale if args.limit is None else replace(scale, limit=args.limit or None)


def _grid(experiment: Experiment, scale: Scale, args: argparse.Namespace) -> Grid:
    """(arm, job) pairs of every network; nothing for a table that is not trained."""
    if experiment.rows and not args.train:
        return {}
    networks = experiment.networks if scale.network is None else (scale.network,)
    if args.model or args.dataset:
        base = networks[0]
        networks = (Network(args.model or base.model, args.dataset or base.data),)
    every = scale.every if experiment.recorded else 0
    return {
        network: list(
            jobs_of(experiment.arms(network, scale), network, scale, lr=args.lr, every=every)
        )
        for network in networks
    }


def _announce(
    chosen: Sequence[Experiment], scale: Scale, args: argparse.Namespace, runner: Runner
) -> None:
    """The grids and what they will take: on standard output in a dry run, else on error."""
    out = sys.stdout if args.dry_run else sys.stderr
    jobs: list[Job] = []
    for experiment in chosen:
        for network, pairs in _grid(experiment, scale, args).items():
            print(f"{experiment.name}: {network}, {scale.seeds} seeds", file=out)
            for arm, job in pairs[: len(pairs) // scale.seeds]:
                print(f"  {arm}: {told(job.policy)}, {job.epochs} epochs", file=out)
            jobs += [job for _, job in pairs]
    # A run that one of them wants recorded serves the others too.
    jobs = list({job.folder: job for job in sorted(jobs, key=lambda job: job.every)}.values())
    waiting = [job for job in jobs if runner.finished(job) is None]
    if not waiting:
        print(f"nothing to train: {len(jobs)} runs are finished", file=out)
        return
    seconds = runner.estimate(waiting)
    text = "an unknown time" if seconds is None else f"about {minutes(seconds)}"
    print(
        f"{len(waiting)} of {len(jobs)} runs to train: {text} here, as the machine is now",
        file=out,
        flush=True,
    )


def _reproduce(
    experiment: Experiment, scale: Scale, args: argparse.Namespace, runner: Runner, command: str
) -> None:
    accounting: list[dict[str, Any]] = []
    if experiment.rows:
        with common.progress(len(experiment.rows), experiment.name) as bar:
            accounting = tables.account(experiment.rows, bar.update)
    outcomes = []
    for network, pairs in _grid(experiment, scale, args).items():
        runs = runner.run_all([job for _, job in pairs])
        by_arm: dict[Arm, list[Any]] = {}
        for arm, job in pairs:
            by_arm.setdefault(arm, []).append(runs[job])
        outcomes.append(Outcome(network, by_arm))
    result = writing.result_of(experiment, scale, command, accounting, outcomes)
    print(writing.to_markdown(result, experiment.rows, None))
    folder = args.output or (None if scale.name == "tiny" else common.RESULTS)
    if folder is not None:
        name = f"{result['date']}-reproduce-{experiment.name}"
        parts = [name, *([] if scale.name == "small" or not outcomes else [scale.name]), args.tag]
        stem = folder / "-".join(part for part in parts if part)
        for path in writing.write(result, experiment, outcomes, stem):
            print(f"wrote {path.name}", file=sys.stderr)


def _command(argv: Sequence[str]) -> str:
    """The command line without the folders of its files."""
    words = list(argv)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if index and words[index - 1] == "--work":
            words[index] = pathlib.PurePath(word).name
        elif equals and option == "--work":
            words[index] = f"{option}={pathlib.PurePath(value).name}"
    return common.command("reproduce", words)


def _limit(text: str) -> int:
    return 0 if text == "all" else options.positive(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce",
        description="The paper's tables and figures: runs, verdict, JSON, Markdown and picture.",
    )
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="of a table or figure; list; all")
    add("--scale", choices=SCALES, default="small", help="small: CPU, under an hour; paper: GPU")
    add("--data", type=options.given, metavar="PATH", help="folder or .npz that holds the data set")
    add("--work", type=options.folder, default=WORK, metavar="DIR", help="runs (runs/reproduce)")
    add("--output", type=options.folder, metavar="DIR", help="of results (benchmarks/results)")
    add("--tag", type=options.tag, default="", help="ends the names of result files")
    add("--model", type=options.given, help="of swatfx.models.create, instead of the scale's")
    add("--dataset", type=options.given, help="of swatfx.datasets, instead of the scale's")
    add("--epochs", type=options.positive)
    add("--limit", type=_limit, metavar="N", help="training images, or all; tested: a fifth")
    add("--seeds", type=options.positive)
    add("--batch-size", type=options.positive)
    add("--lr", type=options.rate, help="first learning rate (default: the recipe's)")
    add("--train", action=argparse.BooleanOptionalAction, help="train the policies of tables")
    add("--device", type=options.device, help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--threads", type=options.threads, help="CPU threads (default: PyTorch's)")
    add(
        "--workers",
        type=cli_types.whole(0, cli_types.MOST_THREADS),
        default=0,
        help="processes that read images of imagenet",
    )
    add("--dry-run", action="store_true", help="print the grid and how long it takes")
    return parser


def _with_tuned_allocator() -> None:
    """Start this process anew where glibc gives pages back: training takes up to half as long."""
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        words = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, words, common.worker_environment("tuned"))


if __name__ == "__main__":
    _with_tuned_allocator()
    raise SystemExit(main())
