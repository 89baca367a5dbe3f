"""Selectors that keep a mask rather than a threshold: drawn, n of m, or held."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from swatfx.density import Density
from swatfx.errors import PolicyError
from swatfx.selectors.base import Axes, Selector
from swatfx.selectors.topk import Reduce
from swatfx.tensors import bits


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
        generator = torch.Generator().manual_seed(int(host[0].item()))
        # On the host: devices draw otherwise, and a mask shall not depend on where it is drawn.
        draw = torch.rand(x.shape, generator=generator, device="cpu")
        return (draw < density).to(x.device)


class _Mask(Selector):
    """A selector whose state is the mask itself, uint8 [ceil(n / 8)]."""

    @property
    def holds_mask(self) -> bool:
        """It does."""
        return True

    def state_shape(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """A bit a weight."""
        return ((torch.Size(shape).numel() + 7) // 8,)

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Bytes of the bitmask."""
        return torch.uint8

    def keep(self, x: Tensor, state: Tensor, axes: Axes) -> Tensor:
        """The stored mask; what lies behind it is not read."""
        return bits.bits_to_mask(state[: (x.numel() + 7) // 8], x.numel()).view(x.shape)


@dataclass(frozen=True)
class NofM(_Mask):
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
        # Stable: of equal ones, the first.
        top = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, top, True)
        return bits.mask_to_bits(keep.flatten(-2)[..., :channels].movedim(-1, axes.channel))


@dataclass(frozen=True)
class Held(_Mask):
    """What `base` selected once, kept as a bitmask: for masks that are pruned and regrown."""

    base: Selector = field(default=Selector("nchw"))

    def check(self, density: Density, layer: str) -> None:
        """As `base`."""
        self.base.check(density, layer)

    def own_density(self, shape: tuple[int, ...]) -> Density | None:
        """As `base`."""
        return self.base.own_density(shape)

    def state(
        self, x: Tensor, density: Density, axes: Axes, seed: int, reduce: Reduce | None = None
    ) -> Tensor:
        """The mask that `base` selects now, of equal weights the first; or a random one.

        That one has as many as the density allows, rounded down, since it holds: at least the asked
        sparsity, but never no weight at all.
        """
        if density.is_dense:
            return bits.mask_to_bits(torch.ones(x.shape, dtype=torch.bool, device=x.device))
        if not isinstance(self.base, RandomSelector):
            if type(self.base).state is Selector.state:
                keep = self.base.first_top(x, density, axes)
                return bits.mask_to_bits(keep.expand_as(x))
            state = self.base.state(x, density, axes, seed, reduce)
            return bits.mask_to_bits(self.base.keep(x, state, axes).expand_as(x))
        generator = torch.Generator().manual_seed(seed)  # on the host, as above
        order = torch.randperm(x.numel(), generator=generator, device="cpu")
        keep = torch.zeros(x.numel(), dtype=torch.bool, device="cpu")
        keep[order[: density.count_within(x.numel())]] = True
        return bits.mask_to_bits(keep.to(x.device))
