"""The compiled model that a command is about: from `--policy`, or as a checkpoint was trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from torch import Tensor, nn

from swatfx import policy
from swatfx.checkpoint import load
from swatfx.compiled import SwatModule
from swatfx.errors import InputError
from swatfx.pipeline import compile as compile_model
from swatfx.policy import Policy

DEFAULT_POLICY = "swat-u:0.8"


def read_policy(text: str | None, sparsity: float | None) -> Policy:
    """The policy that `policy_text` spells."""
    return policy.parse(policy_text(text, sparsity))


def policy_text(text: str | None, sparsity: float | None) -> str:
    """`--policy` and `--sparsity` together: "swat-u" with 0.9 is "swat-u:0.9"."""
    text = DEFAULT_POLICY if text is None else text
    if sparsity is None:
        return text
    head, comma, tail = text.partition(",")
    return f"{head.partition(':')[0]}:{sparsity}{comma}{tail}"


def compiled(args: argparse.Namespace, model: nn.Module) -> SwatModule:
    """`model` as `--checkpoint` holds it, else compiled for `--policy`.

    Raises:
        InputError: the checkpoint was trained with another policy than the one that is asked for.
    """
    asked = read_policy(args.policy, args.sparsity)
    if not args.checkpoint:
        return compile_model(model, asked)
    gm = load(args.checkpoint, model)
    saved = gm.swat.policy
    if (args.policy is not None or args.sparsity is not None) and saved != asked:
        raise InputError(
            f"{args.checkpoint} was trained with another policy, {saved.name}:{saved.sparsity:g}",
            value=args.policy if args.sparsity is None else f"--sparsity {args.sparsity:g}",
            remedy="leave --policy and --sparsity out, or --checkpoint",
        )
    return gm


def allocated(make: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
    """An input that `make` makes of its shape.

    Raises:
        InputError: it takes more memory than there is.
    """
    try:
        return make(shape)
    except RuntimeError as error:
        raise InputError(
            "an input of this shape cannot be allocated",
            value=shape,
            remedy="give a smaller --batch-size or --input-shape",
        ) from error
