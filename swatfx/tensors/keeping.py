"""Selection states beside which kernels may keep what they made of them and of their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_NAME = "swatfx_kept"


def let_keep(state: Tensor) -> Tensor:
    """`state`, which nobody writes into and which stands for one weight as it is now.

    It goes when the weight changes, and what kernels keep goes with it.
    """
    state.__dict__[_NAME] = {}
    return state


def kept(state: Tensor) -> dict[Any, Any] | None:
    """What is kept beside `state`, to be added to; None if nothing may be."""
    found: dict[Any, Any] | None = state.__dict__.get(_NAME)
    return found
