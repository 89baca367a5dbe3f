"""What happens to a compiled model between forwards: refresh, attach, and after a load."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swatfx import learned, masks
from swatfx.density import Density
from swatfx.distributions import momentum_budgets
from swatfx.errors import AttachError
from swatfx.graph_module import SwatModule, unwrap
from swatfx.layers import SparseLayer, sparse_layers
from swatfx.mask_updates import MaskUpdater, check_ranks, check_weights, zero_inactive
from swatfx.policy import Policy
from swatfx.schedules import Schedule


def refresh(gm: nn.Module) -> None:
    """Bring every weight threshold up to date with the weights as they are.

    Masks that are held stay.

    Raises:
        InputError: a weight holds NaN; names the layer, and no threshold has changed.
    """
    root = unwrap(gm)
    layers = list(sparse_layers(root))
    for layer in layers:
        layer.weight_threshold.check(layer.weight)
    for layer in layers:
        if not layer.weight_threshold.is_held:
            layer.weight_threshold.recompute(layer.weight)


def after_load(module: nn.Module, incompatible: Any) -> None:
    """After `load_state_dict` of a dense checkpoint: thresholds belong to the new weights."""
    assert isinstance(module, SwatModule)
    if module.swat.stale:
        module.swat.stale = False
        refresh(module)
        policy = Policy.from_json(module.meta["policy"])
        for layer in sparse_layers(module):
            if not module.swat.clock.updates.item():  # held masks, too, were of other weights
                layer.weight_threshold.recompute(layer.weight)
            rule = policy.rule_for(layer.plan.name)[1]
            if module.swat.clock.attached and rule.zero_inactive == "always":
                zero_inactive(layer)


def dense_state_dict(gm: nn.Module) -> dict[str, Tensor]:
    """The state dict that the original model would have: all weights dense, no key of ours."""
    state = unwrap(gm).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("swat.")}


class Handle:
    """What `attach` returns; `detach()` takes the hooks off the optimizer again."""

    def __init__(
        self,
        gm: SwatModule,
        optimizer: torch.optim.Optimizer,
        policy: Policy,
        updaters: Sequence[MaskUpdater],
        all_ranks: bool,
    ) -> None:
        self._gm = gm
        self._optimizer = optimizer
        self._policy = policy
        self._updaters = updaters
        self._all_ranks = all_ranks
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Layer -> weight of the penalty on its learned thresholds (DST).
        self._penalties = {
            layer.plan.name: rule.penalty
            for _, rule, layers in _budgets(gm, policy)
            for layer in layers
            if rule.penalty
        }
        self._learns = any(True for _ in learned.learned_thresholds(gm))
        for updater in updaters:
            updater.start(self._step)
        self._check_ranks()
        gm.swat.clock.attached = True

    def detach(self) -> None:
        """Remove the hooks; a policy that needs them will refuse to train on."""
        for hook in self._hooks:
            hook.remove()
        self._gm.swat.clock.attached = False

    @property
    def _step(self) -> int:
        """Optimizer steps done."""
        return int(self._gm.swat.clock.updates.item())

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._see_gradients()
            return None

        def then_see() -> Any:
            loss = closure()  # it computes the gradients, within the step
            self._see_gradients()
            return loss

        return args[:1], {**kwargs, "closure": then_see}

    def _see_gradients(self) -> None:
        if self._penalties:
            # A fused optimizer unscales gradients itself, by what GradScaler hands to it.
            scale = getattr(self._optimizer, "grad_scale", None)
            learned.add_penalty(self._gm, self._penalties, 1.0 if scale is None else scale)
        for updater in self._updaters:
            updater.before_step(self._step + 1)

    def _after_step(self, *_: Any) -> None:
        self._gm.swat.clock.updates.add_(1)
        step = self._step
        changed = [updater.after_step(step) for updater in self._updaters]
        if any(changed):
            self._check_ranks()
        if self._learns:
            learned.reset_if_empty(self._gm)
        if self._policy.needs_optimizer and step % self._policy.redistribute_every == 0:
            redistribute(self._gm, self._optimizer)

    def _check_ranks(self) -> None:
        held = [
            layer for u in self._updaters for layer in u.layers if layer.weight_threshold.is_held
        ]
        if self._all_ranks and held:
            check_ranks(held)


def attach(
    gm: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
) -> Handle:
    """Hang what a policy needs from the optimizer on its step hooks.

    For SWAT-M, densities follow the momentum after every `redistribute_every` optimizer steps, and
    take effect at the next threshold refresh. Held masks are dropped and grown as the policy's
    fields say; weights that they leave out are zero from here on. Learned thresholds (DST) become a
    parameter group of the optimizer, unless it holds them. Policies that need nothing accept any
    optimizer. Where `gm` is wrapped by DistributedDataParallel, all ranks have to attach: here
    and after every change of masks they check that they hold the same.

    Args:
        gm: the compiled model, as it is trained (wrapped, if it is).
        optimizer: over its parameters.
        steps_per_epoch: optimizer steps an epoch; wanted by schedules that count epochs (SET, SNFS,
            soft filter pruning, `hold_from_epoch`).
        total_steps: optimizer steps of the whole training; wanted by those that end or decay.

    Raises:
        AttachError: the optimizer keeps no momentum where it is needed or is another model's, the
            model has an optimizer already, the schedule is not known, a masked weight is computed
            or read by other code, or the ranks' masks differ.
    """
    root = unwrap(gm)
    policy = Policy.from_json(root.meta["policy"])
    if root.swat.clock.attached:
        raise AttachError("an optimizer is attached already", remedy="call handle.detach() first")
    if policy.needs_optimizer:
        _check_owner(root, optimizer)
    updaters = []
    for position, rule, layers in _budgets(root, policy):
        schedule = Schedule(rule, steps_per_epoch, total_steps)
        schedule.check()
        if rule.distribution == "momentum" or "momentum" in masks.needs(rule):
            _check_momentum(optimizer, rule)
        if rule.hold_from_epoch is not None:
            check_weights(root, rule, layers)
            memory = functools.partial(root.swat.memory_of, position + 1)
            updaters.append(MaskUpdater(schedule, layers, optimizer, memory, momentum_of))
    learned.add_parameters(root, optimizer)
    all_ranks = _is_data_parallel(gm)
    return Handle(root, optimizer, policy, updaters, all_ranks)


def _budgets(gm: SwatModule, policy: Policy) -> list[tuple[int, Policy, list[SparseLayer]]]:
    """(position of the rule, rule, its layers) of each rule that takes some."""
    groups: dict[tuple[int, Policy], list[SparseLayer]] = {}
    for layer in sparse_layers(gm):
        groups.setdefault(policy.rule_for(layer.plan.name), []).append(layer)
    return [(position, rule, layers) for (position, rule), layers in groups.items()]


def _is_data_parallel(module: nn.Module) -> bool:
    inner: Any = module
    while inner is not None and not isinstance(inner, SwatModule):
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            return True
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return False


def _check_momentum(optimizer: torch.optim.Optimizer, policy: Policy) -> None:
    betas = all("betas" in group for group in optimizer.param_groups)
    momentum = all(group.get("momentum", 0) for group in optimizer.param_groups)
    if not (betas or momentum):
        raise AttachError(
            f"{type(optimizer).__name__} keeps no momentum, which policy {policy.name!r} reads",
            remedy="use SGD with momentum > 0, Adam or AdamW",
        )


def _check_owner(gm: SwatModule, optimizer: torch.optim.Optimizer) -> None:
    own = {id(p) for p in gm.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise AttachError(
            "the optimizer holds none of the model's parameters",
            value=type(optimizer).__name__,
            remedy="make it from gm.parameters()",
        )


def momentum_of(optimizer: torch.optim.Optimizer, layer: SparseLayer) -> Tensor | None:
    """The momentum of a layer's weight; None if the optimizer has not updated it yet."""
    state = optimizer.state.get(layer.weight)
    if not state:
        return None
    if isinstance(buffer := state.get("momentum_buffer"), Tensor):
        return buffer
    if "exp_avg" in state and "exp_avg_sq" in state:
        first, second = state["exp_avg"], state["exp_avg_sq"]
        return torch.div(first, second.sqrt().add_(1e-8))
    raise AttachError(
        f"{type(optimizer).__name__} keeps no momentum, which the layer's policy reads",
        layer=layer.plan.name,
        remedy="use SGD with momentum > 0, Adam or AdamW",
    )


