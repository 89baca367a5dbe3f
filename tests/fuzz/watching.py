"""What swatfx's sparse ops were given, seen from below autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """Notes inputs and selection states of every sparse op that runs inside, in order.

    Copies, so that nothing lives longer than it would, and later writes are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Tensor | None]] = []
        self._states: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name == "swatfx::pack":
            self._states[result.data_ptr()] = args[1].detach().clone()
        if name in ("swatfx::conv", "swatfx::linear"):
            names = [a.name for a in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            state, kept = given.get("activation_state"), given.get("kept")
            if state is None and kept is not None:
                state = self._states.get(kept.data_ptr())
            noted = {"input": given["input"], "weight_state": given["weight_state"]}
            noted["activation_state"] = state
            self.calls.append(
                {k: None if v is None else v.detach().clone() for k, v in noted.items()}
            )
        return result

    def __iter__(self) -> Iterator[dict[str, Tensor | None]]:
        return iter(self.calls)
