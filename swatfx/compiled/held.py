"""The state of a weight whose mask is held, or will be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swatfx.compiled.state import WeightThreshold
from swatfx.ops import old_masks
from swatfx.ops.copied import digest_of
from swatfx.tensors import bits


class HeldThreshold(WeightThreshold):
    """The bitmask of a weight, uint8 [ceil(n / 8)], that no forward refreshes once it is held.

    Buffers more, 0-dim on the host: `held` and `open`, 1 for yes and 0 for no, the latter while
    inactive weights receive their gradient although updates are masked (the steps at which RigL
    grows). They are float64, as densities are: what averages the floats of models can take their
    mean, and rounding does not make a no of the mean of two yes. And `digest` of a held mask, an
    integer as the mask is: what takes the mean of all tells by it that this was no good.
    """

    held: Tensor
    open: Tensor
    digest: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ("held", "open"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device="cpu"))
        self.register_buffer("digest", torch.zeros((), dtype=torch.int64, device="cpu"))

    @property
    def is_held(self) -> bool:
        """Whether the state stays as it is."""
        return old_masks.is_held(self.stamp, self.held)

    def hold(self) -> None:
        """Keep the state as it is from now on; when it was refreshed last is no matter any more."""
        self.held.fill_(1)
        self.stamp.fill_(-1)
        self.seal()

    @torch.no_grad()
    def seal(self) -> None:
        """Note that the mask, if it is held, is whole."""
        if self.is_held and not self.threshold.is_meta:
            self.digest.fill_(digest_of(self.threshold))

    def settle(self) -> None:
        """Make yes or no again of flags that were averaged."""
        for flag in (self.held, self.open):
            if flag.item() not in (0, 1):
                flag.fill_(flag.item() >= 0.5)

    def set_mask(self, keep: Tensor) -> None:
        """Keep what the bool tensor `keep` says, and let no other gradient through."""
        self.threshold.copy_(bits.mask_to_bits(keep))
        self.seal()
        self.let_through(False)

    def let_through(self, gradients: bool) -> None:
        """Say whether inactive weights receive theirs."""
        if self.open.item() != gradients:  # a pending backward would object to a write
            self.open.fill_(gradients)

    @torch.no_grad()
    def recompute(self, x: Tensor) -> None:
        """Set the mask from `x` now, and let no other gradient through."""
        super().recompute(x)
        self.seal()
        self.let_through(False)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.upgrade(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def upgrade(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Bring what is at `prefix` into today's form, if it is of before 2026-11."""
        stamp, state = (state_dict.get(prefix + name) for name in ("stamp", "threshold"))
        if not (isinstance(stamp, Tensor) and isinstance(state, Tensor)):
            return
        if f"{prefix}held" not in state_dict:
            found = old_masks.read(stamp, state, 8 * self.threshold.numel()) or {}
            state_dict.update({prefix + name: value for name, value in found.items()})
        if f"{prefix}held" in state_dict and f"{prefix}digest" not in state_dict:
            mask = state_dict[prefix + "threshold"]
            value = 0 if mask.is_meta else digest_of(mask)
            state_dict[prefix + "digest"] = torch.tensor(value, device="cpu")
