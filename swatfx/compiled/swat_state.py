"""The child `swat` of a compiled model: all that it remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swatfx.compiled import saved_policy
from swatfx.compiled.clock import Clock, PartClock
from swatfx.compiled.state import Threshold
from swatfx.options import CompileOptions
from swatfx.policy import Policy


class LayerState(nn.Module):
    """Container of one layer's thresholds and packs.

    Where densities move, which kernels run the layer depends on those that ran it before: the
    buffer `sparse`, uint8 0-dim on the host, is 1 if they were sparse.

    Args:
        remembers_kernels: whether densities move; else there is no buffer.
    """

    sparse: Tensor | None

    def __init__(self, remembers_kernels: bool = False) -> None:
        super().__init__()
        self.register_buffer("sparse", None)
        if remembers_kernels:
            self.sparse = torch.zeros((), dtype=torch.uint8, device="cpu")

    @property
    def remembers_kernels(self) -> bool:
        """Whether densities move."""
        return self.sparse is not None

    @property
    def ran_sparse(self) -> bool:
        """Whether sparse kernels ran the layer when it was looked at last."""
        return self.sparse is not None and bool(self.sparse)

    def note_kernels(self, sparse: bool) -> None:
        """Remember which kernels run the layer."""
        if self.sparse is not None:
            self.sparse.fill_(sparse)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerState:
        sparse, self._buffers["sparse"] = self.sparse, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers["sparse"] = sparse
        return self


@dataclass(frozen=True)
class Example:
    """The call that kernels are chosen for.

    Attributes:
        inputs: positional ones or a dict by name, tensors on the meta device.
        autocast: "fp32" or "bf16", where autocast was on; None: activations are as weights are.
    """

    inputs: Any
    autocast: str | None = None


class SwatState(nn.Module):
    """The child `swat` of a compiled model: a clock, and a LayerState a layer."""

    clock: Clock
    memory: Tensor | None

    def __init__(self, policy: Policy, options: CompileOptions | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.options = CompileOptions() if options is None else options
        self.example: Example | None = None
        self.predicted = ""  # what the chosen kernels are predicted to take; for people
        self.clock = Clock(policy.name if policy.needs_optimizer else None)
        self.part_clock = PartClock(self.clock)
        self.register_buffer("memory", None)
        self.stale = False  # a dense checkpoint was loaded: weight thresholds want recomputing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SwatState:
        memory = self.memory  # read by the host, and exact, as all numbers of the clock are
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers["memory"] = memory
        return self

    def remember(self, count: int) -> None:
        """Give each of `count` budgets a number that its drop rule may remember by."""
        self._buffers["memory"] = torch.zeros(count, dtype=torch.float64, device="cpu")

    def memory_of(self, budget: int) -> Tensor:
        """float64 [1] of one budget, a view."""
        assert self.memory is not None
        return self.memory[budget : budget + 1]

    def thresholds(self) -> Iterator[tuple[str, Threshold]]:
        """(path below `swat`, module) of every threshold."""
        for name, module in self.named_modules():
            if isinstance(module, Threshold):
                yield name, module

    def get_extra_state(self) -> Tensor:
        """The policy, so that a state dict says what it belongs to."""
        return saved_policy.as_tensor(self.policy)

    def set_extra_state(self, state: Any) -> None:
        """Nothing: a state of another policy was refused before."""

    def check_policy(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise CheckpointError if `state_dict`, our keys at `prefix`, is of another policy."""
        own = {name: buffer for name, buffer in self.named_buffers() if buffer is not None}
        saved_policy.check(self.policy, state_dict, prefix, own)

    def spare_keys(self) -> set[str]:
        """Keys that checkpoints of earlier versions lack: of calls without a state, of kernels."""
        calls = {
            f"{path}.{key}"
            for path, threshold in self.thresholds()
            for key in threshold.state_dict()
            if threshold.is_spare or key.startswith("later")
        }
        layers = ((name, m) for name, m in self.named_children() if isinstance(m, LayerState))
        return calls | {f"{name}.sparse" for name, layer in layers if layer.remembers_kernels}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.check_policy(state_dict, prefix)
        # A checkpoint of the dense model has none of our keys: supply them, and note that weight
        # thresholds belong to other weights now.
        if not any(key.startswith(prefix) for key in state_dict):
            for key, value in self.state_dict().items():
                state_dict[prefix + key] = value
            self.stale = True
        state_dict.setdefault(prefix + saved_policy.KEY, self.get_extra_state())  # an old one
        own = self.state_dict()
        for key in self.spare_keys():
            state_dict.setdefault(prefix + key, own[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
