"""Dense gradients of weights whose `.grad` is to hold the active weights' part alone.

At the steps that grow by gradients (RigL's), backward computes dense ones. They are put aside as
they are accumulated, so that whoever reads `.grad` before the optimizer does, such as gradient
clipping, sees what the optimizer will see.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from swatfx.compiled import SparseLayer

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_(x: Tensor, keep: Tensor) -> None:
    """Set `x` to zero in place where the mask `keep` says no, whatever stands there: NaN, too."""
    integer = _INTEGERS.get(x.element_size())
    if x.device.type == "cpu" and x.is_floating_point() and integer and _is_plain(x):
        # Four times as fast as masked_fill_; zero times any pattern of bits is zero.
        x.detach().view(integer).mul_(keep)
    else:
        x.detach().masked_fill_(~keep, 0)


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter)


class DenseGradients:
    """The dense gradients of some layers, summed over the backwards before an optimizer step.

    Args:
        all_ranks: whether DistributedDataParallel averages `.grad`, and so these have to be.
    """

    def __init__(self, all_ranks: bool) -> None:
        self._all_ranks = all_ranks
        self._hooks: dict[str, list[RemovableHandle]] = {}
        self._sums: dict[str, Tensor] = {}

    @property
    def _reach(self) -> bool:
        """Whether all of a gradient is here: else who sums `.grad` over ranks has to see it all."""
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self._all_ranks or not ranks or torch.distributed.get_world_size() == 1

    def open(self, layer: SparseLayer) -> None:
        """Put aside what backward computes for the layer, until `close`."""
        weight, name = layer.weight, layer.plan.name
        if name in self._hooks or not (weight.requires_grad and weight.is_leaf and self._reach):
            return

        # What hangs on a tensor is held in C++, where the garbage collector does not look: whatever
        # leads back to the weight from there (a layer does, by way of the model) is never freed.
        weight_here, layer_here = weakref.ref(weight), weakref.ref(layer)

        def forget_what_was_cleared(_: Tensor) -> None:
            weight = weight_here()
            if weight is None or weight.grad is None or not weight.grad.any():
                self._sums.pop(name, None)

        @torch.no_grad()
        def put_aside(weight: Tensor) -> None:
            layer, gradient = layer_here(), weight.grad
            if layer is None or gradient is None or gradient.is_sparse:
                return  # without the layer, the compiled model is gone, and its masks with it
            keep = layer.keep()
            known = self._sums.get(name)
            self._sums[name] = total = gradient.detach().clone()
            if known is not None:  # the active part of `gradient` is a sum already
                total.add_(known.masked_fill_(keep, 0))
            zero_(gradient, keep)

        self._hooks[name] = [
            weight.register_hook(forget_what_was_cleared),
            weight.register_post_accumulate_grad_hook(put_aside),
        ]

    def close(self, layer: SparseLayer) -> None:
        """Leave the layer's gradients alone again."""
        for hook in self._hooks.pop(layer.plan.name, []):
            hook.remove()
        self._sums.pop(layer.plan.name, None)

    def close_all(self) -> None:
        """Leave all gradients alone again."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()
        self._sums.clear()

    @torch.no_grad()
    def take(self, layers: Sequence[SparseLayer]) -> dict[str, Tensor]:
        """Layer name -> its dense gradient; absent where there is none.

        `.grad` holds the active weights' part from here on.
        """
        found: dict[str, Tensor] = {}
        for layer in layers:
            name, gradient = layer.plan.name, layer.weight.grad
            aside = self._sums.pop(name, None)
            if gradient is None:
                continue
            found[name] = gradient.detach().clone() if aside is None else aside
            zero_(gradient, layer.keep())
        if self._all_ranks:
            self._average([layer for layer in layers if layer.weight.requires_grad], found)
        return {
            layer.plan.name: found[layer.plan.name]
            for layer in layers
            if layer.plan.name in found and _says_something(found[layer.plan.name], layer)
        }

    def _average(self, layers: Sequence[SparseLayer], found: dict[str, Tensor]) -> None:
        """Over all ranks; a rank on which a layer was not used adds zeros."""
        if not layers:
            return
        parts = [found.get(x.plan.name, torch.zeros_like(x.weight)).reshape(-1) for x in layers]
        whole = torch.cat(
            [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
        )
        torch.distributed.all_reduce(whole)
        whole /= torch.distributed.get_world_size()
        for layer, part in zip(layers, whole.split([p.numel() for p in parts]), strict=True):
            if layer.plan.name in found or layer.weight.grad is not None:
                found[layer.plan.name] = part.view_as(layer.weight).to(layer.weight.dtype)


def _says_something(gradient: Tensor, layer: SparseLayer) -> bool:
    """Whether inactive weights can be told apart by the gradient: not if it is zero, or overflows.

    A layer whose units are dead has no gradient, nor has one whose backward ran before its
    gradients were opened. A loss that a scaler has to shrink overflows.
    """
    inactive = ~layer.keep()
    if not bool(inactive.any()):
        return True
    size = float(gradient[inactive].abs().sum(dtype=torch.float32))
    return 0 < size < float("inf")
