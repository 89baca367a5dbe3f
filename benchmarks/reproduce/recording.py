"""Thresholds and realised densities while a model trains, written down every few steps.

Whatever trains the model need not know: hooks that PyTorch calls for every module find the compiled
model by its type.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from swatfx import observe
from swatfx.compiled import SwatModule, WeightThreshold

_DIGITS = 7


@dataclass(frozen=True)
class Recorded:
    """One training step.

    Attributes:
        step: which, counted from 0.
        thresholds: layer -> the weight threshold that the step used, where it is one number.
        weight_density: layer -> fraction of weights active in it.
        activation_density: layer -> fraction of input elements kept for backward.
    """

    step: int
    thresholds: dict[str, float]
    weight_density: dict[str, float]
    activation_density: dict[str, float]


@contextlib.contextmanager
def recording(path: pathlib.Path, every: int) -> Iterator[None]:
    """Append every `every`-th training step of compiled models in the block to the file `path`.

    Steps are training forwards, as the model's own clock counts them. A run that is resumed writes
    steps since its checkpoint once more; `read` takes the later line.
    """
    watches: dict[int, tuple[int, contextlib.ExitStack, Any]] = {}

    def before(module: nn.Module, args: Any) -> None:
        if not (isinstance(module, SwatModule) and module.training and torch.is_grad_enabled()):
            return
        step = int(module.swat.clock.iteration.item())
        if step % every == 0:
            stack = contextlib.ExitStack()
            watches[id(module)] = step, stack, stack.enter_context(observe(module))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) not in watches:
            return
        step, stack, seen = watches.pop(id(module))
        stack.close()
        assert isinstance(module, SwatModule)
        thresholds = {
            state.layer: state.threshold.item()
            for _, state in module.swat.thresholds()
            if isinstance(state, WeightThreshold) and state.threshold.shape == ()
        }
        values = (thresholds, seen.weight_density, seen.activation_density)
        rounded = [{k: float(f"{v:.{_DIGITS}g}") for k, v in one.items()} for one in values]
        file.write(json.dumps([step, *rounded]) + "\n")
        file.flush()

    with path.open("a", encoding="utf-8") as file:
        hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for _, stack, _ in watches.values():
                stack.close()


def read(path: pathlib.Path) -> list[Recorded]:
    """The steps in the file `path`, in order; none where it is not there."""
    if not path.exists():
        return []
    steps: dict[int, Recorded] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a line that a killed process left half written
            step, *values = json.loads(line)
            steps[step] = Recorded(step, *values)
    return [steps[step] for step in sorted(steps)]
