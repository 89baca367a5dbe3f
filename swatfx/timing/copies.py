"""Copies of a user's model and batch, so that theirs stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from swatfx.errors import InputError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def described(inputs: Inputs) -> Iterator[str]:
    """Shape and dtype of each tensor."""
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor):
            yield f"{'x'.join(map(str, x.shape)) or 'scalar'} {x.dtype}".replace("torch.", "")


def twin(model: nn.Module) -> nn.Module:
    """A copy of the model, in training mode.

    Raises:
        InputError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model).train()
    except Exception as error:  # of the user's own code, too
        raise InputError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            value=type(model).__name__,
            remedy="hand it before it has run or been pruned: copy.deepcopy(model) has to work",
        ) from error


def copied(inputs: Inputs, channels_last: bool = False) -> Inputs:
    """The same values in tensors of their own; images, of four dimensions, in channels_last."""

    def again(x: Tensor) -> Tensor:
        own = x.detach().clone()
        if channels_last and x.dim() == 4:
            own = own.contiguous(memory_format=torch.channels_last)
        return own.requires_grad_(x.requires_grad)

    found: Inputs = pytree.tree_map_only(Tensor, again, inputs)
    return found


def on_meta(inputs: Inputs) -> Inputs:
    """On the meta device: shapes and dtypes without values."""
    found: Inputs = pytree.tree_map_only(Tensor, lambda x: x.detach().to("meta"), inputs)
    return found
