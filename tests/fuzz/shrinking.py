"""Simpler cases than one that fails, and which of them still fail alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

from tests.fuzz.cases import LayerCase
from tests.fuzz.methods import Method
from tests.fuzz.networks import Do, NetworkCase


def symptom(problems: list[str]) -> str:
    """What kind of failure it is, without the numbers: died, raised what, or wrong when."""
    if not problems:
        return ""
    text = problems[0].removeprefix("after five draws of data: ")
    if match := re.search(r"Sanitizer: [\w-]+|runtime error: [a-z ]+", text):
        return match[0]
    for word in ("died", "no answer", "harness"):
        if text.startswith(word):
            return word
    when = re.match(r"(train|eval|forward)", text)
    if "raised" in text:
        return re.sub(r"[\d.]+", "#", text[text.index("raised") :])[:90]
    if "gave a result" in text:
        return "no error where eager has one"
    return f"wrong in {when[0] if when else 'part'}"


def shrink(case: Any, wanted: str, smaller: Any, check: Callable[[Any], list[str]]) -> Any:
    """The simplest case that greedy steps lead to, all of which fail with symptom `wanted`."""
    tried = set()
    left = 150
    progress = True
    while progress and left:
        progress = False
        for candidate in smaller(case):
            if repr(candidate) in tried or not left:
                continue
            tried.add(repr(candidate))
            left -= 1
            if symptom(check(candidate)) == wanted:
                case, progress = candidate, True
                break
    return case


def smaller_layers(case: LayerCase) -> list[LayerCase]:
    """Cases with one thing less, boldest first."""
    found = list(_sizes(case))
    plain = LayerCase()
    for name in (
        "steps", "batches", "calls", "after", "before", "stem", "order", "inside", "grad_order",
        "functional", "frozen", "misfit", "value_dtype", "dtype", "threads", "bias", "kernels",
        "pad_mode",
    ):  # fmt: skip
        value = getattr(plain, name)
        if getattr(case, name) != value and not (name == "stem" and case.transposed):
            found.append(replace(case, **{name: value}))
    if len(case.steps) > 1:
        found += [
            replace(case, steps=case.steps[:i] + case.steps[i + 1 :])
            for i in range(len(case.steps))
        ]
    base = Method()
    for f in fields(Method):
        if getattr(case.method, f.name) != getattr(base, f.name) and f.name != "first_dense":
            found.append(
                replace(case, method=replace(case.method, **{f.name: getattr(base, f.name)}))
            )
    if not case.grid:
        found.append(replace(case, grid=True))
    return found


def _sizes(case: LayerCase) -> Iterable[LayerCase]:
    if case.groups > 1:
        width, filters = case.inputs // case.groups, case.outputs // case.groups
        yield replace(case, groups=1, inputs=width, outputs=max(filters, 1))
        half = case.groups // 2
        yield replace(case, groups=half, inputs=width * half, outputs=max(filters, 1) * half)
    for name in ("inputs", "outputs"):
        units = getattr(case, name) // case.groups
        for fewer in {1, units // 2, units - 1}:
            if 0 < fewer < units:
                yield replace(case, **{name: fewer * case.groups})
    if case.batch:
        for fewer in {1, 16, case.batch // 2, case.batch - 1}:
            if 0 < fewer < case.batch:
                yield replace(case, batch=fewer)
    for name, least in (("size", 1), ("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        values = getattr(case, name)
        if isinstance(values, str):
            yield replace(case, **{name: (0,) * case.spatial})
            continue
        for i, value in enumerate(values):
            for fewer in {least, value // 2, value - 1}:
                if least <= fewer < value:
                    yield replace(case, **{name: (*values[:i], fewer, *values[i + 1 :])})


def smaller_networks(case: NetworkCase) -> list[NetworkCase]:
    """Cases with an operation or an option less."""
    ops = case.ops
    found = []
    for length in {len(ops) // 2, 3 * len(ops) // 4, len(ops) - 1}:
        if 0 < length < len(ops):
            found.append(replace(case, ops=ops[:length]))
    found += [replace(case, ops=_without(ops, i)) for i in reversed(range(1, len(ops)))]
    for i, op in enumerate(ops):
        if op.body and op.options[0] > 1:
            found.append(replace(case, ops=(*ops[:i], replace(op, options=(1,)), *ops[i + 1 :])))
        for j in range(len(op.body)):
            if len(op.body) > 1:
                less = replace(op, body=_without(op.body, j))
                found.append(replace(case, ops=(*ops[:i], less, *ops[i + 1 :])))
    plain = NetworkCase()
    for name in ("steps", "order", "norm_saves", "value_dtype", "threads", "kernels"):
        if getattr(case, name) != getattr(plain, name):
            found.append(replace(case, **{name: getattr(plain, name)}))
    found += [replace(case, steps=case.steps[i:]) for i in range(1, len(case.steps))]
    base = Method(first_dense=True)
    for f in fields(Method):
        value = getattr(base, f.name)
        if getattr(case.method, f.name) != value:
            found.append(replace(case, method=replace(case.method, **{f.name: value})))
    for batch in {1, 2, 16}:
        if batch < case.shape[0]:
            found.append(replace(case, shape=(batch, *case.shape[1:])))
    return found


def _without(ops: tuple[Do, ...], gone: int) -> tuple[Do, ...]:
    """Operations but one, whose first source stands in for its value."""
    value, stand_in = gone + 1, ops[gone].sources[0]

    def moved(source: int) -> int:
        source = stand_in if source == value else source
        return source - (source > value)

    kept = []
    for i, op in enumerate(ops):
        if i == gone:
            continue
        options = op.options
        if op.name == "again":
            options = (options[0] - (options[0] > gone),)
        kept.append(replace(op, sources=tuple(moved(s) for s in op.sources), options=options))
    return tuple(kept)
