"""`swatfx compare`: its options, and how a list of policies is read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from swatfx import comparing
from swatfx.cli.arguments import (
    MOST_SAMPLES,
    MOST_THREADS,
    add_compile_options,
    compile_options,
    file,
    given,
    number,
    refuse_given,
    refuse_idle_data,
    whole,
)
from swatfx.cli.output import add_formats, check_output, show
from swatfx.errors import PolicyError
from swatfx.policy import CONSTRUCTORS

_TRAIN = "data data_root epochs limit recipe lr device threads workers compile".split()


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of `swatfx compare` but for the model and its input."""
    add = command.add_argument
    add(
        "--policies",
        nargs="+",
        action="extend",
        required=True,
        type=given,
        metavar="LIST",
        help="split at commas, e.g. swat-u:0.9,rigl:0.9; field=value belongs to the policy before",
    )
    add("--accounting", choices=("paper", "torch", "exact"), default="paper")
    add(
        "--activation-floor",
        type=number(below=1),
        default=0.0,
        metavar="F",
        help="natural sparsity",
    )
    add_compile_options(command)
    add_formats(command)
    group = command.add_argument_group("training, with --train")
    add = group.add_argument
    add("--train", action="store_true", help="train each policy; options as of swatfx train")
    add("--data", type=given, help="digits, cifar10, cifar100, imagenet or fake[/CxHxW/classes]")
    add("--data-root", type=file, metavar="DIR", help="where the data set's files are")
    add("--epochs", type=whole(), help="of each run (default: the recipe's)")
    add(
        "--seeds",
        type=whole(1, MOST_SAMPLES),
        metavar="N",
        help="runs of each policy, seeds from 0 on (default: 1)",
    )
    add("--limit", type=whole(), metavar="N", help="train on the first N images only")
    add(
        "--recipe",
        type=given,
        metavar="NAME",
        help="recipe of the paper (default: by model and data)",
    )
    add("--lr", type=number(above=0, below=1e6), help="first learning rate")
    add(
        "--device",
        type=given,
        help="cpu, cuda, ...: where to train (default: cuda where there is one), or whose kernels"
        " to tell (default: cpu)",
    )
    add("--threads", type=whole(1, MOST_THREADS), metavar="N", help="CPU threads")
    add("--workers", type=whole(0, MOST_THREADS), metavar="N", help="reader processes (imagenet)")
    add("--compile", action="store_true", default=None, help="torch.compile the training step")
    add(
        "--output-dir",
        type=file,
        metavar="DIR",
        help="keeps the runs; finished ones are read from there",
    )
    add("--quiet", action="store_true", help="no progress on stderr")


def split_policies(texts: Sequence[str]) -> list[str]:
    """The policies in ``["swat-u:0.9,period=10,rigl:0.9", "set:0.9"]``, as strings.

    A list is split at commas, which a policy's own fields have too: an item with an equals sign
    that does not begin with a policy's name belongs to the policy before it in the same list.

    Raises:
        PolicyError: a list that begins with a field.
    """
    found: list[str] = []
    for text in texts:
        first = len(found)
        for item in filter(None, (part.strip() for part in text.split(","))):
            name = item.partition(":")[0].partition("=")[0].strip().replace("_", "-")
            if "=" not in item or name in CONSTRUCTORS:
                found.append(item)
            elif len(found) > first:
                found[-1] += f",{item}"
            else:
                raise PolicyError(
                    "a field without a policy before it", value=item, remedy=f"swat-u:0.9,{item}"
                )
    return found


def run(
    args: argparse.Namespace, read_shape: Callable[[argparse.Namespace], tuple[int, ...]]
) -> int:
    """Compare as `args` say, and show the table; return 130 if the user broke training off.

    Args:
        args: of `add_arguments`, with model, num_classes, batch_size and input_shape.
        read_shape: reads the input shape from them, with its batch.

    Raises:
        SwatError: as `comparing.compare`.
    """
    check_output(args)
    policies = split_policies(args.policies)
    for text in args.policies:
        if not split_policies([text]):
            raise PolicyError("there is no policy to compare in a list", value=text)
    for text in policies:
        if policies.count(text) > 1:
            raise PolicyError("a policy is there twice", value=text, remedy="name it once")
    train = _training(args)
    inputs = None
    if train is None:
        inputs = torch.empty(read_shape(args), device="meta")
    try:
        found = comparing.compare(
            args.model,
            policies,
            inputs,
            num_classes=args.num_classes,
            accounting=args.accounting,
            activation_floor=args.activation_floor,
            device=args.device,
            compile_options=compile_options(args),
            train=train,
            tell=_silence if args.quiet else _tell,
        )
    except KeyboardInterrupt:
        hint = "; the same command goes on from there" if args.output_dir else ""
        print(f"swatfx compare: interrupted{hint}", file=sys.stderr)
        return 130
    return show(found, args)


def _training(args: argparse.Namespace) -> dict[str, Any] | None:
    """Training options that were given; None without --train."""
    if not args.train:
        only = [*(n for n in _TRAIN if n != "device"), "seeds", "output_dir", "quiet"]
        refuse_given(
            args, only, "options of training without --train", "add --train, or leave them out"
        )
        return None
    given = {name: value for name in _TRAIN if (value := getattr(args, name)) is not None}
    refuse_given(args, ("num_classes", "input_shape"), "these are the data set's with --train")
    if args.data is not None:  # else the comparison asks for one
        refuse_idle_data(args)
    if args.batch_size is not None:
        given["batch_size"] = args.batch_size
    seeds = 1 if args.seeds is None else args.seeds
    return given | {"seeds": seeds, "output_dir": args.output_dir, "quiet": args.quiet}


def _tell(text: str) -> None:
    print(f"swatfx compare: {text}", file=sys.stderr, flush=True)


def _silence(text: str) -> None:
    """Nothing."""
