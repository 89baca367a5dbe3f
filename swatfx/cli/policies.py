"""`swatfx policies`: all of them, or the fields of one with what each means."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields

from swatfx import models, policy
from swatfx.cli.output import add_formats, show
from swatfx.paper import table1
from swatfx.pipeline import compile as compile_model
from swatfx.policy import Policy
from swatfx.tables import Page, Table


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of `swatfx policies`."""
    command.add_argument(
        "policy", nargs="?", metavar="POLICY", help="what one's fields are and mean: rigl:0.9"
    )
    command.add_argument("--table1", action="store_true", help="the paper's table 1 instead")
    add_formats(command)


def run(args: argparse.Namespace) -> int:
    """Print a list, or one."""
    if args.table1:
        return show(table1.page(table1.table1()), args)
    if args.policy is not None:
        return show(_one(_read(args.policy)), args)
    known = {f.name: f.default for f in fields(Policy) if f.name not in ("name", "rules")}
    rows = [
        (name, (build.__doc__ or "").strip().splitlines()[0])
        for name, build in policy.CONSTRUCTORS.items()
    ]
    table = Table(("policy", "what it is"), tuple(rows))
    options = Table(("field", "default"), tuple((n, repr(value)) for n, value in known.items()))
    return show(Page((table, options), table, {"policies": dict(rows), "fields": known}), args)


def _read(text: str) -> Policy:
    """`text` as a policy that a model can be compiled for."""
    chosen = policy.parse(text)
    compile_model(models.create("digits/cnn"), chosen)  # it knows which names there are
    return chosen


def _one(chosen: Policy) -> Page:
    told = _meanings()
    values = {f.name: getattr(chosen, f.name) for f in fields(Policy) if f.name != "rules"}
    rows = [(name, repr(value), told.get(name, "")) for name, value in values.items()]
    table = Table(("field", "value", "meaning"), tuple(rows))
    return Page((table,), table, {"policy": values, "meanings": told})


def _meanings() -> dict[str, str]:
    """What the class says of its fields; nothing where docstrings were stripped."""
    lines = re.findall(r"^ {8}(\w+): ((?:.|\n(?! {8}\w))*)", Policy.__doc__ or "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in lines}


__all__ = ["add_arguments", "run"]
