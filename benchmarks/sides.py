"""What is compared: one training step, or one inference, of a network, made in several ways.

A side is a form of the dense model (memory format, torch.compile) or a policy in one of these
forms. All sides of a network start from the same weights and see the same batch.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from benchmarks import options
from swatfx import models
from swatfx.compiled import SwatModule
from swatfx.ops.norm import EXACT
from swatfx.timing.steps import DTYPES, Step, autocast, callable_of, kept_storages

FORMS = ("nchw", "channels_last", "compiled")


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

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return 10 if "/" in self.name else 1000

    def __str__(self) -> str:
        text = f"{self.name}:{self.batch}"
        return f"{text}:{self.side}" if self.side else text


def parse_network(text: str) -> Network:
    """NAME, NAME:BATCH or NAME:BATCH:SIDE; without a batch 16 at 224 pixels, else 128."""
    name, *rest = text.split(":")
    try:
        numbers = [options.positive(word) for word in rest]
    except argparse.ArgumentTypeError:
        numbers = [0]
    if not name.strip() or len(numbers) > 2 or 0 in numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME[:BATCH[:SIDE]]")
    batch = numbers[0] if numbers else (128 if "/" in name else 16)
    return Network(name, batch, numbers[1] if len(numbers) > 1 else None)


@dataclass(frozen=True)
class StepSide:
    """One way to make a step.

    Attributes:
        form: "nchw", "channels_last", or "compiled" (torch.compile of channels_last).
        policy: None for the model as it is, else the policy it is compiled with.
        options: further keywords of `swatfx.compile`.
        budget: `activation_memory_budget` of torch.compile.
        dtype: that of autocast; None: without, in float32.
    """

    form: str
    policy: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    dtype: torch.dtype | None = None

    def missing(self) -> str | None:
        """Why this side cannot be made with the swatfx that is installed, or None."""
        known = inspect.signature(swatfx.compile).parameters
        absent = [name for name in self.options if name not in known]
        return f"swatfx.compile takes no {', '.join(absent)}" if absent else None


DENSE = {f"dense {form}": StepSide(form) for form in FORMS}


def in_dtypes(sides: Mapping[str, StepSide], dtypes: Sequence[str]) -> dict[str, StepSide]:
    """Each side in each of the dtypes, which stands behind the name of those that are not fp32."""
    return {
        name if dtype == "fp32" else f"{name} {dtype}": replace(side, dtype=DTYPES[dtype])
        for dtype in dtypes
        for name, side in sides.items()
    }


def policy_sides(
    policies: Sequence[str], form: str, saves: Sequence[str] = (EXACT,)
) -> dict[str, StepSide]:
    """A side a policy and what it keeps, under the policy's own text, then codes where it does."""
    return {
        policy if s == EXACT else f"{policy} {s}": StepSide(form, policy, {"norm_saves": s})
        for policy in policies
        for s in saves
    }


def exact_twin(name: str, sides: Mapping[str, StepSide]) -> str | None:
    """The side that is as `name` but for what it keeps, which is exact; None: there is none."""
    side = sides[name]
    if side.options.get("norm_saves", EXACT) == EXACT:
        return None
    twin = replace(side, options={**side.options, "norm_saves": EXACT})
    return next((other for other, one in sides.items() if one == twin), None)


class Trainer(Step):
    """One side of one network: its model, batch and optimizer."""

    def __init__(self, network: Network, side: StepSide, model: nn.Module | None = None) -> None:
        """Set up the side; `model` (made anew if None) is copied, not changed."""
        torch.manual_seed(0)
        self.side = side
        generator = torch.Generator().manual_seed(1)
        self.x = as_form(torch.randn(network.shape, generator=generator), side.form)
        self.y = torch.randint(network.classes, (network.batch,), generator=generator)
        super().__init__(
            make_model(network, side, model),
            ((self.x,), {}),
            lambda output: F.cross_entropy(output, self.y),
            side.dtype,
            side.form == "compiled",
        )

    def loss(self) -> Tensor:
        """Forward and loss."""
        with _budget(self.side.budget):
            return super().loss()

    def refreshed_at(self) -> set[int]:
        """The training iterations at which thresholds were last recomputed."""
        if not isinstance(self.model, SwatModule):
            return set()
        return {int(module.stamp.item()) for _, module in self.model.swat.thresholds()}

    def saved_bytes(self) -> dict[str, int]:
        """Bytes of the distinct storages that autograd keeps for backward.

        "saved_bytes" excludes parameters, "saved_bytes_with_parameters" does not.
        """
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        sizes = kept_storages(self.loss)
        return {
            "saved_bytes": sum(size for address, size in sizes.items() if address not in own),
            "saved_bytes_with_parameters": sum(sizes.values()),
        }


class Predictor:
    """One side of one network in evaluation."""

    def __init__(self, network: Network, side: StepSide, model: nn.Module | None = None) -> None:
        """Set up the side; `model` (made anew if None) is copied, not changed."""
        torch.manual_seed(0)
        self.side = side
        self.model = make_model(network, side, model).eval()
        self.call = callable_of(self.model, side.form == "compiled")
        generator = torch.Generator().manual_seed(1)
        self.x = as_form(torch.randn(network.shape, generator=generator), side.form)

    def predict(self) -> Tensor:
        """Logits of the batch."""
        with torch.no_grad(), autocast(self.side.dtype):
            logits: Tensor = self.call(self.x)
        return logits


def make_model(network: Network, side: StepSide, model: nn.Module | None = None) -> nn.Module:
    """The side's model: in its memory format, and rewritten if it has a policy."""
    made = models.create(network.name) if model is None else copy.deepcopy(model)
    if side.form != "nchw":
        made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if side.policy is not None:
        made = swatfx.compile(made, side.policy, **side.options)
    return made


def as_form(x: Tensor, form: str) -> Tensor:
    """An image batch in the memory format of `form`."""
    return x if form == "nchw" else x.contiguous(memory_format=torch.channels_last)


@contextmanager
def _set_budget(budget: float) -> Iterator[None]:
    config: Any = torch._functorch.config
    with config.patch(activation_memory_budget=budget):
        yield


def _budget(budget: float | None) -> AbstractContextManager[None]:
    return nullcontext() if budget is None else _set_budget(budget)
