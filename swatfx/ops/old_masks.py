"""Held masks in the form that they had until 2026-11; nothing else reads it, and nothing writes it.

A held state had 2**62 as the iteration of its last refresh, and a held mask ended in a byte that
was 1 while inactive weights received their gradient. Checkpoints of then are brought into the form
of today as they are loaded. Exported training programs keep their own state, so that the ops
understand it for good: programs of then call them without the arguments `held` and `open`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HELD = 2**62


def is_held(stamp: Tensor, held: Tensor | None) -> bool:
    """Whether a refresh leaves the state alone: what `held` says, or in its absence `stamp`."""
    # No forward counts as far; averages of models may have moved it a little.
    return int(stamp.item()) > _HELD // 2 if held is None else _is_set(held)


def is_open(state: Tensor, size: int, opened: Tensor | None) -> bool:
    """Whether the gradients of inactive weights are let through where updates are masked.

    Args:
        state: of the weight's selector.
        size: elements of the weight.
        opened: what the op was told; None where nothing opens them, or in a program of then.
    """
    if opened is not None:
        return _is_set(opened)
    return _has_byte(state, size) and bool(state[-1].item())


def in_form_of(before: Tensor, state: Tensor, size: int) -> Tensor:
    """A new state, with the last byte where the buffer that it is for (`before`) has one."""
    return torch.cat([state, state.new_zeros(1)]) if _has_byte(before, size) else state


def read(stamp: Tensor, state: Tensor, size: int) -> dict[str, Tensor] | None:
    """What the buffers of a held mask are today; None where `state` is not of then."""
    if not _has_byte(state, size):
        return None
    held = is_held(stamp, None)
    flags = torch.tensor([held, bool(state[-1])], dtype=torch.float64, device="cpu")
    return {
        "threshold": state[:-1].clone(),
        "stamp": torch.full_like(stamp, -1) if held else stamp,
        "held": flags[0].clone(),
        "open": flags[1].clone(),
    }


def _is_set(flag: Tensor) -> bool:
    return bool(flag.item() >= 0.5)


def _has_byte(state: Tensor, size: int) -> bool:
    return state.dtype is torch.uint8 and state.shape == ((size + 7) // 8 + 1,)
