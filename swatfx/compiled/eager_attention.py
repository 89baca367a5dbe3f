"""Torch's attention, called by modules that tracing left to Python: it keeps less there, too.

No node of a graph stands for such a call. While a compiled model runs, and has such modules, a
torch function mode hands it to the leaf that a node would have become.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

if TYPE_CHECKING:
    from swatfx.compiled.coded import Attention

_CHECKPOINTS = "torch.utils.checkpoint"


class _Mode(TorchFunctionMode):
    def __init__(self, leaf: Attention) -> None:
        super().__init__()
        self.leaf = leaf

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        ours = func is F.scaled_dot_product_attention and not _is_checkpointed()
        return (self.leaf if ours else func)(*args, **(kwargs or {}))


def _is_checkpointed() -> bool:
    """Whether backward will run this forward again: it may do so outside of the model's call."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == _CHECKPOINTS


def saving(leaf: Attention | None) -> AbstractContextManager[Any]:
    """Calls of torch's attention are `leaf`'s within; None: all stays as it is."""
    if leaf is None or torch.compiler.is_compiling():
        return nullcontext()
    if any(isinstance(m, _Mode) and m.leaf is leaf for m in _get_current_function_mode_stack()):
        return nullcontext()
    return _Mode(leaf)
