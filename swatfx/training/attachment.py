"""What hangs on the optimizers of a compiled model: step hooks, their clock, and who owns what.

The clock counts training steps, not optimizers: those that step after the same training forward
make one step together, and where they take turns, one round of turns is one step. A step that its
optimizer leaves out (found_inf) is none.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from swatfx import masks
from swatfx.compiled import SparseLayer, SwatModule, current, learned, sparse_layers
from swatfx.errors import AttachError
from swatfx.masks import (
    MaskUpdater,
    Optimizer,
    Owners,
    Schedule,
    StepWatch,
    check_momentum,
    check_ranks,
    check_weights,
    held_by,
    overflowed,
)
from swatfx.policy import Policy
from swatfx.training.following import KernelChoice
from swatfx.training.momentum import Redistribution

Updater = MaskUpdater | Redistribution | KernelChoice


@dataclass(eq=False)
class Hooked:
    """One attached optimizer.

    Attributes:
        optimizer: it.
        watch: tells steps that it leaves out.
        hooks: of ours on its `step`.
        step: the training step that it is about to take; 0 where it is about to take none.
        seen: the training forwards at its last step.
    """

    optimizer: Optimizer
    watch: StepWatch
    hooks: list[Any] = field(default_factory=list)
    step: int = 0
    seen: int = -1

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()


@dataclass(frozen=True)
class Plan:
    """What several optimizers do for one compiled model, checked, and nothing changed yet."""

    owners: Owners
    updaters: Sequence[Updater]
    times: tuple[int | None, int | None]
    all_ranks: bool

    def check_ranks(self) -> None:
        """Raise AttachError where the ranks hold different masks."""
        updaters = [u for u in self.updaters if isinstance(u, MaskUpdater)]
        held = [layer for u in updaters for layer in u.layers if layer.weight_threshold.is_held]
        if self.all_ranks and held:
            check_ranks(held)


class Attachment:
    """The optimizers of one compiled model.

    Args:
        gm: the compiled model.
    """

    def __init__(self, gm: SwatModule) -> None:
        self._gm = gm
        self._clock = gm.swat.clock
        self._policy = gm.swat.policy
        self._attached: list[Hooked] = []
        self._plan: Plan | None = None
        self._round: dict[Hooked, int] = {}  # who has stepped, with the training forwards then
        self._opened = -1  # training forwards when the first of them did
        self._together = False  # whether several step after one forward
        self._closures: weakref.WeakSet[Any] = weakref.WeakSet()  # ours, around users' closures
        self._budgets = budgets(gm)
        # Layers that an optimizer has to hold, and for each the module and name of its weight.
        self._wanted = [
            (layer, *_place(gm, layer))
            for _, rule, layers in self._budgets
            for layer in layers
            if rule.needs_optimizer or rule.hold_from_epoch is not None
        ]
        self._penalties = {
            layer.plan.name: rule.penalty
            for _, rule, layers in self._budgets
            for layer in layers
            if rule.penalty
        }
        self._learned = {
            id(layer.weight_threshold.threshold): layer
            for _, _, layers in self._budgets
            for layer in layers
            if isinstance(layer.weight_threshold, learned.LearnedThreshold)
        }

    def __deepcopy__(self, _: dict[int, Any]) -> None:
        """A copy of the model has no optimizer."""

    # ---- Attaching -------------------------------------------------------------------------------

    def plan(
        self, optimizers: Sequence[Optimizer], times: tuple[int | None, int | None], all_ranks: bool
    ) -> Plan:
        """Check all that can be checked.

        Raises:
            AttachError: as `swatfx.attach` says.
        """
        gm = self._gm
        rest = self._rest(optimizers)
        if rest and self._plan is not None:
            epoch, total = self._plan.times
            times = (
                epoch if times[0] is None else times[0],
                total if times[1] is None else times[1],
            )
            all_ranks = all_ranks or self._plan.all_ranks
        if self._policy.needs_optimizer:
            for optimizer in optimizers:
                _check_owner(gm, optimizer)
        owners = Owners([*(hooked.optimizer for hooked in rest), *optimizers])
        owners.look()
        updaters: list[Updater] = []
        for position, rule, layers in self._budgets:
            schedule = Schedule(rule, *times)
            schedule.check()
            if rule.distribution == "momentum" or "momentum" in masks.needs(rule):
                for optimizer in optimizers:
                    if owners.share(optimizer, layers):
                        check_momentum(optimizer, rule.name)
            if rule.distribution == "momentum":
                updaters.append(Redistribution(rule, layers, owners))
            if rule.hold_from_epoch is not None:
                check_weights(gm, rule, layers)
                memory = functools.partial(gm.swat.memory_of, position + 1)
                updaters.append(MaskUpdater(schedule, layers, owners, memory, all_ranks))
        if self._policy.moves_densities:
            moving = [layer for _, _, layers in self._budgets for layer in layers]
            updaters.append(KernelChoice(gm, moving))
        for optimizer in optimizers:
            learned.check_parameters(gm, optimizer)
        return Plan(owners, updaters, times, all_ranks)

    def carry_out(self, plan: Plan, optimizers: Sequence[Optimizer]) -> list[Hooked]:
        """Take on the optimizers; those attached before that share a parameter with them go."""
        gm = self._gm
        rest = self._rest(optimizers)
        for hooked in self._attached:
            if hooked not in rest:
                hooked.remove()
        self._stop()
        for optimizer in optimizers:
            learned.add_parameters(gm, optimizer)
        new = []
        for optimizer in optimizers:
            hooked = Hooked(optimizer, StepWatch(optimizer))
            # Not to be traced where someone compiles the step: they decide by values.
            before, after = map(torch.compiler.disable, (self._before_step, self._after_step))
            hooked.hooks = [
                optimizer.register_step_pre_hook(functools.partial(before, hooked)),
                optimizer.register_step_post_hook(functools.partial(after, hooked)),
            ]
            new.append(hooked)
        self._attached = [*rest, *new]
        self._plan = plan
        self._round, self._opened, self._together = {}, -1, False
        self._clock.attached = bool(self._attached)
        self.restart()
        return new

    def remove(self, gone: Sequence[Hooked]) -> None:
        """Let the optimizers go, those of them that still are here."""
        left = [hooked for hooked in self._attached if hooked not in gone]
        if len(left) == len(self._attached):
            return
        for hooked in gone:
            hooked.remove()
            self._round.pop(hooked, None)
        self._attached = left
        self._clock.attached = bool(left)
        self._stop()
        if left and self._plan is not None:
            self._plan = self.plan([], self._plan.times, self._plan.all_ranks)
            self.restart()
        else:
            self._plan = None

    def dissolve(self) -> None:
        """Let all optimizers go: a layer has another weight, which none of them was asked about."""
        self.remove(list(self._attached))

    def restart(self) -> None:
        """Masks, weights or the clock were written by others: take them as they are."""
        if self._plan is not None:
            self._plan.owners.look()
            for updater in self._plan.updaters:
                updater.start(int(self._clock.updates.item()))

    def _stop(self) -> None:
        if self._plan is not None:
            for updater in self._plan.updaters:
                updater.stop()

    def _rest(self, optimizers: Sequence[Optimizer]) -> list[Hooked]:
        """Who stays when these come: they share no parameter with any of them."""
        own = {id(p) for p in self._gm.parameters()}
        new = [held_by(optimizer) & own for optimizer in optimizers]
        return [
            hooked
            for hooked in self._attached
            if not any(hooked.optimizer is optimizer for optimizer in optimizers)
            and not any(held_by(hooked.optimizer) & held for held in new)
        ]

    # ---- Hooks -----------------------------------------------------------------------------------

    def _before_step(
        self, hooked: Hooked, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if overflowed(hooked.optimizer):
            hooked.step = 0
            return None
        self._check_owned()
        hooked.watch.before()
        closure: Any = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            # A subclass that calls its parent's step runs the hooks twice; one penalty is enough.
            self._see_gradients(hooked, again=hooked.step > 0)
            return None
        if closure in self._closures:
            return None

        def then_see() -> Any:
            loss = closure()  # it computes the gradients, within the step
            self._see_gradients(hooked)
            return loss

        hooked.step = 0
        self._closures.add(then_see)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_see}
        return (*args[:1], then_see, *args[2:]), kwargs

    def _see_gradients(self, hooked: Hooked, again: bool = False) -> None:
        assert self._plan is not None
        hooked.step = int(self._clock.updates.item()) + self._begins_a_step(hooked)
        if self._penalties and not again:
            # A fused optimizer unscales gradients itself, by what GradScaler hands to it.
            scale = getattr(hooked.optimizer, "grad_scale", None)
            held = held_by(hooked.optimizer)
            mine = {self._learned[k].plan.name for k in held & self._learned.keys()}
            penalties = {name: w for name, w in self._penalties.items() if name in mine}
            learned.add_penalty(self._gm, penalties, 1.0 if scale is None else scale)
        changed = [u.before_step(hooked.optimizer, hooked.step) for u in self._plan.updaters]
        if any(changed):
            self._plan.check_ranks()

    def _after_step(self, hooked: Hooked, *_: Any) -> None:
        step, hooked.step = hooked.step, 0
        if self._plan is None or overflowed(hooked.optimizer):
            return
        optimizer, updaters = hooked.optimizer, self._plan.updaters
        if step == 0:  # counted already, by the step of a parent class: what came after it may move
            for updater in updaters:
                updater.hold(optimizer)
            return
        if not hooked.watch.moved():
            for updater in updaters:
                updater.skip(optimizer)
            return
        self._count(hooked)
        changed = [updater.after_step(optimizer, step) for updater in updaters]
        if any(changed):
            self._plan.check_ranks()
        if self._learned:
            held = held_by(optimizer)
            mine = [current(layer) for key, layer in self._learned.items() if key in held]
            learned.reset_if_empty(self._gm, layers=mine)

    def _check_owned(self) -> None:
        """Raise AttachError, naming the layer, if a weight that trains is no one's here."""
        assert self._plan is not None
        owners = self._plan.owners
        owners.look()
        for layer, module, name in self._wanted:
            weight = layer.weight
            if module is None or not weight.requires_grad:
                continue
            if module._parameters.get(name) is not weight:
                raise AttachError(
                    "the layer has another weight than when the optimizer was attached",
                    layer=layer.plan.name,
                    remedy="attach an optimizer of the parameters as they are now",
                )
            if not owners.of(weight):
                raise AttachError(
                    f"policy {self._policy.name!r} wants the optimizer of this layer's weight, but"
                    " none that is attached holds it",
                    layer=layer.plan.name,
                    remedy="attach its optimizer, too: swatfx.attach(gm, [first, second]);"
                    " or freeze the weight with requires_grad_(False)",
                )

    # ---- The clock -------------------------------------------------------------------------------

    def _begins_a_step(self, hooked: Hooked) -> bool:
        """Whether a step of this optimizer now begins a new training step."""
        now = int(self._clock.iteration.item())
        return (
            not self._round
            or hooked in self._round
            or (self._together and now not in self._round.values())
        )

    def _meets(self, hooked: Hooked, now: int) -> bool:
        return any(seen == now for other, seen in self._round.items() if other is not hooked)

    def _count(self, hooked: Hooked) -> None:
        now = int(self._clock.iteration.item())
        if self._begins_a_step(hooked):
            # One that fell behind, since it was skipped, and stepped just now belongs to this step.
            late = self._meets(hooked, now) and now != self._opened
            self._together = self._together or late
            self._round = {h: seen for h, seen in self._round.items() if late and seen == now}
            self._opened = now
            self._clock.updates.add_(1)
        else:
            self._together = self._together or self._meets(hooked, now)
        self._round[hooked] = now


