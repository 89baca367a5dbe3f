"""One training step of a model in one form: what is timed and weighed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from swatfx.compiled import SwatModule
from swatfx.training import attach

_LONG = 10**6  # steps of a training whose masks do not change while it is measured
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
"""What a step runs in, by name: that of autocast; None is without."""


class Step:
    """A model, its inputs, a loss and an optimizer: SGD with momentum.

    Attributes:
        model: in training mode; it trains.
        call: the model, or what torch.compile made of it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Sequence[Any], Mapping[str, Any]],
        loss: Callable[[Any], Tensor],
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        """Set up the step.

        Args:
            model: what is trained; the step changes it.
            inputs: positional ones and ones by name.
            loss: of what the model returns; a scalar.
            dtype: that of autocast; None: without.
            compiled: let torch.compile compile the model, for these shapes.
        """
        self.model = model.train()
        self.call = callable_of(model, compiled)
        self.inputs = inputs
        self.dtype = dtype
        self._loss = loss
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if isinstance(model, SwatModule) and model.swat.policy.needs_optimizer:
            attach(model, self.optimizer, steps_per_epoch=_LONG, total_steps=_LONG)

    def forward(self) -> Any:
        """What the model returns."""
        args, named = self.inputs
        with autocast(self.dtype):
            return self.call(*args, **named)

    def loss(self) -> Tensor:
        """Forward and loss."""
        output = self.forward()
        with autocast(self.dtype):
            return self._loss(output)

    def step(self, phase: Callable[[str], object] = lambda name: None) -> float:
        """One training step; its loss.

        `phase` is called with "forward", "backward", "optimizer" as each begins.
        """
        self.optimizer.zero_grad(set_to_none=True)
        phase("forward")
        loss = self.loss()
        phase("backward")
        loss.backward()
        phase("optimizer")
        self.optimizer.step()
        return float(loss.item())


def callable_of(model: nn.Module, compiled: bool) -> Callable[..., Any]:
    """The model, or what torch.compile makes of it, for one shape of input."""
    return torch.compile(model, dynamic=False) if compiled else model


def autocast(dtype: torch.dtype | None, device: str = "cpu") -> AbstractContextManager[None]:
    """That to `dtype`; none where it is None."""
    if dtype is None:
        return nullcontext()
    found: AbstractContextManager[None] = torch.autocast(device, dtype)
    return found


def kept_storages(run: Callable[[], object]) -> dict[int, int]:
    """Distinct storages that autograd keeps for the backward of `run`: address -> bytes.

    torch.compile's functions save through the same hooks.
    """
    kept: dict[int, Any] = {}  # the storages themselves: an address must not be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return {address: storage.nbytes() for address, storage in kept.items()}


def failure(run: Callable[[], object]) -> str | None:
    """Run once; the first line of what it raised, or None.

    For what depends on the machine, such as the C++ compiler that torch.compile calls.
    """
    try:
        run()
    except Exception as error:  # the compiler stack raises whatever its back ends raise
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
