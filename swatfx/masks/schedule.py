"""When held masks change, and by how much: pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swatfx.density import Density
from swatfx.errors import AttachError
from swatfx.masks.rules import GROWS
from swatfx.policy import Policy


@dataclass(frozen=True)
class Schedule:
    """A policy's fields on the time axis of one training run.

    Attributes:
        policy: whose fields say what happens when.
        steps_per_epoch: optimizer steps an epoch; None if unknown.
        total_steps: of the whole training; None if unknown.
    """

    policy: Policy
    steps_per_epoch: int | None = None
    total_steps: int | None = None

    def check(self) -> None:
        """Raise AttachError if the policy's schedule wants a number that is not known."""
        policy = self.policy
        by_epoch = policy.updates_masks and policy.update_every == 0
        by_total = policy.updates_masks and (
            policy.drop_decay == "cosine" or policy.ramp != "none" or policy.update_until < 1
        )
        wanted = {
            "steps_per_epoch": by_epoch or bool(policy.hold_from_epoch),
            "total_steps": by_total,
        }
        for name, is_wanted in wanted.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AttachError(f"{name} must be at least 1", value=value)
            if is_wanted and value is None:
                raise AttachError(
                    f"policy {policy.name!r} has a schedule that wants {name}",
                    remedy="swatfx.attach(gm, optimizer, steps_per_epoch=len(loader),"
                    " total_steps=len(loader) * epochs)",
                )

    def is_due(self, step: int) -> bool:
        """Whether masks change after optimizer step `step`, counted from 1.

        After the very last step the grow rule says whether it rests.
        """
        policy = self.policy
        if not policy.updates_masks:
            return False
        every = policy.update_every or self.steps_per_epoch
        assert every is not None  # check() has seen to it
        if self.total_steps is not None:
            if step > policy.update_until * self.total_steps or step > self.total_steps:
                # A ramp ends on its target even where its end is no multiple of the interval.
                return False
            if step == self.total_steps and GROWS[policy.grow].rests:
                return False
            if policy.ramp != "none" and step == self._end():
                return True
        return step % every == 0

    def fraction(self, step: int) -> float:
        """Fraction of the active weights that the update after `step` drops."""
        policy = self.policy
        if policy.drop_decay == "constant":
            return policy.drop_fraction
        progress = min(1.0, step / self._end())
        return policy.drop_fraction / 2 * (1 + math.cos(math.pi * progress))

    def density(self, target: Density, step: int) -> Density:
        """Density that a layer has after the update at `step`, its target at the end of a ramp.

        Zhu and Gupta's cubic: s_t = s (1 - (1 - t / T) ** 3).
        """
        if self.policy.ramp == "none" or step >= self._end():
            return target
        left = (1 - step / self._end()) ** 3
        return Density(1 - (1 - target.value) * (1 - left))

    def holds_after(self, step: int) -> bool:
        """Whether the active set is frozen by the time that `step` steps are done (figure 8)."""
        epoch = self.policy.hold_from_epoch
        return bool(epoch) and step >= (epoch or 0) * (self.steps_per_epoch or 1)

    def _end(self) -> int:
        """Last step of the updates."""
        assert self.total_steps is not None
        return max(1, math.floor(self.policy.update_until * self.total_steps))
