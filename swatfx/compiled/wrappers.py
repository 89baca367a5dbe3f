"""What wrappers of torch's and of others do with a compiled model, wherever it lies in theirs.

Nothing of theirs is patched: a hook on the registration of modules sees a wrapper take a compiled
model in.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from swatfx.compiled.module import SwatModule
from swatfx.compiled.state import Threshold, WeightThreshold
from swatfx.errors import InputError

# (threshold that has them or None, [(buffer, the source's)])
_Buffers = tuple[Threshold | None, list[tuple[Tensor, Tensor]]]


@functools.cache
def watch_wrappers() -> None:
    """From now on, see DistributedDataParallel and averages of models take compiled models in."""
    register_module_module_registration_hook(_taken_in)


def _taken_in(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
    if name != "module" or module is None:
        return
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        _leave_ours_out(wrapper, module)
    elif isinstance(wrapper, AveragedModel):
        wrapper.__dict__["update_parameters"] = types.MethodType(_average, wrapper)
    elif any(root.copied_from for root in _compiled(module)):
        for method, followed in (("update", _update), ("update_parameters", _update_parameters)):
            if callable(getattr(type(wrapper), method, None)):
                wrapper.__dict__[method] = types.MethodType(followed, wrapper)


# ---- Data-parallel ranks have thresholds of their own ----


def _leave_ours_out(wrapper: nn.Module, module: nn.Module) -> None:
    """Keep the buffers below `swat` out: rank 0's would be broadcast over each rank's own.

    What it leaves out it asks of the module that it is given alone, which may be one around the
    compiled model: so this looks when the wrapper takes the module in, after it asked and before it
    collects the buffers.
    """
    ignored: Any = wrapper.parameters_to_ignore
    for path, inner in module.named_modules():
        if isinstance(inner, SwatModule) and "swat" in inner._modules:
            prefix = f"{path}.swat" if path else "swat"
            ignored.update(key for key, _ in inner.swat.named_buffers(prefix=prefix))


# ---- An average has the masks, densities and clock of what it is an average of ----


def _average(wrapper: AveragedModel, model: nn.Module) -> None:
    """`AveragedModel.update_parameters`; what is no weight is then taken as it is.

    Whatever it made of bitmasks, of dates and of fractions, if it averaged buffers: no mean of two
    masks is a mask.

    Raises:
        InputError: `model` is not compiled as the average is; nothing has changed.
    """
    pairs = list(_same_buffers(wrapper.module, model))
    type(wrapper).update_parameters(wrapper, model)
    _take(pairs)


def _update(wrapper: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`update` of a wrapper that holds a copy and is given what it is a copy of: timm's EMAs."""
    return _followed(wrapper, "update", args, kwargs)


def _update_parameters(wrapper: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As `_update`, by the other name."""
    return _followed(wrapper, "update_parameters", args, kwargs)


def _followed(
    wrapper: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    module = wrapper.get_submodule("module")
    own = list(_compiled(module))
    pairs: list[_Buffers] = []
    for source in filter(lambda x: isinstance(x, nn.Module), (*args, *kwargs.values())):
        theirs = list(_compiled(source))
        if len(own) == len(theirs) and all(
            any(known() is root for known in twin.copied_from)
            for twin, root in zip(own, theirs, strict=True)
        ):
            pairs += list(_same_buffers(module, source))
    result = getattr(type(wrapper), method)(wrapper, *args, **kwargs)
    _take(pairs)
    return result


def _compiled(module: nn.Module) -> Iterator[SwatModule]:
    for inner in module.modules():
        if isinstance(inner, SwatModule) and "swat" in inner._modules:
            yield inner


def _same_buffers(module: nn.Module, source: nn.Module) -> Iterator[_Buffers]:
    """All below `swat` of what is compiled in `module`, with those of `source`."""
    own, theirs = list(_compiled(module)), list(_compiled(source))
    if not theirs and not any(_holds_masks(root) for root in own):
        return  # the dense model that shares its parameters will do
    kinds = [[_kinds(root) for root in roots] for roots in (own, theirs)]
    if kinds[0] != kinds[1]:
        raise InputError(
            "this average is of another compiled model",
            value=type(source).__name__,
            remedy="update it with the model that it was made of",
        )
    for root, other in zip(own, theirs, strict=True):
        for one, two in zip(root.swat.modules(), other.swat.modules(), strict=True):
            names = [name for name, buffer in one._buffers.items() if buffer is not None]
            tensors = [(getattr(one, name), getattr(two, name)) for name in names]
            if tensors:
                yield one if isinstance(one, Threshold) else None, tensors


def _holds_masks(root: SwatModule) -> bool:
    return any(isinstance(t, WeightThreshold) and t.is_held for _, t in root.swat.thresholds())


def _kinds(root: SwatModule) -> list[tuple[str, torch.Size]]:
    return [(name, buffer.shape) for name, buffer in root.swat.named_buffers()]


@torch.no_grad()
def _take(pairs: list[_Buffers]) -> None:
    for threshold, tensors in pairs:
        for mine, other in tensors:
            mine.copy_(other)
        if threshold is not None:
            threshold.history.forget()
        if isinstance(threshold, WeightThreshold):
            threshold.trust()
