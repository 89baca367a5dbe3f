"""The clock of a compiled model: which training forward it is in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from swatfx import ops
from swatfx.errors import AttachError

_tokens = itertools.count()


class Clock(nn.Module):
    """Counts training forwards of the root; call it first, with the graph's inputs."""

    iteration: Tensor
    updates: Tensor
    _is_impure = True  # dead-code elimination must not stop the clock

    def __init__(self, optimizer_wanted_by: str | None = None) -> None:
        super().__init__()
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64, device="cpu"))
        # Optimizer steps; on the host as the iteration is, whatever the default device.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.token = next(_tokens)
        self.optimizer_wanted_by = optimizer_wanted_by
        self.attached = False
        self.lost = ""

    def lose(self, layer: str) -> None:
        """Whatever optimizer was attached is not that of the weights any more."""
        self.lost = f" (layer {layer!r} has another weight since one was)"

    def forward(self, *inputs: Any) -> Tensor:
        """Return int64 [5] of `swatfx::step` in training, the bare counter in evaluation."""
        if not self.training:
            return self.iteration
        unattached = self.optimizer_wanted_by is not None and not self.attached
        if unattached and torch.is_grad_enabled():  # else it only gathers statistics: `update_bn`
            raise AttachError(
                f"policy {self.optimizer_wanted_by!r} acts after the optimizer's steps, but none is"
                f" attached{self.lost}",
                remedy="call swatfx.attach(gm, optimizer) before training",
            )
        step: Tensor = ops.step(self.iteration, self.token, _tensors(inputs), True, "")
        self.iteration.copy_(step[2])
        return step

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.token = next(_tokens)  # a deep copy keeps a time of its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Clock:
        # The counter is read by the host at every step: on a GPU it would cost a synchronisation.
        return self


class PartClock(nn.Module):
    """Reads the clock in a part of the model that lies below eager code."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.__dict__["clock"] = clock  # a reference, not a child: its buffer has one name

    def forward(self, *inputs: Any, part: str) -> Tensor:
        """Return int64 [5] of `swatfx::step` for a call of `part`, without advancing."""
        clock: Clock = self.__dict__["clock"]
        if not self.training:
            return clock.iteration
        step: Tensor = ops.step(clock.iteration, clock.token, _tensors(inputs), False, part)
        return step


def _tensors(inputs: Any) -> list[Tensor]:
    leaves = (x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
    return [x for x in leaves if x.layout is torch.strided and not x.is_nested]
