"""What the options of the runners may hold: types for argparse, each refusing what cannot be."""

from __future__ import annotations

import argparse
import os
import pathlib
import re

import torch

from swatfx import selectors
from swatfx.cli import arguments as cli_types
from swatfx.errors import SwatError
from swatfx.policy import as_policy
from swatfx.tuning import check_objective

positive = cli_types.whole()
threads = cli_types.whole(1, cli_types.MOST_THREADS)
sparsity = cli_types.number(above=0, below=1)
rate = cli_types.number(above=0)
given = cli_types.given


def policy(text: str) -> str:
    """A policy's string."""
    try:
        as_policy(text)
    except SwatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def selector(text: str) -> str:
    """A weight selector's name."""
    try:
        selectors.get(text)
    except SwatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def objective(text: str) -> str:
    """What a budget counts."""
    try:
        check_objective(text)
    except SwatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def device(text: str) -> str:
    """A device that is on this machine."""
    try:
        torch.empty(1, device=text).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is no device here: {why}") from None
    return text


def output(text: str) -> pathlib.Path:
    """A file that can be written: its folder is there, or can be made. Better known beforehand."""
    path = pathlib.Path(cli_types.file(text))
    folder = path.absolute().parent
    try:
        while not folder.exists():
            folder = folder.parent
        good = folder.is_dir() and os.access(folder, os.W_OK) and not path.is_dir()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from None
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def folder(text: str) -> pathlib.Path:
    """A folder that is there, or can be made."""
    return output(str(pathlib.PurePath(cli_types.file(text)) / "x")).parent


def tag(text: str) -> str:
    """The end of a file's name; may be empty."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no end of a file's name")
    return text
