"""Held masks of a compiled model, changed between optimizer steps as a policy says.

One MaskUpdater a budget: the layers that one rule of a policy takes. It reads gradients before an
optimizer step and momentum after it, asks `swatfx.masks` what to drop and grow, and writes masks,
weights, momentum and densities in place, so that neither graph nor torch.compile notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swatfx import masks
from swatfx.density import Density
from swatfx.errors import AttachError
from swatfx.graph_module import SwatModule
from swatfx.layers import SparseLayer, read_dense
from swatfx.masks import MaskedLayer
from swatfx.ops.state import check_rankable, draw_seed
from swatfx.policy import Policy
from swatfx.schedules import Schedule
from swatfx.selectors import Axes, Held

Momentum = Callable[[torch.optim.Optimizer, SparseLayer], Tensor | None]


class MaskUpdater:
    """The masks of the layers that share a budget.

    Args:
        schedule: of their policy.
        layers: with held masks.
        optimizer: of their weights.
        memory: where the float64 [1] is that the drop rule may remember by.
        momentum: reads a layer's momentum from the optimizer; None before its first step.
    """

    def __init__(
        self,
        schedule: Schedule,
        layers: Sequence[SparseLayer],
        optimizer: torch.optim.Optimizer,
        memory: Callable[[], Tensor],
        momentum: Momentum,
    ) -> None:
        self._schedule = schedule
        self._policy: Policy = schedule.policy
        self.layers = list(layers)
        self._optimizer = optimizer
        self._memory = memory
        self._momentum = momentum
        self._needs = masks.needs(self._policy)
        self._unread = "momentum" in self._needs
        self._gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, step: int) -> None:
        """Zero what is inactive, and let gradients through if the next step grows by them."""
        if self._policy.zero_inactive == "always":
            self._zero()
            if self._policy.update == "active":  # momentum of dense training would revive them
                for layer in self.layers:
                    self._forget(layer, ~layer.keep())
        self._open_gradients(step + 1)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Before optimizer step `step`: keep the dense gradient, hand on that of active weights."""
        if not ("gradient" in self._needs and self._schedule.is_due(step)):
            return
        for layer in self.layers:
            gradient = layer.weight.grad
            if gradient is None:
                continue
            self._gradients[layer.plan.name] = gradient.clone()
            if self._policy.update == "active":
                gradient.masked_fill_(~layer.keep(), 0)

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """After optimizer step `step`: update or freeze the masks; whether that was due."""
        if self._unread:  # an optimizer without momentum shall not be found out at the first update
            for layer in self.layers:
                self._momentum(self._optimizer, layer)
            self._unread = False
        due = self._schedule.is_due(step)
        froze = self._schedule.holds_after(step) and self._freeze()
        if due:
            self._update(step)
        elif self._policy.zero_inactive == "always" and self._policy.update == "all":
            self._zero()  # a dense gradient has moved them
        self._gradients.clear()
        self._open_gradients(step + 1)
        return due or froze

    def _freeze(self) -> bool:
        free = [layer for layer in self.layers if not layer.weight_threshold.is_held]
        for layer in free:
            layer.weight_threshold.recompute(layer.weight)
            layer.weight_threshold.hold()
        return bool(free)

    def _update(self, step: int) -> None:
        ready = [(layer, self._seen(layer, step)) for layer in self.layers]
        members = [(layer, seen) for layer, seen in ready if seen is not None]
        if not members:
            return
        result = masks.update(
            self._policy,
            [seen for _, seen in members],
            self._schedule.fraction(step),
            self._memory(),
        )
        for (layer, _), (keep, dropped) in zip(members, result, strict=True):
            self._apply(layer, keep, dropped, step)

    def _seen(self, layer: SparseLayer, step: int) -> MaskedLayer | None:
        """What the rules see of `layer`; None where it did not train, and so stays as it is."""
        weight = layer.weight.detach()
        name = layer.plan.name
        gradient = self._gradients.get(name)
        momentum = None
        if "momentum" in self._needs:
            momentum = self._momentum(self._optimizer, layer)
        trained = layer.weight.requires_grad
        if not trained or ("gradient" in self._needs and gradient is None):
            return None
        if "momentum" in self._needs and momentum is None:
            return None
        check_rankable(weight, name, True)
        selector = layer.weight_threshold.chosen
        assert isinstance(selector, Held)
        seed = draw_seed(self._policy.seed, name, step, True)
        axes = Axes(0, 1)
        density = layer.weight_density
        if self._policy.ramp != "none":
            density = self._schedule.density(layer.plan.weight_density, step)

        def select() -> Tensor:
            return selector.keep(weight, selector.state(weight, density, axes, seed), axes)

        return MaskedLayer(
            name,
            weight,
            layer.keep(),
            density,
            torch.Generator().manual_seed(seed),
            select,
            gradient,
            momentum,
        )

    def _apply(self, layer: SparseLayer, keep: Tensor, dropped: Tensor, step: int) -> None:
        # What is grown starts from zero, also where it was dropped just now, and also where a dense
        # gradient has moved it in this step. Soft filters come back as they are.
        stays = layer.keep() & ~dropped if self._policy.zero_inactive == "always" else keep
        layer.weight_threshold.threshold.copy_(Held.from_mask(keep))
        if self._policy.zero_inactive != "never":
            layer.weight.masked_fill_(~stays, 0)
        if self._policy.zero_inactive == "always":
            self._forget(layer, dropped)
        if self._policy.ramp != "none":
            layer.set_density(self._schedule.density(layer.plan.weight_density, step))
        elif self._policy.grow_share != "layer":
            active = int(keep.sum().item())
            layer.set_density(Density(active / keep.numel()))

    def _zero(self) -> None:
        for layer in self.layers:
            zero_inactive(layer)

    def _forget(self, layer: SparseLayer, where: Tensor) -> None:
        """Clear what the optimizer remembers of the weights at `where`."""
        for value in self._optimizer.state.get(layer.weight, {}).values():
            if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                value.masked_fill_(where, 0)

    def _open_gradients(self, next_step: int) -> None:
        """Masked updates let dense gradients through only where the next step grows by them."""
        if "gradient" not in self._needs or self._policy.update != "active":
            return
        due = self._schedule.is_due(next_step)
        for layer in self.layers:
            layer.weight_threshold.threshold[-1] = int(due)


