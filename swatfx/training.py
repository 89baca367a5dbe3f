"""What happens to a compiled model between forwards: refresh, attach, and after a load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swatfx.density import Density
from swatfx.distributions import momentum_budgets
from swatfx.errors import AttachError
from swatfx.graph_module import SwatModule, unwrap
from swatfx.layers import SparseLayer, sparse_layers
from swatfx.policy import Policy


def refresh(gm: nn.Module) -> None:
    """Bring every weight threshold up to date with the weights as they are.

    Raises:
        InputError: a weight holds NaN; names the layer, and no threshold has changed.
    """
    root = unwrap(gm)
    layers = list(sparse_layers(root))
    for layer in layers:
        layer.weight_threshold.check(layer.weight)
    for layer in layers:
        layer.weight_threshold.recompute(layer.weight)


def after_load(module: nn.Module, incompatible: Any) -> None:
    """After `load_state_dict` of a dense checkpoint: thresholds belong to the new weights."""
    assert isinstance(module, SwatModule)
    if module.swat.stale:
        module.swat.stale = False
        refresh(module)


def dense_state_dict(gm: nn.Module) -> dict[str, Tensor]:
    """The state dict that the original model would have: all weights dense, no key of ours."""
    state = unwrap(gm).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("swat.")}


class Handle:
    """What `attach` returns; `detach()` takes the hooks off the optimizer again."""

    def __init__(self, gm: SwatModule, optimizer: torch.optim.Optimizer, policy: Policy) -> None:
        self._gm = gm
        self._optimizer = optimizer
        self._policy = policy
        self._hook = optimizer.register_step_post_hook(self._after_step)
        gm.swat.clock.attached = True

    def detach(self) -> None:
        """Remove the hooks; a policy that needs them will refuse to train on."""
        self._hook.remove()
        self._gm.swat.clock.attached = False

    def _after_step(self, *_: Any) -> None:
        updates = self._gm.swat.clock.updates
        updates.add_(1)
        if not self._policy.needs_optimizer:
            return
        if int(updates.item()) % self._policy.redistribute_every == 0:
            redistribute(self._gm, self._optimizer)


def attach(gm: nn.Module, optimizer: torch.optim.Optimizer) -> Handle:
    """Hang what a policy needs from the optimizer on its step hooks.

    For SWAT-M, densities follow the momentum after every `redistribute_every` optimizer steps, and
    take effect at the next threshold refresh. Policies that need nothing accept any optimizer.

    Raises:
        AttachError: the optimizer keeps no momentum or is another model's, or the model has an
            optimizer already.
    """
    root = unwrap(gm)
    policy = Policy.from_json(root.meta["policy"])
    if root.swat.clock.attached:
        raise AttachError("an optimizer is attached already", remedy="call handle.detach() first")
    if policy.needs_optimizer:
        _check_momentum(optimizer)
        _check_owner(root, optimizer)
    return Handle(root, optimizer, policy)


def _check_momentum(optimizer: torch.optim.Optimizer) -> None:
    betas = all("betas" in group for group in optimizer.param_groups)
    momentum = all(group.get("momentum", 0) for group in optimizer.param_groups)
    if not (betas or momentum):
        raise AttachError(
            f"{type(optimizer).__name__} keeps no momentum, which SWAT-M shares its budget by",
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


def _momentum(optimizer: torch.optim.Optimizer, layer: SparseLayer) -> Tensor | None:
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
        f"{type(optimizer).__name__} keeps no momentum, which SWAT-M shares its budget by",
        layer=layer.plan.name,
        remedy="use SGD with momentum > 0, Adam or AdamW",
    )


@torch.no_grad()
def redistribute(gm: SwatModule, optimizer: torch.optim.Optimizer) -> None:
    """Share the budget of each SWAT-M rule over its layers by their mean momentum.

    Layers that the optimizer has not updated (frozen, say) keep the density they have.
    """
    policy = Policy.from_json(gm.meta["policy"])
    groups: dict[tuple[int, Policy], list[SparseLayer]] = {}
    for layer in sparse_layers(gm):
        groups.setdefault(policy.rule_for(layer.plan.name), []).append(layer)
    for (_, rule), members in groups.items():
        if rule.distribution == "momentum":
            _redistribute(rule, members, optimizer)


def _redistribute(
    rule: Policy, members: list[SparseLayer], optimizer: torch.optim.Optimizer
) -> None:
    layers, momenta = [], []
    for layer in members:
        momentum = _momentum(optimizer, layer)
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
