"""A user's own training step: dense forms beside sparse ones, measured side by side."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swatfx import kernels
from swatfx.arguments import (
    AMOUNT,
    COUNT,
    FLAG,
    FUNCTION,
    INPUTS,
    MAPPING,
    SEVERAL,
    as_inputs,
    checked,
    instance,
    optional,
)
from swatfx.compiled import SwatModule, split_inputs
from swatfx.costs import Report
from swatfx.errors import InputError, UnknownNameError
from swatfx.options import CompileOptions
from swatfx.policy import Policy, as_policy
from swatfx.timing.copies import described
from swatfx.timing.forms import Forms, all_forms
from swatfx.timing.layer_times import BACKWARD, FORWARD, OPTIMIZER, layer_seconds
from swatfx.timing.losses import loss_of
from swatfx.timing.machine import allocator, allocator_advice, machine, today, versions
from swatfx.timing.records import BenchResult, FormRecord, LayerTime, verdict_on
from swatfx.timing.rounds import Limit, Rounds, Side, alternate, fastest, ratio, spread
from swatfx.timing.steps import DTYPES, Step

ROUNDS, SECONDS = 20, 40.0
LEAST_ROUNDS = 3
_OF_STEPS = 2 / 3  # of the seconds; the rest is the layers'


def _silence(text: str) -> None:
    """Nothing."""


@checked(
    model=instance(nn.Module),
    example_inputs=INPUTS,
    policy=instance(str, Policy),
    loss=optional(FUNCTION),
    dtypes=SEVERAL,
    torch_compile=FLAG,
    rounds=COUNT,
    seconds=AMOUNT,
    compile_options=optional(MAPPING),
    tell=FUNCTION,
)
def bench(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    policy: Policy | str = "swat-u:0.8,period=1000",
    *,
    loss: Callable[[Any], Tensor] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    torch_compile: bool = False,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    compile_options: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] = _silence,
) -> BenchResult:
    """Time training steps of `model` on this machine's CPU, dense and sparse, in turn.

    A step is forward, loss, backward and SGD with momentum. Dense forms are fp32 and autocast to
    bf16, each in NCHW and channels_last where there are images, each also compiled if
    `torch_compile`; sparse ones are compiled by swatfx, in eager Python.

    Args:
        model: a dense one, on a CPU; copies of it train, itself it stays as it is.
        example_inputs: a batch: a tensor, a tuple of forward's positional inputs, or a dict by
            name.
        policy: what makes it sparse. Steps of a period above 1 mostly hold no refresh of
            thresholds: the first one does, and is not measured.
        loss: of what the model returns, a scalar; None: its own `loss`, cross entropy for scores
            (N, classes), else a mean of squares.
        dtypes: "fp32", "bf16" or both.
        torch_compile: measure torch.compile of the dense forms, too, which takes minutes.
        rounds: at most so many of all forms.
        seconds: to measure for, about; three rounds are measured in any case.
        compile_options: of `swatfx.compile`, by name: `norm_saves`, `value_dtype`, `kernels`.
        tell: called with a line for people before each piece of work.

    Raises:
        InputError: a model that is compiled already, is not on a CPU, trains nothing or does not
            run on the inputs.
        PolicyError: a policy that does not fit the model.
    """
    chosen, options = as_policy(policy), CompileOptions.of(compile_options)
    _check(model, dtypes)
    inputs = split_inputs(as_inputs(example_inputs))
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        tell("running the dense model once")
        what, minimised = loss_of(model, inputs, loss)
        text = policy if isinstance(policy, str) else f"{chosen.name}:{chosen.sparsity:g}"
        built = Forms(model, inputs, minimised, chosen, options)
        for form in all_forms(model, dtypes, torch_compile, _without_period(text)):
            tell(f"preparing {form}")
            built.add(form)
        built.check()
        found = _measured(built, rounds, seconds, tell)
    return replace(
        found,
        policy=text,
        loss=what,
        notes=tuple(_notes(replace(found, loss=what), torch_compile)),
    )


def _measured(
    built: Forms, rounds: int, seconds: float, tell: Callable[[str], object]
) -> BenchResult:
    """Times, bytes and layers of all forms."""
    turn = built.steps_a_turn()
    sides = {name: _told(_turn(step, turn), name, tell) for name, step in built.steps.items()}
    times = alternate(sides, rounds, limit=Limit(seconds * _OF_STEPS, LEAST_ROUNDS))
    dense = fastest(times, built.names(sparse=False))
    ours = fastest(times, built.names(sparse=True))
    beside = fastest(times, built.names(sparse=False, eager=True))
    tell("counting the bytes kept for backward")
    reports = {form.dtype: built.report(form) for form in built.forms.values() if form.policy}
    forms = tuple(_record(built, times, name, dense, reports) for name in built.steps)
    layers, rest = _layers(
        {name: built.steps[name] for name in (ours, beside)},
        reports[built.forms[ours].dtype],
        partial(layer_seconds, weights=built.weights(ours), steps=turn),
        rounds,
        Limit(seconds * (1 - _OF_STEPS), LEAST_ROUNDS),
        tell,
    )
    return BenchResult(
        model=type(built.model).__name__,
        inputs=tuple(described(built.inputs)),
        period=built.period(),
        rounds=len(times[ours]["seconds"]),
        steps_a_round=turn,
        forms=forms,
        unavailable=built.unavailable,
        fastest_dense=dense,
        fastest=ours,
        layers=layers,
        rest=rest,
        layers_beside=beside,
        verdict=verdict_on(ours, dense, ratio(times, dense, ours), layers, rest),
        date=today(),
        machine=machine(),
        versions=versions(),
        allocator=allocator(),
    )


def _check(model: nn.Module, dtypes: Sequence[str]) -> None:
    """Raise InputError where there is nothing to compare, or not here."""
    if any(isinstance(module, SwatModule) for module in model.modules()):
        raise InputError(
            "the model is compiled already: there is no dense form to compare with",
            value=type(model).__name__,
            remedy="hand the model that swatfx.compile was given",
        )
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UnknownNameError("dtype", str(dtype), DTYPES)
    if not dtypes:
        raise InputError("there is no dtype to measure", remedy=f"name one of {tuple(DTYPES)}")
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise InputError(
            "the model has parameters without a shape yet",
            value=type(model).__name__,
            remedy="run it once on a batch before it is measured",
        )
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    if devices - {"cpu"}:
        raise InputError(
            "steps are timed on CPUs, where the sparse kernels run",
            value=", ".join(sorted(devices)),
            remedy='move the model: model.to("cpu")',
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the model has no parameter that trains", value=type(model).__name__)


def _told(side: Side, name: str, tell: Callable[[str], object]) -> Side:
    """`side`, told before it runs."""
    count = itertools.count()  # round 0 is the warm-up

    def run() -> Mapping[str, float]:
        tell(f"round {next(count)}: {name}")
        return side()

    return run


def _turn(step: Step, count: int) -> Side:
    """Measures the seconds of a step, a mean over `count` of them."""

    def run() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(count):
            step.step()
        return {"seconds": (time.perf_counter() - start) / count}

    return run


def _record(
    built: Forms, times: Rounds, name: str, dense: str, reports: Mapping[str, Report]
) -> FormRecord:
    form = built.forms[name]
    known = form.dtype in reports and not form.compiled
    totals = reports[form.dtype].totals if known else {}
    key = "saved_bytes" if form.policy else "dense_saved_bytes"
    return FormRecord(
        name=name,
        dtype=form.dtype,
        layout=form.layout,
        compiled=form.compiled,
        policy=form.policy,
        seconds=spread(times[name]["seconds"]).to_json(),
        speedup=ratio(times, dense, name),
        saved_bytes=built.saved_bytes(name),
        predicted_saved_bytes=totals.get(key),
    )


def _layers(
    steps: Mapping[str, Step],
    found: Report,
    measure: Callable[[Step], Mapping[str, float]],
    rounds: int,
    limit: Limit,
    tell: Callable[[str], object],
) -> tuple[tuple[LayerTime, ...], tuple[LayerTime, ...]]:
    """(layers, other parts) of the sparse step, the first of `steps`, beside the dense one."""
    sides: dict[str, Side] = {
        name: _told(partial(measure, step), f"layers of {name}", tell)
        for name, step in steps.items()
    }
    times = alternate(sides, rounds, limit=limit)
    ours, dense = (_Parts(times[name]) for name in steps)
    whole = ours.total()
    layers = []
    for row in found.layers:
        seconds, other = ours.of(row.name), dense.of(row.name)
        sparse = row.kernels == "sparse"
        layers.append(
            LayerTime(
                row.name,
                row.kind,
                row.weight_shape,
                *seconds,
                *other,
                share=None if seconds[0] is None else seconds[0] / whole,
                kernels="sparse" if sparse else "dense",
                why=None if sparse else row.skipped or row.kernels.removeprefix("dense: ") or None,
            )
        )
    rest = [
        LayerTime(
            text,
            seconds=ours.rest(phase),
            dense_seconds=dense.rest(phase),
            share=ours.rest(phase) / whole,
        )
        for phase, text in _REST.items()
    ]
    return tuple(layers), tuple(rest)


_REST = {
    FORWARD: "all other ops, forward",
    BACKWARD: "all other ops, backward",
    OPTIMIZER: "the optimizer's step",
}


class _Parts:
    """Medians over rounds of what `layer_seconds` gives."""

    def __init__(self, rounds: Mapping[str, Sequence[float]]) -> None:
        self._medians = {name: spread(values).median for name, values in rounds.items()}

    def of(self, layer: str) -> tuple[float | None, float | None, float | None]:
        """Both, forward, backward of a layer; None where it was not seen."""
        forward = self._medians.get(f"{FORWARD} {layer}")
        if forward is None:
            return None, None, None
        backward = self._medians.get(f"{BACKWARD} {layer}", 0.0)
        return forward + backward, forward, backward

    def total(self) -> float:
        """Of the whole step."""
        return sum(self._medians[phase] for phase in _REST)

    def rest(self, phase: str) -> float:
        """Of a phase without its layers."""
        layers = sum(v for name, v in self._medians.items() if name.startswith(f"{phase} "))
        return max(self._medians[phase] - layers, 0.0)


def _notes(found: BenchResult, torch_compile: bool) -> Iterator[str]:
    """What a reader of the figures has to know."""
    rounds, turn, period = found.rounds, found.steps_a_round, found.period
    yield (
        f"a step is forward, loss ({found.loss}), backward and SGD with momentum; forms take turns,"
        f" {rounds} rounds of {turn} step{'s' if turn > 1 else ''} each; speed-ups are over the"
        " fastest dense form, round by round"
    )
    if period is None:
        yield "no layer is sparse"
    elif period == 1:
        yield "thresholds are refreshed at every step"
    else:
        some = "some of those measured" if period <= rounds * turn else "none of those measured"
        yield f"thresholds are refreshed every {period} steps, in {some}"
    if not torch_compile:
        yield "torch.compile of the dense forms was not measured: --compile (torch_compile=True)"
    if not kernels.available():
        yield "there are no compiled kernels here: sparse forms run dense arithmetic on masks"
    facts = found.machine
    yield f"{facts['processor']}, threads: {facts['threads']}, kernels: {facts['swatfx_kernels']}"
    advice = allocator_advice()
    if advice is not None:
        yield advice


def _without_period(policy: str) -> str:
    return re.sub(r",\s*period\s*=[^,]*", "", policy)
