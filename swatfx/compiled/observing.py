"""Watch the densities that training really has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swatfx.compiled.module import SwatModule, unwrap
from swatfx.compiled.state import Pack, WeightThreshold
from swatfx.ops.where import weight_keep
from swatfx.tensors import bits


@dataclass
class Observation:
    """Densities of the last training forward, by layer name."""

    weight_density: dict[str, float] = field(default_factory=dict)
    activation_density: dict[str, float] = field(default_factory=dict)


@contextmanager
def watching(
    gm: SwatModule,
    on_weight: Callable[[WeightThreshold, Tensor, Tensor], object],
    on_pack: Callable[[Pack, Tensor, Tensor], object],
) -> Iterator[None]:
    """Call back as forwards go, inside a `with` block; gradients are off in what is called.

    Args:
        gm: a compiled model.
        on_weight: with a threshold, its weight, and the state that selects from it.
        on_pack: with what packs an activation, that activation, and the packed one.
    """
    handles = []

    def of_weight(module: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(module, WeightThreshold)
        with torch.no_grad():
            on_weight(module, args[0].detach(), output)

    def of_pack(module: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(module, Pack)
        if output is not None:
            with torch.no_grad():
                on_pack(module, args[0].detach(), output)

    try:
        for module in gm.swat.modules():
            if isinstance(module, WeightThreshold):
                handles.append(module.register_forward_hook(of_weight))
            elif isinstance(module, Pack):
                handles.append(module.register_forward_hook(of_pack))
        yield
    finally:
        for handle in handles:
            handle.remove()


def active(threshold: WeightThreshold, weight: Tensor, state: Tensor) -> Tensor:
    """Mask of the active weights, of the shape of `weight`."""
    return weight_keep(weight, state, threshold.selector).expand_as(weight)


def stored_share(x: Tensor, packed: Tensor) -> float:
    """The fraction of the elements of `x` that `packed` holds."""
    elements = x.numel()
    stored = bits.bits_to_mask(packed[: (elements + 7) // 8], elements)
    return float(stored.double().mean().item()) if elements else 0.0


@contextmanager
def observe(gm: nn.Module) -> Iterator[Observation]:
    """Watch the densities that training forwards really keep, inside a `with` block.

    Weight density is the fraction of weights that are active; activation density the fraction of
    input elements that were stored: kept and not zero.
    """
    seen = Observation()

    def on_weight(threshold: WeightThreshold, weight: Tensor, state: Tensor) -> None:
        share = active(threshold, weight, state).double().mean()
        seen.weight_density[threshold.layer] = float(share.item())

    def on_pack(pack: Pack, x: Tensor, packed: Tensor) -> None:
        seen.activation_density[pack.layer] = stored_share(x, packed)

    with watching(unwrap(gm), on_weight, on_pack):
        yield seen
