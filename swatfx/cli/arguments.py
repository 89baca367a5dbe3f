"""What the options of the command line may hold: types for argparse, each naming its range."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from swatfx.datasets import wants_root
from swatfx.errors import InputError
from swatfx.files.atomic import as_path
from swatfx.options import KERNELS, NORM_SAVES, OPTION_NAMES, VALUE_DTYPES, CompileOptions

LARGEST = 2**31 - 1  # of a count: what C and torch take everywhere
MOST_THREADS = 4096
MOST_CLASSES = 10**6
MOST_SAMPLES = 10**5  # to simulate, which takes seconds each


def whole(low: int = 1, high: int = LARGEST) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text):  # int() takes 1_0 and digits of other scripts
            raise argparse.ArgumentTypeError(f"invalid int value: {text!r}")
        value = int(text[:99])
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low} to {high}")
        return value

    return read


def number(
    *, above: float | None = None, low: float = 0.0, below: float = math.inf
) -> Callable[[str], float]:
    """A finite number from `low` (or above `above`) to less than `below`."""

    def read(text: str) -> float:
        try:
            value = float(text if re.fullmatch(r"[-+.0-9a-zA-Z]+", text) else "")
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None
        fits = low <= value < below if above is None else above < value < below
        if not math.isfinite(value) or not fits:
            left = f"[{low:g}" if above is None else f"({above:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a number in {left}, {below:g})")
        return value

    return read


def given(text: str) -> str:
    """Text that is not empty: an empty one comes of an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty (is a shell variable unset?)")
    return text


def file(text: str) -> str:
    """A name that a file can have; whether there is one is another question."""
    try:
        as_path(given(text), "it")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    value = number(above=0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number in (0, 1]")
    return value


seed = whole(-(2**62), 2**62)


def refuse_given(
    args: argparse.Namespace, names: Iterable[str], problem: str, remedy: str = "leave them out"
) -> None:
    """Raise InputError if the command line gives any of the options, which would do nothing.

    Args:
        args: what was parsed; an option that was not given is None, or False if it is a flag.
        names: of the options, as `args` has them.
        problem: why they would do nothing.
        remedy: what to do about it.
    """
    given = [n for n in names if getattr(args, n) is not None and getattr(args, n) is not False]
    if given:
        value = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InputError(problem, value=value, remedy=remedy)


def refuse_idle_data(args: argparse.Namespace) -> None:
    """Raise InputError for options of data sets that do nothing with `--data`."""
    if args.data is None:
        refuse_given(args, ["data_root"], "a folder of no data set", "add --data")
    elif not wants_root(args.data):
        refuse_given(args, ["data_root"], f"{args.data} is read from no folder", "leave it out")
    if args.data != "imagenet" and "workers" in args:
        refuse_given(args, ["workers"], "only imagenet has reader processes", "leave it out")


def add_compile_options(command: argparse.ArgumentParser) -> None:
    """Add those of `CompileOptions`."""
    add, default = command.add_argument, CompileOptions()
    add(
        "--norm-saves",
        choices=NORM_SAVES,
        default=default.norm_saves,
        help=f"what norms keep for backward (default: {default.norm_saves})",
    )
    add(
        "--value-dtype",
        choices=[name for name in VALUE_DTYPES if name],
        help="of packed values (default: the layer's own)",
    )
    add(
        "--kernels",
        choices=KERNELS,
        default=default.kernels,
        help=f"which ones layers run (default: {default.kernels})",
    )


def compile_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those that `add_compile_options` adds, for `swatfx.compile`."""
    return {name: getattr(args, name) for name in OPTION_NAMES}