class Handle:
    """What `attach` returns; `detach()` takes the hooks off the optimizers again."""

    def __init__(self, parts: Sequence[tuple[Attachment, Sequence[Hooked]]]) -> None:
        self._parts = parts

    def detach(self) -> None:
        """Remove the hooks; a policy that needs them will refuse to train on.

        Optimizers that a later attach has replaced are gone already: nothing happens to those that
        came after them.
        """
        for attachment, hooked in self._parts:
            attachment.remove(hooked)


def budgets(gm: SwatModule) -> list[tuple[int, Policy, list[SparseLayer]]]:
    """(position of the rule, rule, its layers) of each rule that takes some."""
    groups: dict[tuple[int, Policy], list[SparseLayer]] = {}
    for layer in sparse_layers(gm):
        groups.setdefault((layer.plan.budget, layer.plan.rule), []).append(layer)
    return [(position, rule, layers) for (position, rule), layers in groups.items()]


def attachment_of(gm: SwatModule) -> Attachment | None:
    """What hangs on its optimizers, if anything ever did."""
    found: Attachment | None = gm.__dict__.get("attachment")
    return found


def _place(gm: SwatModule, layer: SparseLayer) -> tuple[nn.Module | None, str]:
    """Module and name of a layer's weight; (None, "") where it is computed."""
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is layer.weight:
                return module, name
    return None, ""


def _check_owner(gm: SwatModule, optimizer: Optimizer) -> None:
    if not held_by(optimizer) & {id(p) for p in gm.parameters()}:
        raise AttachError(
            "the optimizer holds none of the model's parameters",
            value=type(optimizer).__name__,
            remedy="make it from gm.parameters()",
        )
