"""What a step minimises where a user says nothing, and what a user hands is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from swatfx.errors import InputError, SwatError
from swatfx.timing.copies import Inputs, copied, described, twin

CROSS_ENTROPY, OWN, SQUARES = (
    "cross entropy with labels at random",
    "the loss that the model returns",
    "the mean of the squares of what the model returns",
)


def _default_loss(output: Any) -> tuple[str, Callable[[Any], Tensor]]:
    """(what it is, the loss) for a model that returns `output`.

    A scalar called "loss" is itself it; scores (N, classes) have cross entropy; else the mean of
    the squares of all that has a gradient.

    Raises:
        InputError: nothing that is returned has a gradient.
    """
    if _own_loss(output) is not None:
        return OWN, lambda output: _own_loss(output)
    if not _trained(output):
        raise InputError(
            "the model returns no tensor that has a gradient",
            value=type(output).__name__,
            remedy="hand a loss: a function of what the model returns",
        )
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1:
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(output.shape[1], output.shape[:1], generator=generator)
        return CROSS_ENTROPY, lambda output: F.cross_entropy(output, labels)
    return SQUARES, _mean_square


def _own_loss(output: Any) -> Any:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    own = isinstance(found, Tensor) and found.dim() == 0 and found.requires_grad
    return found if own else None


def _trained(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [x for x in leaves if isinstance(x, Tensor) and x.requires_grad and x.numel()]


def _mean_square(output: Any) -> Tensor:
    return torch.stack([x.float().square().mean() for x in _trained(output)]).sum()


def loss_of(
    model: nn.Module, inputs: Inputs, loss: Callable[[Any], Tensor] | None
) -> tuple[str, Callable[[Any], Tensor]]:
    """(what it is, the loss), tried on what a copy of the model returns."""
    own, (args, named) = twin(model), copied(inputs)
    try:
        output = own(*args, **named)
    except SwatError:
        raise
    except Exception as error:  # of the user's own code
        raise InputError(
            f"the model does not run on the example inputs: {type(error).__name__}: {error}",
            value=", ".join(described(inputs)),
            remedy="check their shapes and dtypes",
        ) from error
    if loss is None:
        return _default_loss(output)
    try:
        found = loss(output)
    except Exception as error:
        raise InputError(f"the loss fails: {type(error).__name__}: {error}") from error
    if not (isinstance(found, Tensor) and found.numel() == 1 and found.requires_grad):
        raise InputError(
            "the loss has to return a tensor of one number that has a gradient", value=found
        )
    return "your own loss", loss
