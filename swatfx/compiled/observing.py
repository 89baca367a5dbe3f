"""Watch the densities that training really has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from swatfx.compiled.module import unwrap
from swatfx.compiled.state import Pack, WeightThreshold
from swatfx.ops.where import weight_keep
from swatfx.tensors import bits


@dataclass
class Observation:
    """Densities of the last training forward, by layer name."""

    weight_density: dict[str, float] = field(default_factory=dict)
    activation_density: dict[str, float] = field(default_factory=dict)


@contextmanager
def observe(gm: nn.Module) -> Iterator[Observation]:
    """Watch the densities that training forwards really keep, inside a `with` block.

    Weight density is the fraction of weights that are active; activation density the fraction of
    input elements that were stored: kept and not zero.
    """
    root = unwrap(gm)
    seen = Observation()
    handles = []

    def on_weight(module: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(module, WeightThreshold)
        weight = args[0].detach()
        mask = weight_keep(weight, output, module.selector).expand_as(weight)
        seen.weight_density[module.layer] = float(mask.double().mean().item())

    def on_pack(module: nn.Module, args: Any, output: Any) -> None:
        if output is None:
            return
        elements = args[0].numel()
        stored = bits.bits_to_mask(output[: (elements + 7) // 8], elements)
        share = float(stored.double().mean().item()) if elements else 0.0
        assert isinstance(module, Pack)
        seen.activation_density[module.layer] = share

    try:
        with torch.no_grad():
            for module in root.swat.modules():
                if isinstance(module, WeightThreshold):
                    handles.append(module.register_forward_hook(on_weight))
                elif isinstance(module, Pack):
                    handles.append(module.register_forward_hook(on_pack))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
