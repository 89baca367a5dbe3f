"""What torch's data-parallel wrappers may do with a compiled model, wherever it lies in theirs."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from swatfx.graph_module import SwatModule


@functools.cache
def watch_wrappers() -> None:
    """From now on, keep the buffers below `swat` out of each DistributedDataParallel.

    It would broadcast rank 0's thresholds over each rank's own. What it leaves out it asks of the
    module that it is given alone, which may be one around the compiled model: so this looks when
    the wrapper takes the module in, after it asked and before it collects the buffers.
    """
    register_module_module_registration_hook(_leave_ours_out)


def _leave_ours_out(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
    if name != "module" or not isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return
    assert module is not None  # the wrapper has read its parameters
    ignored: Any = wrapper.parameters_to_ignore
    for path, inner in module.named_modules():
        if isinstance(inner, SwatModule) and "swat" in inner._modules:
            prefix = f"{path}.swat" if path else "swat"
            ignored.update(key for key, _ in inner.swat.named_buffers(prefix=prefix))
