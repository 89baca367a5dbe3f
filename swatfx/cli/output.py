"""How a command tells what it found: in a format, on standard output or in a file."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from swatfx.cli.arguments import file
from swatfx.errors import InputError
from swatfx.files.atomic import write_text
from swatfx.tables import FORMATS, Shown


def add_formats(command: argparse.ArgumentParser) -> None:
    """Add `--format`, `--json` and `--output`."""
    add = command.add_argument
    add("--format", choices=FORMATS, help="default: table, fitted to a terminal")
    add("--json", action="store_true", help="the same as --format json")
    add("--output", type=file, metavar="FILE", help="write there instead of printing")


def check_format(args: argparse.Namespace) -> str:
    """Which of the formats that `add_formats` adds is asked for.

    Raises:
        InputError: two of them.
    """
    if args.json and args.format not in (None, "json"):
        raise InputError(
            "--json is --format json, and another format is asked for",
            value=f"--format {args.format}",
            remedy="leave one of the two out",
        )
    return "json" if args.json else args.format or "table"


def check_output(args: argparse.Namespace) -> None:
    """Refuse, before what takes long, what `show` cannot do in the end.

    Raises:
        InputError: as `check_format`, or the folder of `--output` is not there.
    """
    check_format(args)
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise InputError(
            "cannot write the file: its folder is not there",
            value=args.output,
            remedy="make the folder first, or choose another",
        )


def show(found: Shown, args: argparse.Namespace) -> int:
    """Print or write it as `args` say; return 0."""
    on_terminal = args.output is None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else None
    text = found.render(check_format(args), width).rstrip("\n")
    if args.output is None:
        print(text)
    else:
        write_text(args.output, text + "\n")
    return 0