@torch.no_grad()
def zero_inactive(layer: SparseLayer) -> None:
    """Set the weights that the layer's mask leaves out to zero."""
    layer.weight.masked_fill_(~layer.keep(), 0)


def check_weights(gm: SwatModule, policy: Policy, layers: Sequence[SparseLayer]) -> None:
    """Raise AttachError where masks cannot be held: computed weights, and weights read elsewhere.

    A weight that several convolutions or linear layers share is one layer here, with one mask.
    """
    names: dict[int, list[str]] = {}
    for named in (gm.named_parameters, gm.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    for layer in layers:
        paths = names.get(id(layer.weight), [])
        remedy = f"keep the layer dense: swatfx.per_layer({{{layer.plan.name!r}: 'dense'}}, policy)"
        if not paths:
            raise AttachError(
                f"policy {policy.name!r} holds masks, but this weight is computed from others",
                layer=layer.plan.name,
                remedy=f"remove its parametrization, or {remedy}",
            )
        shared = [path for path in paths if read_dense(gm, path)]
        if shared and policy.zero_inactive != "never":
            raise AttachError(
                f"policy {policy.name!r} zeroes weights, but other code reads this one, too",
                layer=layer.plan.name,
                value=shared[0],
                remedy=remedy,
            )


def check_ranks(layers: Sequence[SparseLayer]) -> None:
    """Raise AttachError if the ranks of the default process group hold different masks."""
    sums = []
    for layer in layers:
        state = layer.weight_threshold.threshold
        places = torch.arange(1, state.numel() + 1, device=state.device)
        sums.append((state.to(torch.int64) * (places % 65521)).sum())
    mine = torch.stack(sums)
    low, high = mine.clone(), mine.clone()
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    differs = (low != high).nonzero()
    if differs.numel():
        raise AttachError(
            "the ranks' masks differ",
            layer=layers[int(differs[0].item())].plan.name,
            remedy="give every rank the same weights and seed, and train through"
            " DistributedDataParallel",
        )
