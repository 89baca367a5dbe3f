"""`swatfx bench`: its options, what it measures on, and its progress."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from swatfx import forecast, models
from swatfx.cli.arguments import (
    MOST_THREADS,
    add_compile_options,
    compile_options,
    number,
    refuse_given,
    whole,
)
from swatfx.cli.output import add_formats, check_output, show
from swatfx.cli.subject import allocated, policy_text
from swatfx.errors import InputError
from swatfx.policy import parse
from swatfx.timing import DTYPES, ROUNDS, SECONDS, bench, fit_kernel_times

_PERIOD = 1000


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of `swatfx bench` but for the model, its policy and its input's shape."""
    add = command.add_argument
    add(
        "--tokens",
        type=whole(1),
        metavar="N",
        help="inputs are whole numbers below N (int64), as those of language models",
    )
    add(
        "--period",
        type=whole(),
        metavar="N",
        help=f"steps between two Top-K refreshes, where --policy says none ({_PERIOD})",
    )
    add(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        default=list(DTYPES),
        help="of all forms; bf16 is autocast's (default: both)",
    )
    add("--compile", action="store_true", help="torch.compile of the dense forms, too: minutes")
    add("--rounds", type=whole(), default=ROUNDS, metavar="N", help=f"at most ({ROUNDS})")
    add(
        "--seconds",
        type=number(above=0),
        default=SECONDS,
        metavar="S",
        help=f"to measure for, about; three rounds in any case ({SECONDS:g})",
    )
    add("--threads", type=whole(1, MOST_THREADS), metavar="N", help="CPU threads")
    add("--quiet", action="store_true", help="no progress bar")
    add(
        "--fit",
        action="store_true",
        help="measure kernels alone, without a model, and store what `swatfx.compile` then chooses"
        " them by: minutes, once a machine",
    )
    add_compile_options(command)
    add_formats(command)


def run(
    args: argparse.Namespace, read_shape: Callable[[argparse.Namespace], tuple[int, ...]]
) -> int:
    """Measure as `args` say, and show what came out; return 0.

    Args:
        args: of `add_arguments`, with what every command about a model has.
        read_shape: reads the input's shape from them, with its batch.

    Raises:
        SwatError: as `swatfx.bench`, or a model or an input that cannot be had.
    """
    check_output(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.fit:
        return _fit(args)
    if args.model is None:
        raise InputError("bench wants a model", remedy="name one, or ask for --fit")
    policy = _policy(args)
    model, inputs, loss = models.resolve_with_inputs(args.model, args.num_classes)
    if inputs is None:
        inputs = allocated(lambda shape: _drawn(shape, args.tokens), read_shape(args))
    else:
        given = ("batch_size", "input_shape", "tokens")
        refuse_given(args, given, f"{args.model} returns its own inputs")
    with _progress(args.quiet) as tell:
        found = bench(
            model,
            inputs,
            policy,
            loss=loss,
            dtypes=args.dtype,
            torch_compile=args.compile,
            rounds=args.rounds,
            seconds=args.seconds,
            compile_options=compile_options(args),
            tell=tell,
        )
    return show(replace(found, model=args.model), args)


def _fit(args: argparse.Namespace) -> int:
    names = ("model", "policy", "sparsity", "batch_size", "input_shape", "tokens", "period")
    refuse_given(args, (*names, "num_classes", "compile"), "--fit measures kernels, and no model")
    forecast.made_path()  # before minutes are spent on what cannot be stored
    with _progress(args.quiet) as tell:
        found = fit_kernel_times(tell)
    file = forecast.write(found.constants)
    show(found, args)
    if not args.quiet:
        print(f"stored in {file}", file=sys.stderr)
    return 0


def _policy(args: argparse.Namespace) -> str:
    """What `--policy`, `--sparsity` and `--period` say together, as one string."""
    text = policy_text(args.policy, args.sparsity)
    if re.search(r",\s*period\s*=", text):
        refuse_given(args, ["period"], f"{text} says a period itself")
    elif parse(text).name != "dense":  # which takes no options
        text += f",period={_PERIOD if args.period is None else args.period}"
    parse(text)
    return text


def _drawn(shape: tuple[int, ...], tokens: int | None) -> torch.Tensor:
    """An input of random values, the same every time."""
    generator = torch.Generator().manual_seed(0)
    if tokens is not None:
        return torch.randint(tokens, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], Any]]:
    """What tells a line of progress: on a terminal, and unless it is to be quiet."""
    silent = quiet or not sys.stderr.isatty()
    with tqdm(bar_format="{elapsed} {desc}", disable=silent, leave=False) as bar:
        yield bar.set_description_str
