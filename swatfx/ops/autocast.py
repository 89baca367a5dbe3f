"""Autocast for our ops: activations are cast as `F.conv2d`'s would be, weights are not.

Thresholds belong to the weight in its own precision: a cast would move weights across them. The
kernels cast the masked weight to the activation's dtype themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("swatfx", "FRAGMENT")
_KEYS = {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "mps": "AutocastMPS",
    "xpu": "AutocastXPU",
}


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer sees `x`: autocast's, if it is on and `x` is eligible."""
    kind = x.device.type
    if kind in _KEYS and torch.is_autocast_enabled(kind) and _eligible(x):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _eligible(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64


def register_autocast(name: str, casts: tuple[int, ...]) -> None:
    """Cast the positional arguments `casts` of op `name` under autocast, on every device."""
    op = getattr(torch.ops.swatfx, name.partition("::")[2]).default
    for device, key in _KEYS.items():
        _LIBRARY.impl(name, _kernel(op, device, key, casts), key)


def _kernel(op: Any, device: str, key: str, casts: tuple[int, ...]) -> Any:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [
            a.to(dtype)
            if i in casts and isinstance(a, Tensor) and a.device.type == device and _eligible(a)
            else a  # of another device, say: a flag on the host brings the host's autocast along
            for i, a in enumerate(args)
        ]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast, **kwargs)

    return kernel
