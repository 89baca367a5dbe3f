"""The forms that a step is made in, dense and sparse, and their steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swatfx.compiled import SwatModule, all_plans
from swatfx.costs import Report, report
from swatfx.errors import InputError, SwatWarning
from swatfx.options import CompileOptions
from swatfx.pipeline import compile as compile_model
from swatfx.policy import Policy
from swatfx.timing.copies import Inputs, copied, on_meta, twin
from swatfx.timing.rounds import timed
from swatfx.timing.steps import DTYPES, Step, autocast, failure, kept_storages

_TURN, _MOST_STEPS = 0.1, 10  # seconds; steps
_SPARSE_LAYOUT = "channels_last"  # of what is made sparse, where there are images


@dataclass(frozen=True)
class Form:
    """How a step is made.

    Attributes:
        dtype: a name of `DTYPES`.
        layout: "NCHW" or "channels_last"; "" where no tensor is an image.
        compiled: whether torch.compile compiles it.
        policy: what it is made sparse by; "" is dense.
    """

    dtype: str
    layout: str = ""
    compiled: bool = False
    policy: str = ""

    def __str__(self) -> str:
        if self.policy:
            return f"{self.dtype} {self.policy}"
        layout = f" {self.layout}" if self.layout else ""
        return f"{self.dtype}{layout}, {'compiled' if self.compiled else 'eager'}"


def all_forms(
    model: nn.Module, dtypes: Sequence[str], torch_compile: bool, policy: str
) -> Iterator[Form]:
    """Dense forms, the simplest first, then sparse ones."""
    images = any(p.dim() == 4 for p in model.parameters())
    layouts = ("NCHW", "channels_last") if images else ("",)
    for compiled in (False, True) if torch_compile else (False,):
        for dtype in dtypes:
            yield from (Form(dtype, layout, compiled) for layout in layouts)
    for dtype in dtypes:
        yield Form(dtype, _SPARSE_LAYOUT if images else "", policy=policy)


@dataclass
class Forms:
    """The steps of all forms, by the form's name; all start from the same weights."""

    model: nn.Module
    inputs: Inputs
    loss: Callable[[Any], Tensor]
    policy: Policy
    options: CompileOptions

    def __post_init__(self) -> None:
        self.forms: dict[str, Form] = {}
        self.steps: dict[str, Step] = {}
        self.unavailable: dict[str, str] = {}

    def add(self, form: Form) -> None:
        """Make the step of one form, and run it once; note why where it cannot."""
        step = self._made(form)
        reason = failure(step.step)
        if reason is None:
            self.forms[str(form)], self.steps[str(form)] = form, step
        else:
            self.unavailable[str(form)] = reason

    def _made(self, form: Form) -> Step:
        model = twin(self.model)
        inputs = copied(self.inputs, form.layout == "channels_last")
        if form.layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if form.policy:
            with warnings.catch_warnings():
                if self.names(sparse=True):  # what they warn of was told of the first
                    warnings.simplefilter("ignore", SwatWarning)
                options: dict[str, Any] = dict(self.options.to_json())
                with autocast(DTYPES[form.dtype]):  # kernels are chosen for it
                    example = _one(on_meta(inputs))
                    model = compile_model(model, self.policy, example_inputs=example, **options)
        return Step(model, inputs, self.loss, DTYPES[form.dtype], form.compiled)

    def names(self, *, sparse: bool, eager: bool = False) -> list[str]:
        """Of the dense or the sparse forms that ran; with `eager` without compiled ones."""
        return [
            name
            for name, form in self.forms.items()
            if bool(form.policy) == sparse and not (eager and form.compiled)
        ]

    def check(self) -> None:
        """Raise InputError unless a dense eager form and a sparse one ran."""
        if not self.names(sparse=False, eager=True) or not self.names(sparse=True):
            name, reason = next(iter(self.unavailable.items()))
            raise InputError(f"no step of this model runs here: {name}: {reason}")

    def steps_a_turn(self) -> int:
        """How many steps a turn takes, so that turns of the fastest form are not all start-up."""
        took = [timed(step.step)()["seconds"] for step in self.steps.values()]
        return max(1, min(int(_TURN / max(min(took), 1e-9)), _MOST_STEPS))

    def compiled(self, name: str) -> SwatModule:
        """The model of a sparse form."""
        model = self.steps[name].model
        assert isinstance(model, SwatModule)
        return model

    def period(self) -> int | None:
        """Steps between two refreshes, the least of all layers'; None where nothing is sparse."""
        gm = self.compiled(self.names(sparse=True)[0])
        return min((p.rule.period for p in all_plans(gm).values() if p.takes_part), default=None)

    def weights(self, name: str) -> dict[str, str]:
        """Layer -> path of its weight."""
        return {layer: plan.weight for layer, plan in all_plans(self.compiled(name)).items()}

    def report(self, form: Form) -> Report:
        """What `swatfx.report` says of a sparse form, under the form's autocast.

        Inputs are on the meta device, where nothing is computed, if the model runs there.
        """
        gm = self.compiled(str(form))
        with autocast(DTYPES[form.dtype]):
            try:
                return report(gm, _one(on_meta(self.inputs)))
            except InputError:
                return report(gm, _one(self.inputs))

    def saved_bytes(self, name: str) -> int:
        """Bytes that autograd keeps for the forward, parameters and buffers excluded."""
        model = self.steps[name].model
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept = kept_storages(self.steps[name].forward)
        return sum(size for address, size in kept.items() if address not in own)


def _one(inputs: Inputs) -> Any:
    """Inputs as `swatfx.report` takes them."""
    args, named = inputs
    return named if named else args
