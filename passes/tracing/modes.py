"""Modes of torch that a forward enters, sets or asks for while it is traced.

A node of the graph runs under whatever mode its caller is in. So a context is refused that nodes
are made in, even one that changes nothing now: `autocast("cpu", enabled=False)` while autocast is
off, or `enable_grad()` while gradients are on. A mode or seed set by a call would be set once, at
compile time, and the answer to a question would be frozen: both are refused where a user's code
calls them. Contexts that no node is made in, profilers, anomaly detection, and choices among
kernels that compute the same (`sdpa_kernel`, flags of `torch.backends`) go unnoticed.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from passes.tracing.guards import Refusal, asks, here, patched

_IN_CONTEXT = "no_grad, autocast or saved-tensor hooks in forward"
_CONTEXTS: tuple[type, ...] = (
    torch.autocast,
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
    torch.inference_mode,
    torch.autograd.graph.saved_tensors_hooks,
)
_OWNERS = ("torch", "torch.random", "random", "numpy.random")
_QUESTIONS = frozenset(  # of torch
    "is_grad_enabled is_inference_mode_enabled is_autocast_enabled is_autocast_cpu_enabled"
    " is_autocast_ipu_enabled is_autocast_xla_enabled is_autocast_cache_enabled get_autocast_dtype"
    " get_autocast_cpu_dtype get_autocast_gpu_dtype get_autocast_ipu_dtype get_autocast_xla_dtype"
    " get_default_dtype get_default_device get_float32_matmul_precision"
    " get_deterministic_debug_mode are_deterministic_algorithms_enabled"
    " is_deterministic_algorithms_warn_only_enabled is_anomaly_enabled"
    " is_anomaly_check_nan_enabled get_rng_state initial_seed".split()
)
# Of torch, Python and numpy; and all names in torch that begin with set_.
_SETTERS = frozenset(
    "use_deterministic_algorithms manual_seed seed fork_rng setstate set_state".split()
)
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled
_get_default_dtype = torch.get_default_dtype


class Modes:
    """Watches, in this thread, the modes that traced forwards enter, set and ask for."""

    def __init__(self) -> None:
        self._open: list[Any] = []  # contexts that forward has entered and not left
        self._before: tuple[Any, ...] = ()

    @contextmanager
    def watching(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Enter this around the whole trace of these modules, innermost."""
        self._before = self._values()
        with ExitStack() as stack:
            for kind in _CONTEXTS:
                self._watch(kind, stack)
            owners = [sys.modules[name] for name in _OWNERS if name in sys.modules]
            refused = _refused(owners)
            for owner in owners + _code_of(modules):
                for name, value in list(vars(owner).items()):
                    if id(value) in refused:  # under any name that it was imported by
                        refuse = _refuse(*refused[id(value)])
                        stack.enter_context(patched(owner, name, refuse))
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward: the contexts that it entered and did not leave are left."""
        known = len(self._open)
        try:
            yield
            if self._open[known:]:
                raise Refusal(f"{type(self._open[-1]).__name__} is not left in forward")
        finally:
            while len(self._open) > known:
                last = len(self._open) - 1
                self._open[last].__exit__(None, None, None)
                del self._open[last:]

    def check(self) -> None:
        """Raise Refusal if forward is in a context that a node would not remember."""
        if self._open or self._values() != self._before:
            raise Refusal(_IN_CONTEXT)

    def _watch(self, kind: type, stack: ExitStack) -> None:
        enter, leave = kind.__dict__["__enter__"], kind.__dict__["__exit__"]

        def entered(context: Any) -> Any:
            result = enter(context)
            self._open.append(context)
            return result

        def left(context: Any, *error: Any) -> Any:
            for at in reversed(range(len(self._open))):
                if self._open[at] is context:
                    del self._open[at]
                    break
            return leave(context, *error)

        stack.enter_context(patched(kind, "__enter__", here(entered, enter)))
        stack.enter_context(patched(kind, "__exit__", here(left, leave)))
        if kind is torch.set_grad_enabled:  # it sets the mode when it is made
            make = kind.__dict__["__init__"]
            refuse = _refuse(make, "forward calls torch.set_grad_enabled")
            stack.enter_context(patched(kind, "__init__", refuse))

    @staticmethod
    def _values() -> tuple[Any, ...]:
        """What contexts of another kind may have changed."""
        return (
            _is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            _is_autocast_enabled("cpu"),
            _is_autocast_enabled("cuda"),
            _get_default_dtype(),
            torch._C._autograd._top_saved_tensors_default_hooks(False),
            torch._C._len_torch_dispatch_stack(),
        )


def _refused(owners: list[types.ModuleType]) -> dict[int, tuple[Callable[..., Any], str]]:
    """By identity: functions of these modules that a forward may not call, each with the reason."""
    found: dict[int, tuple[Callable[..., Any], str]] = {}
    for owner in owners:
        for name, value in vars(owner).items():  # not kept: torch._dynamo puts in one of its own
            if name in _SETTERS or (owner is torch and name.startswith("set_")):
                found[id(value)] = value, f"forward calls {owner.__name__}.{name}"
            elif owner is torch and name in _QUESTIONS:
                found[id(value)] = value, f"control flow on torch.{name}"
    found.pop(id(torch.set_grad_enabled), None)  # a class, and a context: see `_watch`
    return found


def _refuse(real: Callable[..., Any], reason: str) -> Callable[..., Any]:
    def ask(*args: Any, **kwargs: Any) -> Any:
        if asks(sys._getframe(2)):  # past `here`
            raise Refusal(reason)
        return real(*args, **kwargs)

    return here(ask, real)


def _code_of(modules: Iterable[nn.Module]) -> list[types.ModuleType]:
    """The files, as Python's modules, that the classes of these modules are written in."""
    names = {kind.__module__ for module in modules for kind in type(module).__mro__}
    own = sorted(name for name in names if name.split(".")[0] not in ("torch", "builtins"))
    return [sys.modules[name] for name in own if name in sys.modules]