@torch.no_grad()
def redistribute(gm: SwatModule, optimizer: torch.optim.Optimizer) -> None:
    """Share the budget of each SWAT-M rule over its layers by their mean momentum.

    Layers that the optimizer has not updated (frozen, say) keep the density they have.
    """
    policy = Policy.from_json(gm.meta["policy"])
    for _, rule, members in _budgets(gm, policy):
        if rule.distribution == "momentum":
            _redistribute(rule, members, optimizer)


def _redistribute(
    rule: Policy, members: list[SparseLayer], optimizer: torch.optim.Optimizer
) -> None:
    layers, momenta = [], []
    for layer in members:
        momentum = momentum_of(optimizer, layer)
        if momentum is not None:
            layers.append(layer)
            momenta.append(_mean_over_active(momentum, layer))
    sizes = [layer.weight.numel() for layer in layers]
    target = Density.from_sparsity(rule.sparsity).value
    budgets = momentum_budgets(momenta, sizes, target)
    for layer, size, count in zip(layers, sizes, budgets, strict=True):
        layer.set_density(Density(count / size))


def _mean_over_active(momentum: Tensor, layer: SparseLayer) -> float:
    keep = layer.keep()
    active = int(keep.sum().item())
    return float((momentum.abs() * keep).sum().item()) / max(active, 1)
