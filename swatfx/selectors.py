"""Selectors: which elements of a tensor Top-K keeps (paper section 3.3.1, appendix A.5).

A selector turns a tensor and a density into a small *state* (a threshold, or a bitmask) when
thresholds are refreshed, and a tensor and a state into a mask whenever the tensor is used. An
element is kept unless its score is below the threshold: ties stay, and so does NaN, so that it
reaches the loss.

Tensors are described by `spatial`, the number of spatial dimensions: activations are
(N, C, *spatial) or (C, *spatial); with `spatial` 0, (*any, C) of a linear layer. Weights are
(F, C, *kernel).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swatfx import bits
from swatfx.density import Density
from swatfx.errors import PolicyError, UnknownNameError
from swatfx.topk import Reduce, fused_search, grouped_kth_magnitude, kth_magnitude


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


def _magnitude(x: Tensor, axes: Axes) -> Tensor:
    return x.abs()


def _l1_over(*, filters: bool, channels: bool) -> Callable[[Tensor, Axes], Tensor]:
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
    score: Callable[[Tensor, Axes], Tensor] = _magnitude
    groups: tuple[str, ...] = ()
    weights_only: bool = False
    fixed_density: bool = False

    def check(self, density: Density, layer: str) -> None:
        """Raise PolicyError if this selector cannot give `density`."""

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
    def ranks_magnitudes(self) -> bool:
        """Whether an element is kept by its own magnitude and nothing else: kernels know that."""
        own = type(self)
        plain = own.state is Selector.state and own.keep is Selector.keep
        return plain and self.score is _magnitude

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


@dataclass(frozen=True)
class RandomSelector(Selector):
    """Keep each element with probability d, drawn anew at every refresh (the null hypothesis).

    The state is int64 [2], the seed of the draw and the bits of the density as a float64; the mask
    is drawn from it whenever it is used.
    """

    def state_shape(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """One (seed, density) pair."""
        return (2,)

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Integers, so that no cast of the model changes the draw."""
        return torch.int64

    def state(
        self, x: Tensor, density: Density, axes: Axes, seed: int, reduce: Reduce | None = None
    ) -> Tensor:
        """The seed of this refresh, and the density."""
        value = torch.tensor([density.value], dtype=torch.float64).view(torch.int64)
        return torch.cat([torch.tensor([seed]), value]).to(x.device)

    def keep(self, x: Tensor, state: Tensor, axes: Axes) -> Tensor:
        """Draw the mask that `state` stands for."""
        host = state.cpu()
        density = host[1:].view(torch.float64).item()
        generator = torch.Generator(device=x.device).manual_seed(int(host[0].item()))
        return torch.rand(x.shape, generator=generator, device=x.device) < density


@dataclass(frozen=True)
class NofM(Selector):
    """The n largest of every m consecutive weights along the input dimension.

    The mask is kept between refreshes, since no threshold reproduces it on moved weights. A last
    group of fewer than m keeps its n largest.
    """

    n: int = 2
    m: int = 4

    def check(self, density: Density, layer: str) -> None:
        """The density is n/m, or 1."""
        if not density.is_dense and abs(density.value - self.n / self.m) > 1e-9:
            raise PolicyError(
                f"selector {self.name!r} keeps {self.n}/{self.m} of the weights",
                layer=layer,
                value=f"sparsity {1 - density.value:g}",
                remedy=f"use sparsity {1 - self.n / self.m:g}, or another selector",
            )

    def state_shape(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """A bit a weight."""
        return ((torch.Size(shape).numel() + 7) // 8,)

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Bytes of the bitmask."""
        return torch.uint8

    def state(
        self, x: Tensor, density: Density, axes: Axes, seed: int, reduce: Reduce | None = None
    ) -> Tensor:
        """Bitmask of the n largest of every m."""
        if density.is_dense:
            return bits.mask_to_bits(torch.ones(x.shape, dtype=torch.bool, device=x.device))
        scores = x.abs().movedim(axes.channel, -1)
        channels = scores.shape[-1]
        scores = torch.nn.functional.pad(scores, (0, -channels % self.m), value=-1.0)
        groups = scores.unflatten(-1, (-1, self.m))
        top = groups.topk(self.n, dim=-1).indices
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, top, True)
        return bits.mask_to_bits(keep.flatten(-2)[..., :channels].movedim(-1, axes.channel))

    def keep(self, x: Tensor, state: Tensor, axes: Axes) -> Tensor:
        """The stored mask."""
        return bits.bits_to_mask(state, x.numel()).view(x.shape)


# Add a selector by adding a value here, or at run time with `register`.
SELECTORS: dict[str, Selector] = {
    s.name: s
    for s in (
        Selector("nchw"),
        Selector("chw", groups=("sample",)),
        Selector("hw", groups=("sample", "channel")),
        Selector("channel", _l1_over(filters=False, channels=False), weights_only=True),
        Selector(
            "channel-per-filter",
            _l1_over(filters=False, channels=False),
            ("sample",),
            weights_only=True,
        ),
        Selector("filter", _l1_over(filters=False, channels=True), weights_only=True),
        Selector("input-channel", _l1_over(filters=True, channels=False), weights_only=True),
        RandomSelector("random"),
    )
}


def register(selector: Selector) -> None:
    """Make a selector known under its name to every policy."""
    SELECTORS[selector.name] = selector


def get(name: str) -> Selector:
    """The selector called `name`; "2:4" and its like are made on demand.

    Raises:
        UnknownNameError: no such selector; the message lists the nearest.
    """
    if name in SELECTORS:
        return SELECTORS[name]
    match = re.fullmatch(r"(\d+):(\d+)", name)
    if match and 0 < int(match[1]) < int(match[2]):
        return NofM(name, weights_only=True, fixed_density=True, n=int(match[1]), m=int(match[2]))
    raise UnknownNameError("selector", name, [*SELECTORS, "2:4"])
