"""`swatfx simulate`: cycles of a training step on simulated accelerators."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from swatfx import accelerators, models, policy
from swatfx.accelerators.options import SimulationOptions
from swatfx.cli.arguments import (
    MOST_SAMPLES,
    file,
    fraction,
    given,
    number,
    refuse_given,
    refuse_idle_data,
    whole,
)
from swatfx.cli.output import add_formats, check_output, show
from swatfx.cli.subject import compiled
from swatfx.compiled import SwatModule, all_plans
from swatfx.costs import Simulation, simulate, trace_events
from swatfx.datasets import open_data
from swatfx.errors import InputError
from swatfx.files.atomic import write_text
from swatfx.paper import page, table6_trained
from swatfx.paper.table6 import table6
from swatfx.pipeline import compile as compile_model
from swatfx.tables import Page, Table


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of `swatfx simulate` but for the model and its policy."""
    add = command.add_argument
    add(
        "--accelerator",
        type=given,
        action="append",
        metavar="NAME",
        help="e.g. scnn, bit-tactical:lookahead=4",
    )
    add(
        "--samples",
        type=whole(1, MOST_SAMPLES),
        metavar="N",
        help="samples to simulate, each by itself (default: 1)",
    )
    add("--natural-density", type=fraction, help="of drawn forward activations (default: 0.5)")
    add("--seed", type=whole(0), help="of drawn masks (default: 0)")
    add("--checkpoint", type=file, metavar="FILE", help="weights that swatfx train wrote")
    add(
        "--data",
        type=given,
        help="take activations from this data set's test images (see swatfx train)",
    )
    add("--data-root", type=file, metavar="DIR")
    add(
        "--bandwidth",
        type=number(),
        metavar="B",
        help="bytes a cycle; 0 ignores memory (default: 0)",
    )
    add("--word-bytes", type=whole(1, 64), metavar="N", help="bytes of a value (default: 2)")
    add(
        "--sweep",
        type=given,
        metavar="NAME=V..W",
        help="e.g. lookahead=1..4 or sparsity=0,0.5,0.9,0.95",
    )
    add("--trace", type=file, metavar="FILE", help="write the step as a Chrome / Perfetto trace")
    add("--table6", action="store_true", help="the paper's table 6 beside ours")
    add(
        "--seeds",
        type=whole(1, MOST_SAMPLES),
        metavar="N",
        help="mask seeds of --table6 (default: 3)",
    )
    add_formats(command)


_MOST_VALUES = 1000  # of a sweep
_OPTIONS = ("samples", "natural_density", "seed", "bandwidth", "word_bytes")  # of the simulation
_SWEPT = {name: name for name in (*_OPTIONS, "sparsity")} | {"batch": "samples"}


@dataclass(frozen=True)
class Subject:
    """What is simulated: the model, one batch for it, and where that came from."""

    gm: SwatModule
    inputs: tuple[Tensor, ...]


def run(
    args: argparse.Namespace,
    chosen: policy.Policy,
    read_shape: Callable[[argparse.Namespace], tuple[int, ...]],
) -> int:
    """Run the command.

    Args:
        args: of `add_arguments`, with model, num_classes and input_shape.
        chosen: the policy that they name.
        read_shape: reads the input shape from them, with a batch; asked where no data set has one.
    """
    check_output(args)
    refuse_idle_data(args)
    _refuse_idle(args)
    shape = () if args.data else read_shape(args)
    if args.table6:
        return _table6(args, chosen, shape)
    if args.sweep:
        return _sweep(args, chosen, shape)
    subject = _subject(args, chosen, shape)
    found = _simulate(args, subject, args.accelerator or ["scnn", "bit-tactical"])
    if args.trace:
        write_text(args.trace, json.dumps(trace_events(found)))
    return show(found, args)


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raise InputError for options, and for a sweep, that would do nothing beside the others."""
    idle = dict(_idle(args))
    swept = sweep_values(args.sweep)[0] if args.sweep and not args.table6 else ""
    if swept == "sparsity" and args.checkpoint:
        idle[swept] = "with --checkpoint, which has one of its own"
    if swept in idle:
        raise InputError(
            f"a sweep over {swept} has no effect {idle[swept]}",
            value=f"--sweep {args.sweep}",
            remedy="sweep over something else, or leave that out",
        )
    if swept in _SWEPT:
        idle[_SWEPT[swept]] = f"with a sweep over {swept}"
    for why in dict.fromkeys(idle.values()):
        names = [name for name in idle if idle[name] == why]
        refuse_given(args, names, f"options that have no effect {why}")


def _idle(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(an option that has no effect, beside which others, and why)."""

    def each(why: str, *names: str) -> Iterator[tuple[str, str]]:
        return ((name, why) for name in names)

    if args.table6:
        fixed = (name for name in _OPTIONS if name != "samples")
        yield from each("with --table6", "sweep", "trace", *fixed)
        if args.checkpoint or args.data:
            yield from each("with --table6 of a checkpoint, which draws no masks", "seeds")
        else:
            why = "with --table6, which is of SWAT-U at the paper's sparsities"
            yield from each(f"{why}; add --checkpoint and --data for others", "policy", "sparsity")
            yield from each("with --table6 without --checkpoint and --data", "samples")
    else:
        yield from each("without --table6", "seeds")
        if args.sweep:
            yield from each("with --sweep", "trace")
        if args.data:
            yield from each("with --data, whose images are taken", "natural_density")
            if args.checkpoint:
                yield from each("with --checkpoint and --data, where no mask is drawn", "seed")
    if args.data:
        yield from each("with --data, whose images are taken", "input_shape")


