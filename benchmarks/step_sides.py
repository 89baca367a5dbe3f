"""The sides of `step_cost`: one training step of a network, made in several ways.

A side is a form of the dense model (memory format, torch.compile) or a policy in one of these
forms. All sides start from the same weights and see the same batch.
"""

from __future__ import annotations

import copy
import pathlib
import re
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from benchmarks.topk_cost import by_topk
from swatfx import models


@dataclass(frozen=True)
class Network:
    """What is trained: a name of `swatfx.models.create`, images a step, their side."""

    name: str
    batch: int
    side: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a batch."""
        channels, *extent = models.default_input_shape(self.name)
        return (self.batch, channels, *([self.side] * 2 if self.side else extent))


@dataclass(frozen=True)
class StepSide:
    """One way to make a step.

    Attributes:
        form: "nchw", "channels_last", or "compiled" (torch.compile of channels_last).
        policy: None for the model as it is, else the policy it is compiled with.
        by_topk: find thresholds by torch.topk instead of the reference search.
    """

    form: str
    policy: str | None = None
    by_topk: bool = False


DENSE = {f"model, {form}": StepSide(form) for form in ("nchw", "channels_last", "compiled")}
POLICY_DENSE = {
    f"policy dense, {form}": StepSide(form, "dense") for form in ("nchw", "channels_last")
}
SWAT = {
    "swat-u 90% P=1": StepSide("channels_last", "swat-u:0.9"),
    "swat-u 90% P=1000": StepSide("channels_last", "swat-u:0.9,period=1000"),
    "swat-u 90% P=1, torch.topk": StepSide("channels_last", "swat-u:0.9", by_topk=True),
    "swat-u 90% P=1, nchw": StepSide("nchw", "swat-u:0.9"),
}
SIDES = DENSE | POLICY_DENSE | SWAT


def topk_thresholds() -> AbstractContextManager[Any]:
    """Let selectors find thresholds by torch.topk while it is open."""
    return mock.patch("swatfx.selectors.kth_magnitude", by_topk)


class Trainer:
    """One side of one network: its model, batch and optimizer."""

    def __init__(self, network: Network, side: StepSide, model: nn.Module | None = None) -> None:
        """Set up the side; `model` (made anew if None) is copied, not changed."""
        torch.manual_seed(0)
        original = models.create(network.name) if model is None else copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(network.shape, generator=generator)
        if side.form != "nchw":
            original = original.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.model: nn.Module = original.train()
        if side.policy is not None:
            self.model = swatfx.compile(self.model, side.policy)
        self.call: Callable[[Tensor], Tensor] = self.model
        if side.form == "compiled":
            self.call = torch.compile(self.model)
        self.side = side
        classes = 10 if "/" in network.name else 1000
        self.y = torch.randint(classes, (network.batch,), generator=generator)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        """Forward and loss."""
        return F.cross_entropy(self.call(self.x), self.y)

    def step(self) -> float:
        """One training step; its loss."""
        with topk_thresholds() if self.side.by_topk else nullcontext():
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
        return float(loss.item())

    def saved_bytes(self) -> int:
        """Bytes of the distinct storages that autograd keeps for backward, parameters excluded."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, Any] = {}  # the storages themselves: an address must not be given out again

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return sum(storage.nbytes() for storage in kept.values())


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since it started or since `reset_peak`."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would include what the parent had when it started this process.
        match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Forget the peak so far, such as that of torch.compile's compiler; False if impossible."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory(network: Network, name: str, steps: int) -> dict[str, Any]:
    """Peak memory of one side, to be measured in a process of its own."""
    trainer = Trainer(network, SIDES[name])
    ready = peak_rss_bytes()
    trainer.step()  # the optimizer's state is made here, and torch.compile compiles
    saved = trainer.saved_bytes()
    reset = reset_peak()
    for _ in range(steps):
        trainer.step()
    return {
        "peak_rss_bytes": peak_rss_bytes(),
        "rss_bytes_before_steps": ready,
        "peak_covers_first_step": not reset,
        "saved_for_backward_bytes": saved,
    }
