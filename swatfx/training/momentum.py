"""SWAT-M between optimizer steps: densities follow the layers' momentum (section 3.3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swatfx.compiled import SparseLayer
from swatfx.density import Density
from swatfx.distributions import momentum_budgets
from swatfx.masks import JointUpdate, Owners, momentum_of
from swatfx.policy import Policy


class Redistribution(JointUpdate):
    """Shares the budget of one SWAT-M rule over its layers by their mean momentum.

    The mean is taken over the weights that were active in the step's forward, and so before the
    optimizer moved them, of the momentum as it is after the step. Layers that no optimizer has
    updated (frozen, say) keep the density they have.
    """

    def __init__(self, policy: Policy, layers: Sequence[SparseLayer], owners: Owners) -> None:
        super().__init__(layers, owners, alone=False)
        self._policy = policy
        self._keep: dict[str, Tensor] = {}
        self._means: dict[str, float] = {}  # of a layer's latest step

    def is_due(self, step: int) -> bool:
        """After every `redistribute_every` training steps."""
        return step % self._policy.redistribute_every == 0

    def start(self, step: int) -> None:
        """Forget what was seen before densities, masks or weights were written by others."""
        self.restart()
        self._keep.clear()
        self._means.clear()

    def stop(self) -> None:
        """Nothing is held on to."""

    def see(self, layers: Sequence[SparseLayer]) -> None:
        """Note which weights are active."""
        self._keep |= {layer.plan.name: layer.keep() for layer in layers}

    def unsee(self, layer: SparseLayer) -> None:
        """Forget which were."""
        self._keep.pop(layer.plan.name, None)

    @torch.no_grad()
    def arrive(self, layer: SparseLayer) -> None:
        """Take the mean of the new momentum over them."""
        keep = self._keep.pop(layer.plan.name, None)
        keep = layer.keep() if keep is None else keep
        momentum = momentum_of(self._owners.of(layer.weight), layer)
        if momentum is not None:
            total = float(momentum.abs().masked_fill_(~keep, 0).sum().item())
            self._means[layer.plan.name] = total / max(int(keep.sum().item()), 1)

    def update(self, layers: Sequence[SparseLayer], step: int) -> bool:
        """Move the densities; no mask changes before the next refresh."""
        moved = [layer for layer in self.layers if layer.plan.name in self._means]
        sizes = [layer.weight.numel() for layer in moved]
        means = [self._means[layer.plan.name] for layer in moved]
        target = Density.from_sparsity(self._policy.sparsity).value
        for layer, size, count in zip(
            moved, sizes, momentum_budgets(means, sizes, target), strict=True
        ):
            layer.set_density(Density(count / size))
        return False
