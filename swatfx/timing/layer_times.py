"""How long each layer takes within a training step: forward and backward, as the step runs it.

A layer's products are found by its weight where the model calls them (in graphs, in eager code, in
modules), so dense and compiled models are watched alike. Forward is that call, and the thresholds
and packs that stand before it in a compiled graph; backward is the autograd nodes that the call
made, timed by their hooks.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swatfx import ops  # noqa: F401 -- registers torch.ops.swatfx
from swatfx.compiled import SwatModule, sparse_layers
from swatfx.timing.steps import Step

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
_PRODUCTS = frozenset(
    {
        *(F.linear, F.conv1d, F.conv2d, F.conv3d),
        *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(torch.ops.swatfx.conv.default, torch.ops.swatfx.linear.default),
    }
)
_LEAF = 2**60  # AccumulateGrad's sequence number is beyond: it belongs to no call


class _Watch(TorchFunctionMode):
    """Sums seconds by (layer, phase) while it is active."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        """Watch the layers whose weights' ids `owners` has."""
        super().__init__()
        self.owners = owners
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.inside = False  # a threshold or a pack, or a product: what they call is theirs

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one function, and time it if it is a layer's product."""
        if func in _PRODUCTS:
            return self._product(func, args, kwargs or {})
        if func is F.multi_head_attention_forward:  # hides its products from modes
            linear = F.linear
            with patch.object(F, "linear", lambda *a, **k: self._product(linear, a, k)):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _product(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        name = self.owners.get(id(weight), self.owners.get(id(getattr(weight, "_base", None))))
        if name is None or self.inside:
            return func(*args, **kwargs)
        first = torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]
        with self.timed(name):
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            for node in _made_since(first, result.grad_fn):
                self._time_backward(name, node)
        return result

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """What runs inside is forward of layer `name`."""
        self.inside, start = True, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name, FORWARD] += time.perf_counter() - start
            self.inside = False

    def _time_backward(self, name: str, node: Any) -> None:
        started: list[float] = []

        def before(_: Any) -> None:
            started.append(time.perf_counter())

        def after(*_: Any) -> None:
            self.seconds[name, BACKWARD] += time.perf_counter() - started.pop()

        node.register_prehook(before)
        node.register_hook(after)


def _made_since(first: int, node: Any) -> Iterator[Any]:
    """Autograd nodes from `node` on that are not older than sequence number `first`."""
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or not first <= node._sequence_nr() < _LEAF:
            continue
        seen.add(node)
        yield node
        todo += [before for before, _ in node.next_functions]


def layer_seconds(step: Step, weights: Mapping[str, str], steps: int = 1) -> dict[str, float]:
    """Mean seconds by "forward NAME" and "backward NAME", and by "forward", ... of a whole step.

    The latter are of further steps, which nobody watches: seeing every call costs those that are no
    layer's, too.

    Args:
        step: what to run; a compiled model's thresholds and packs count as their layers' forward.
        weights: layer -> path of its weight; those that are no parameters are left out.
        steps: to run, of each kind.
    """
    parameters = dict(step.model.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}
    for name, path in weights.items():
        if path in parameters:
            owners.setdefault(id(parameters[path]), name)
    watch = _Watch(owners)
    with ExitStack() as inside:
        for name, module in _helpers(step.model):
            inside.enter_context(_hooked(watch, name, module))
        inside.enter_context(watch)
        for _ in range(steps):
            step.step()
    found = {f"{phase} {name}": seconds for (name, phase), seconds in watch.seconds.items()}
    for _ in range(steps):
        laps: list[tuple[str, float]] = []
        step.step(partial(_lap, laps))
        _lap(laps, "")
        for (phase, start), (_, end) in itertools.pairwise(laps):
            found[phase] = found.get(phase, 0.0) + end - start
    return {name: seconds / steps for name, seconds in found.items()}


def _lap(laps: list[tuple[str, float]], phase: str) -> None:
    """Note that a phase begins."""
    laps.append((phase, time.perf_counter()))


def _helpers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """(layer, threshold or pack) of a compiled model."""
    if isinstance(model, SwatModule):
        for layer in sparse_layers(model):
            for module in layer.state.children():
                yield layer.plan.name, module


@contextmanager
def _hooked(watch: _Watch, name: str, module: nn.Module) -> Iterator[None]:
    """Let `watch` time the module's calls as forward of the layer."""
    running: list[Any] = []

    def before(*_: Any) -> None:
        running.append(watch.timed(name))
        running[-1].__enter__()

    def after(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    handles = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
