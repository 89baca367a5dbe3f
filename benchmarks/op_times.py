"""Where the time of a step goes: seconds by op, and by kind of op.

Ops are timed where PyTorch dispatches them, below autograd, so that an op of ours counts as one
however it is made. What is left of a step is Python and autograd themselves. A compiled model has
no ops to see: eager ones only.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.sides import Trainer

# First match wins; the text is "phase namespace::op".
_KINDS = (
    ("optimizer", r"^optimizer "),
    ("sparse convolution, forward", r"swatfx::conv$"),
    ("sparse convolution, backward", r"swatfx::conv_backward$"),
    ("packing", r"swatfx::.*pack"),
    ("thresholds", r"swatfx::(step$|.*refresh|.*threshold)"),
    ("linear", r"swatfx::linear|aten::(addmm|mm|bmm|linear)$"),
    ("batch norm", r"norm"),
    ("ReLU", r"relu|aten::threshold_backward"),
    ("pooling", r"pool|aten::mean"),
    ("dense convolution, forward", r"aten::(convolution|mkldnn_convolution)$"),
    ("dense convolution, backward", r"convolution_backward$"),
    ("loss", r"softmax|nll_loss|cross_entropy"),
    ("copies and layout", r"clone|copy|contiguous|layout|empty|_to$|pad"),
    ("additions", r"(add|add_)$"),
)
OUTSIDE = "outside ops"


def kind_of(phase: str, op: str) -> str:
    """The kind of `op`, such as "aten::relu", in "forward", "backward" or "optimizer"."""
    text = f"{phase} {op}"
    return next((kind for kind, pattern in _KINDS if re.search(pattern, text)), "other")


class OpTimes(TorchDispatchMode):
    """Sums seconds and calls by (phase, op) while it is active; set `phase` as phases begin."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "forward"
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.calls: defaultdict[tuple[str, str], int] = defaultdict(int)

    def set_phase(self, name: str) -> None:
        """What comes now belongs to phase `name`."""
        self.phase = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run and time one op."""
        key = (self.phase, str(func._schema.name))
        start = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.seconds[key] += time.perf_counter() - start
            self.calls[key] += 1


def time_budget(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Seconds of a step by kind and by op, means over `steps`; shares add up to 1."""
    with OpTimes() as times:
        start = time.perf_counter()
        for _ in range(steps):
            trainer.step(times.set_phase)
        total = time.perf_counter() - start
    kinds: defaultdict[str, float] = defaultdict(float)
    for (phase, op), seconds in times.seconds.items():
        kinds[kind_of(phase, op)] += seconds
    kinds[OUTSIDE] = total - sum(kinds.values())
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    ops = sorted(times.seconds.items(), key=lambda item: -item[1])
    return {
        "steps": steps,
        "seconds": total / steps,
        "kinds": {k: {"seconds": s / steps, "share": s / total} for k, s in ordered},
        "ops": [
            {
                "phase": phase,
                "op": op,
                "kind": kind_of(phase, op),
                "calls": times.calls[phase, op] / steps,
                "seconds": seconds / steps,
                "share": seconds / total,
            }
            for (phase, op), seconds in ops
            if seconds > 1e-3 * total
        ],
    }