def _options(args: argparse.Namespace) -> SimulationOptions:
    given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    return SimulationOptions(**given, draw_weights=args.checkpoint is None)


def _subject(args: argparse.Namespace, chosen: policy.Policy, shape: tuple[int, ...]) -> Subject:
    """The model and a batch: real where a checkpoint and data are given, else on meta."""
    samples = _options(args).samples
    if args.data is None:
        inputs: tuple[Tensor, ...] = (torch.empty((samples, *shape[1:]), device="meta"),)
    else:
        limit = None if args.data == "imagenet" else max(5 * samples, 50)
        data = open_data(args.data, args.data_root, limit=limit)
        images, _ = next(iter(data.test_batches(samples, device="cpu")))
        inputs = (images,)
    if args.checkpoint:
        return Subject(compiled(args, models.resolve(args.model, args.num_classes)), inputs)
    build = models.resolve_on_meta if args.data is None else models.resolve
    return Subject(compile_model(build(args.model, args.num_classes), chosen), inputs)


def _simulate(args: argparse.Namespace, subject: Subject, names: Sequence[str]) -> Simulation:
    layers = len(all_plans(subject.gm))
    with _bar(layers * len(names)) as bar:
        return simulate(subject.gm, subject.inputs, names, options=_options(args), tick=bar.update)


def _bar(total: int | None) -> Any:
    return tqdm(total=total, desc="simulating", unit="layer", disable=not sys.stderr.isatty())


def _table6(args: argparse.Namespace, chosen: policy.Policy, shape: tuple[int, ...]) -> int:
    names = args.accelerator or ["scnn", "bit-tactical"]
    if args.checkpoint or args.data:
        if not (args.checkpoint and args.data):
            raise InputError(
                "table 6 on real masks wants both --checkpoint and --data",
                value="--checkpoint" if args.checkpoint else "--data",
                remedy="add the other, or leave this one out",
            )
        subject = _subject(args, chosen, shape)
        sparsity = subject.gm.swat.policy.sparsity
        with _bar(len(all_plans(subject.gm)) * len(names)) as bar:
            rows = table6_trained(
                subject.gm,
                subject.inputs,
                sparsity,
                names,
                samples=_options(args).samples,
                tick=bar.update,
            )
    else:
        model = models.resolve_on_meta(args.model, args.num_classes)
        with _bar(None) as bar:
            inputs = (torch.empty(1, *shape[1:], device="meta"),)
            rows = table6(model, inputs, names, seeds=args.seeds or 3, tick=bar.update)
    return show(page(rows, args.model), args)


def sweep_values(text: str) -> tuple[str, list[float | int]]:
    """Read "lookahead=1..4" or "sparsity=0,0.5,0.9".

    Raises:
        InputError: neither form.
    """
    name, equals, values = text.partition("=")
    try:
        if ".." in values:
            low, high = (int(v) for v in values.split("..", 1))
            found: list[float | int] = list(range(low, min(high, low + _MOST_VALUES) + 1))
        else:
            found = [float(v) if "." in v else int(v) for v in values.split(",")]
    except ValueError:
        found = []
    if not equals or not found or len(found) > _MOST_VALUES:
        raise InputError(
            f"a sweep is a name and at most {_MOST_VALUES} values",
            value=text,
            remedy="write lookahead=1..4 or a,b,c",
        )
    return name.strip().replace("-", "_"), found


def _sweep(args: argparse.Namespace, chosen: policy.Policy, shape: tuple[int, ...]) -> int:
    name, values = sweep_values(args.sweep)
    rows = list(_sweep_rows(args, chosen, shape, name, values))
    named = {key: [row.get(key) for row in rows] for key in rows[0]}
    unit = "the batch" if name == "batch" else "one sample"
    note = f"simulated cycles of {unit}, all layers; speedups over the dense tile / own dense"
    shown = {key: [_told(value) for value in values] for key, values in named.items()}
    return show(Page((Table.of(shown), note), Table.of(named), rows), args)


def _told(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _sweep_rows(
    args: argparse.Namespace,
    chosen: policy.Policy,
    shape: tuple[int, ...],
    name: str,
    values: Sequence[float | int],
) -> Iterator[dict[str, Any]]:
    if name in ("batch", "samples", "seed", "word_bytes"):
        for value in values:
            if not isinstance(value, int) or not 0 < value <= MOST_SAMPLES and name != "seed":
                raise InputError(f"a sweep over {name} takes whole numbers", value=value)
    designs = args.accelerator or ["bit-tactical" if name != "sparsity" else "scnn"]
    for value in values:
        names, policy_now, options = list(designs), chosen, argparse.Namespace(**vars(args))
        if name == "sparsity":
            policy_now = replace(chosen, sparsity=float(value))
        elif name in _SWEPT:
            setattr(options, _SWEPT[name], value)
        else:
            names = [f"{d}{',' if ':' in d else ':'}{name}={value}" for d in designs]
            for design in names:
                accelerators.parse(design)
        found = _simulate(options, _subject(options, policy_now, shape), names)
        scale = found.samples if name == "batch" else 1  # every sample of it was simulated
        for design, totals in found.totals.items():
            for stage, sums in totals.items():
                yield {
                    name: value,
                    "accelerator": design,
                    "pass": stage,
                    "cycles": round(sums["cycles"] * scale),
                    "x tile": sums["dense_cycles"] / sums["cycles"],
                    "x own dense": sums["own_dense_cycles"] / sums["cycles"],
                    "utilisation": sums["utilisation"],
                    "moved_bytes": round(sums["moved_bytes"] * scale),
                }
