"""What a selector is, and Top-K of a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swatfx.density import Density
from swatfx.selectors.topk import (
    Reduce,
    exact_top,
    fused_search,
    grouped_kth_magnitude,
    kth_magnitude,
)


@dataclass(frozen=True)
class Axes:
    """Which dimension of a tensor is the sample (or filter) and which the channel."""

    sample: int | None
    channel: int

    @staticmethod
    def of(ndim: int, spatial: int, is_weight: bool) -> Axes:
        """Axes of a weight, or of a conv (`spatial` > 0) or linear activation."""
        if is_weight:
            return Axes(0, 1)
        if spatial:
            return Axes(0, 1) if ndim == spatial + 2 else Axes(None, 0)
        return Axes(0 if ndim > 1 else None, ndim - 1)


def magnitude(x: Tensor, axes: Axes) -> Tensor:
    """Each element's own."""
    return x.abs()


def l1_over(*, filters: bool, channels: bool) -> Callable[[Tensor, Axes], Tensor]:
    """L1 norm over kernels, and over filters or channels as asked."""

    def score(x: Tensor, axes: Axes) -> Tensor:
        dims = [d for d in range(x.dim()) if d not in (axes.sample, axes.channel)]
        dims += [0] if filters else []
        dims += [axes.channel] if channels else []
        if not dims:
            return x.abs()
        # Thresholds are compared with sums that are formed anew at each use, perhaps in another
        # memory format, dtype or device. The detour makes the order of summation not matter.
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        return x.abs().sum(dim=dims, keepdim=True, dtype=wide).float().to(x.dtype)

    return score


def filter_l2(x: Tensor, axes: Axes) -> Tensor:
    """L2 norm of whole filters, as soft filter pruning ranks them."""
    dims = [d for d in range(x.dim()) if d != axes.sample]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return x.to(wide).square().sum(dim=dims, keepdim=True).sqrt().float().to(x.dtype)


@dataclass(frozen=True)
class Selector:
    """Top-K of a score, taken apart in each group.

    Attributes:
        name: what policies call it.
        score: tensor -> scores, broadcastable to the tensor.
        groups: dimensions along which thresholds differ, of "sample" and "channel".
        weights_only: whether activations cannot be selected this way.
        fixed_density: whether it knows one density only, so that none can be assigned to it later.
    """

    name: str
    score: Callable[[Tensor, Axes], Tensor] = magnitude
    groups: tuple[str, ...] = ()
    weights_only: bool = False
    fixed_density: bool = False

    def check(self, density: Density, layer: str) -> None:
        """Raise PolicyError if this selector cannot give `density`."""

    def own_density(self, shape: tuple[int, ...]) -> Density | None:
        """The density that a weight of `shape` has by this selector whatever a policy assigns."""
        return None

    def state_shape(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """Shape of the state for a tensor of `shape`."""
        if not self.groups:
            return ()
        kept = {"sample": axes.sample, "channel": axes.channel}
        dims = {kept[g] for g in self.groups}
        return tuple(n if d in dims else 1 for d, n in enumerate(shape))

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the state for a tensor of `dtype`."""
        return dtype

    @property
    def holds_mask(self) -> bool:
        """Whether the state begins with the mask itself, a bit an element in row-major order."""
        return False

    @property
    def ranks_magnitudes(self) -> bool:
        """Whether an element is kept by its own magnitude and nothing else: kernels know that."""
        own = type(self)
        plain = own.state is Selector.state and own.keep is Selector.keep
        return plain and self.score is magnitude

    def search(self, x: Tensor, density: Density, axes: Axes) -> tuple[Tensor, bool] | None:
        """(state, whether `x` holds NaN) in one pass over `x`; None where no kernel can."""
        if not self.ranks_magnitudes or density.is_dense or not x.numel():
            return None
        return fused_search(x, density, self.state_shape(tuple(x.shape), axes))

    def state(
        self, x: Tensor, density: Density, axes: Axes, seed: int, reduce: Reduce | None = None
    ) -> Tensor:
        """Recompute the state from `x`; `reduce` sums counts over ranks (ungrouped only)."""
        found = self.search(x, density, axes) if reduce is None else None
        if found is not None:
            return found[0]
        shape = self.state_shape(tuple(x.shape), axes)
        if density.is_dense or (x.numel() == 0 and reduce is None):
            return x.new_zeros(shape)
        scores = self.score(x, axes)
        if not self.groups:
            return kth_magnitude(scores, density, reduce)
        return grouped_kth_magnitude(scores, density, shape)

    def keep(self, x: Tensor, state: Tensor, axes: Axes) -> Tensor:
        """Bool mask of what is kept, broadcastable to `x`."""
        return torch.logical_not(self.score(x, axes) < state)

    def first_top(self, x: Tensor, density: Density, axes: Axes) -> Tensor:
        """Bool mask, broadcastable to `x`, of as many as the density asks for: of equal ones the
        first, where `keep` keeps them all.
        """
        shape = self.state_shape(tuple(x.shape), axes)
        return exact_top(self.score(x, axes), density, shape)
