"""Held masks of a compiled model, changed between optimizer steps as a policy says.

One MaskUpdater a budget: the layers that one rule of a policy takes. It reads gradients before an
optimizer step and momentum after it, asks `swatfx.masks` what to drop and grow, and writes masks,
weights, momentum and densities in place, so that neither graph nor torch.compile notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swatfx.compiled import SparseLayer, SwatModule, read_dense
from swatfx.density import Density
from swatfx.errors import AttachError
from swatfx.masks import rules
from swatfx.masks.dense_gradients import DenseGradients, zero_
from swatfx.masks.joint_updates import JointUpdate
from swatfx.masks.optimizers import Optimizer, Owners, forget, momentum_of
from swatfx.masks.rules import MaskedLayer
from swatfx.masks.schedule import Schedule
from swatfx.ops.state import check_rankable, draw_seed
from swatfx.policy import Policy
from swatfx.selectors import Axes


class MaskUpdater(JointUpdate):
    """The masks of the layers that share a budget.

    Args:
        schedule: of their policy.
        layers: with held masks, or masks that will be held.
        owners: of their weights.
        memory: where the float64 [1] is that the drop rule may remember by.
        all_ranks: whether gradients are averaged over ranks.
    """

    def __init__(
        self,
        schedule: Schedule,
        layers: Sequence[SparseLayer],
        owners: Owners,
        memory: Callable[[], Tensor],
        all_ranks: bool,
    ) -> None:
        super().__init__(layers, owners, alone=rules.stand_alone(schedule.policy))
        self._schedule = schedule
        self._policy: Policy = schedule.policy
        self._memory = memory
        self._needs = rules.needs(self._policy)
        self._unread = {layer.plan.name for layer in layers if "momentum" in self._needs}
        self._dense = DenseGradients(all_ranks)
        self._gradients: dict[str, Tensor] = {}
        self._trained: set[str] = set()  # of the layers that have arrived: frozen ones stay

    def is_due(self, step: int) -> bool:
        """As the schedule says."""
        return self._schedule.is_due(step)

    @torch.no_grad()
    def start(self, step: int) -> None:
        """Zero what is inactive, and let gradients through if the step after `step` grows by them.

        To be called when masks or weights were written by others, too: a checkpoint's.
        """
        self.restart()
        self._gradients.clear()
        if self._policy.zero_inactive == "always":
            for layer in self.layers:
                zero_inactive(layer)
                if self._policy.update == "active":  # momentum of dense training would revive them
                    forget(self._owners.of(layer.weight), layer.weight, ~layer.keep())
        self._open_gradients(step + 1)

    def stop(self) -> None:
        """Let go of the weights' gradients."""
        self._dense.close_all()

    def see(self, layers: Sequence[SparseLayer]) -> None:
        """Keep the dense gradient, hand on that of active weights."""
        if "gradient" not in self._needs:
            return
        if self._policy.update == "active":
            found = self._dense.take(layers)
        else:
            found = {
                x.plan.name: x.weight.grad.clone() for x in layers if x.weight.grad is not None
            }
        for layer in layers:
            if layer.weight.grad is None:
                self.unsee(layer)
        self._gradients |= found

    def unsee(self, layer: SparseLayer) -> None:
        """Forget the gradient."""
        self._gradients.pop(layer.plan.name, None)

    def hold(self, optimizer: Optimizer) -> None:
        """Zero what is inactive, where that is to be zero always."""
        # Not every optimizer leaves alone what has neither gradient nor momentum.
        if self._policy.zero_inactive == "always":
            for layer in self._owners.share(optimizer, self.layers):
                zero_inactive(layer)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, step: int) -> bool:
        """Zero, freeze or update masks after `step`; whether any has changed."""
        self.hold(optimizer)
        if not (self._policy.updates_masks or self._policy.hold_from_epoch):
            return False  # held from the first step on, and never another
        mine = self._owners.share(optimizer, self.layers)
        for layer in mine:  # one without momentum shall not be found out at the first update only
            if layer.plan.name in self._unread:
                momentum_of([optimizer], layer)
        self._unread -= {layer.plan.name for layer in mine}
        froze = self._schedule.holds_after(step) and self._freeze(mine)
        changed = super().after_step(optimizer, step)
        self._open_gradients(step + 1)
        return changed or froze

    def _freeze(self, mine: Sequence[SparseLayer]) -> bool:
        unowned = [layer for layer in self.layers if not self._owners.of(layer.weight)]
        free = [x for x in (*mine, *unowned) if not x.weight_threshold.is_held]
        for layer in free:
            layer.held_threshold.recompute(layer.weight)
            layer.held_threshold.hold()
        return bool(free)

    def arrive(self, layer: SparseLayer) -> None:
        """Note whether the layer trained: who takes turns freezes the others' weights."""
        if layer.weight.requires_grad:
            self._trained.add(layer.plan.name)

    @torch.no_grad()
    def update(self, layers: Sequence[SparseLayer], step: int) -> bool:
        """Drop and grow what the policy's rules say."""
        ready = [(layer, self._seen(layer, step)) for layer in layers]
        for layer in layers:
            self.unsee(layer)
        self._trained -= {layer.plan.name for layer in layers}
        members = [(layer, seen) for layer, seen in ready if seen is not None]
        if not members:
            return False
        result = rules.update(
            self._policy,
            [seen for _, seen in members],
            self._schedule.fraction(step),
            self._memory(),
        )
        for (layer, _), (keep, dropped) in zip(members, result, strict=True):
            self._apply(layer, keep, dropped, step)
        return True

    def _seen(self, layer: SparseLayer, step: int) -> MaskedLayer | None:
        """What the rules see of `layer`; None where it did not train, and so stays as it is."""
        weight = layer.weight.detach()
        name = layer.plan.name
        gradient = self._gradients.get(name)
        momentum = None
        if "momentum" in self._needs:
            momentum = momentum_of(self._owners.of(layer.weight), layer)
        if name not in self._trained:
            return None
        check_rankable(weight, name, True)
        if "gradient" in self._needs and gradient is None:
            return None
        if "momentum" in self._needs and momentum is None:
            return None
        selector = layer.weight_threshold.chosen
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
        layer.held_threshold.set_mask(keep)
        if self._policy.zeroes_inactive:
            zero_(layer.weight, stays)
        if self._policy.zero_inactive == "always":
            # Where updates are masked, no optimizer shall remember what a grown weight was not.
            gone = dropped if self._policy.update == "all" else ~stays
            forget(self._owners.of(layer.weight), layer.weight, gone)
        active = int(keep.sum().item())
        if self._policy.ramp != "none":
            layer.set_density(self._schedule.density(layer.plan.weight_density, step), active)
        elif self._policy.grow_share != "layer":
            layer.set_density(Density(active / keep.numel()), active)

    def _open_gradients(self, next_step: int) -> None:
        """Masked updates let dense gradients through only where the next step grows by them."""
        if "gradient" not in self._needs or self._policy.update != "active":
            return
        for layer in self.layers:
            wanted = self.awaits(layer, next_step)
            layer.held_threshold.let_through(wanted)
            if wanted:
                self._dense.open(layer)
            else:
                self._dense.close(layer)


@torch.no_grad()
def zero_inactive(layer: SparseLayer) -> None:
    """Set the weights that the layer's mask leaves out to zero."""
    zero_(layer.weight, layer.keep())


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
        if shared and policy.zeroes_inactive:
            raise AttachError(
                f"policy {policy.name!r} zeroes weights, but other code reads this one, too",
                layer=layer.plan.name,
                value=shared[0],
                remedy=remedy,
            )


def check_ranks(layers: Sequence[SparseLayer]) -> None:
    """Raise AttachError if the ranks of the default process group hold different rules."""
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
