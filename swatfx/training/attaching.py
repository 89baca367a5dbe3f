"""What happens to a compiled model between forwards: refresh, attach, and after a load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes.choose_kernels import follow_densities
from swatfx.arguments import COUNT, checked, instance, optional
from swatfx.compiled import SwatModule, sparse_layers, unwrap
from swatfx.masks import held_by, optimizers_of
from swatfx.ops.copied import tell_loaded
from swatfx.ops.origin import note_load
from swatfx.training.attachment import Attachment, Handle, attachment_of


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
    attachment = attachment_of(module)
    if not module.swat.stale:  # what came along belongs to what came along
        for _, threshold in module.swat.thresholds():
            threshold.history.forget()
        shares = {}
        for layer in sparse_layers(module):
            zeroed = layer.plan.rule.zero_inactive == "always"
            shares[layer.plan.name] = layer.weight_threshold.take_loaded(
                layer.weight, zeroed=zeroed, is_copy=attachment is None
            )
        if module.swat.clock.updates.item():  # before the first, nothing is set to zero
            tell_loaded(shares)
    module.accept_weights(has_values=True)
    if module.swat.stale:
        module.swat.stale = False
        for layer in sparse_layers(module):
            layer.weight_threshold.take_dense()
        refresh(module)
        for layer in sparse_layers(module):
            threshold = layer.weight_threshold
            if not (module.swat.clock.updates.item() or threshold.is_copy):
                threshold.recompute(layer.weight)  # held masks, too, were of other weights
    follow_densities(module)
    if attachment is not None:
        attachment.restart()


def watch_loads(model: nn.Module, gm: SwatModule) -> None:
    """Let weights that are loaded into modules of `model` or of `gm` alone have other thresholds.

    `gm`'s own `load_state_dict` brings thresholds along.
    """
    kept: set[int] = set()
    for layer in sparse_layers(gm):
        threshold = layer.weight_threshold
        if layer.node.weight.op == "get_attr" and isinstance(layer.weight, nn.Parameter):
            threshold.is_parameter = True
            if threshold.period > 1:
                kept.add(id(layer.weight))
    for module in (*model.modules(), *gm.modules()):
        if module is gm or not any(id(p) in kept for p in module._parameters.values()):
            continue
        if note_load not in module._load_state_dict_post_hooks.values():
            module.register_load_state_dict_post_hook(note_load)


@checked(gm=instance(nn.Module))
def dense_state_dict(gm: nn.Module) -> dict[str, Tensor]:
    """The state dict that the original model would have: no key of ours, and weights dense.

    What a held mask leaves out is zero in it, also where the model is an average of others whose
    masks differed. The weights that SWAT selects anew at every refresh are all there.

    Args:
        gm: a compiled model; wrapped by DistributedDataParallel, torch.compile or an AveragedModel,
            or inside of another module, whose state dict it is then.
    """
    top = gm
    while not isinstance(top, SwatModule) and len(children := list(top.children())) == 1:
        if top.__dict__.get("_parameters") or not isinstance(_wrapped(top), nn.Module):
            break
        top = children[0]
    roots = list(compiled_models(top))
    if not roots:
        roots, top = [("", unwrap(gm))], unwrap(gm)
    state = dict(top.state_dict())
    for prefix, root in roots:
        before = f"{prefix}." if prefix else ""
        masked = _masked_weights(root)
        for name in [name for name in state if name.startswith(before)]:
            inner = name.removeprefix(before)
            value = state.pop(name)
            if inner.startswith("swat."):
                continue
            if inner in masked:
                value = value.masked_fill(~masked[inner].to(value.device), 0)
            state[before.replace("_orig_mod.", "") + inner] = value
    return state


def _wrapped(module: nn.Module) -> Any:
    return getattr(module, "_orig_mod", None) or getattr(module, "module", None)


def _masked_weights(gm: SwatModule) -> dict[str, Tensor]:
    """Name of each weight under a held mask, and of its aliases -> the mask."""
    masked: dict[int, Tensor] = {}
    for layer in sparse_layers(gm):
        rule = layer.plan.rule
        sees = rule.forward_weight or rule.zero_inactive == "always"
        if layer.weight_threshold.is_held and sees:
            masked[id(layer.weight)] = layer.keep()
    names = gm.named_parameters(remove_duplicate=False)
    return {name: masked[id(p)] for name, p in names if id(p) in masked}


def compiled_models(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, SwatModule]]:
    """(path, compiled model) of each in `module`, itself among them."""
    if isinstance(module, SwatModule):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from compiled_models(child, f"{prefix}.{name}" if prefix else name)


@checked(gm=instance(nn.Module), steps_per_epoch=optional(COUNT), total_steps=optional(COUNT))
def attach(
    gm: nn.Module,
    optimizer: torch.optim.Optimizer
    | Sequence[torch.optim.Optimizer]
    | Mapping[str, torch.optim.Optimizer],
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

    Attaching again replaces: optimizers that share a parameter with the new ones go. Those that
    share none stay, so that several may be attached one by one. They have one clock: a training
    step counts once, whichever of them step; so do the steps of optimizers that take turns, once a
    round. A step that an optimizer leaves out changes nothing.

    Args:
        gm: the compiled model, as it is trained: wrapped, if it is, or inside of another module.
        optimizer: over its parameters, or several, in a list, tuple or dict; accelerate's or
            Lightning's wrappers of them will do.
        steps_per_epoch: training steps an epoch; wanted by schedules that count epochs (SET, SNFS,
            soft filter pruning, `hold_from_epoch`).
        total_steps: training steps in all; wanted by schedules that end or decay.

    Raises:
        AttachError: the optimizer keeps no momentum where it is needed or is another model's, the
            schedule is not known, a masked weight is computed or read by other code, or the ranks'
            masks differ. What was attached before still is. A weight that trains and that none of
            the attached optimizers holds is refused at the first step.
    """
    roots = [root for _, root in compiled_models(gm)] or [unwrap(gm)]
    optimizers = optimizers_of(optimizer)
    planned = []
    for root in roots:
        root.follow_all()
        attachment = attachment_of(root) or Attachment(root)
        own = {id(p) for p in root.parameters()}
        mine = [o for o in optimizers if len(roots) == 1 or held_by(o) & own]
        times = (steps_per_epoch, total_steps)
        planned.append((root, attachment, mine, attachment.plan(mine, times, _ranks(gm, root))))
    for _, _, _, plan in planned:
        plan.check_ranks()
    parts = []
    for root, attachment, mine, plan in planned:
        root.__dict__["attachment"] = attachment
        root.swat.clock.lost = ""
        for layer in sparse_layers(root):
            layer.weight_threshold.become_own()
        parts.append((attachment, attachment.carry_out(plan, mine)))
    return Handle(parts)


def _ranks(module: nn.Module, root: SwatModule) -> bool:
    """Whether gradients of `root` are averaged over ranks by a wrapper in or around `module`."""
    parallel = nn.parallel.DistributedDataParallel
    wrappers = [m for m in module.modules() if isinstance(m, parallel)]
    return any(m is root for wrapper in wrappers for m in wrapper.modules())
