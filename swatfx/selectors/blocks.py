"""Top-K of blocks: so many neighbouring filters by so many neighbouring input channels, at one
kernel position.

A vector that is loaded for one weight of a block serves the others: those of neighbouring filters
in forward, those of neighbouring input channels in the input gradient (swatfx/kernels).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx.density import Density
from swatfx.errors import PolicyError
from swatfx.selectors.base import Axes, Selector

BLOCK = "block-"
MOST = 64  # filters or channels of a block


@dataclass(frozen=True)
class BlockNorm:
    """Root of the mean square of each weight's block: its L2 norm, by the square root of its size.

    Of all masks of whole blocks, those of the largest norms leave out least of the squared weights.
    Where the block does not divide the layer, the last one is smaller. Divided by its size, it is
    ranked by what each of its weights is worth: not last, for having few.

    Attributes:
        filters: neighbours along the first dimension of a weight (F, C, *kernel).
        channels: neighbours along the second: input channels of a group, or inputs.
    """

    filters: int
    channels: int

    def __call__(self, x: Tensor, axes: Axes) -> Tensor:
        """Scores of the shape of `x`, the same throughout a block."""
        return self.spread(self.of_blocks(x), x.shape)

    def of_blocks(self, x: Tensor) -> Tensor:
        """Scores (ceil(F / filters), ceil(C / channels), *kernel) of the blocks of a weight."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        squares = x.to(wide).square()
        # Thresholds are compared with norms that are formed anew at each use, perhaps by a kernel
        # or in another memory format: one order of summation everywhere, channels first.
        for dim, size in ((1, self.channels), (0, self.filters)):
            ragged = [0, 0] * (x.dim() - 1 - dim) + [0, -squares.shape[dim] % size]
            squares = F.pad(squares, ragged) if ragged[-1] else squares
            first, *rest = (
                squares[(slice(None),) * dim + (slice(i, None, size),)] for i in range(size)
            )
            squares = first.clone() if rest else first
            for other in rest:
                squares += other
        return (squares / self.sizes(x)).sqrt().float().to(x.dtype)

    def sizes(self, x: Tensor) -> Tensor:
        """Weights of each block of `x`, broadcastable to what `of_blocks` returns."""
        high, wide = (
            (n - torch.arange(0, n, size, device=x.device)).clamp(max=size)
            for n, size in zip(x.shape, (self.filters, self.channels), strict=False)
        )
        return (high.unsqueeze(1) * wide).view(len(high), len(wide), *[1] * (x.dim() - 2))

    def spread(self, of_blocks: Tensor, shape: torch.Size) -> Tensor:
        """What each weight's block has, of the weight's `shape`."""
        rows = of_blocks.repeat_interleave(self.filters, 0)[: shape[0]]
        return rows.repeat_interleave(self.channels, 1)[:, : shape[1]]


@dataclass(frozen=True)
class BlockSelector(Selector):
    """Top-K of block norms: whole blocks, until the density is reached.

    The threshold is the norm of the block in which the k-th weight lies, so that fewer than a
    block more than the density asks for are kept, but for ties, which stay.
    """

    score: BlockNorm = BlockNorm(1, 2)

    @staticmethod
    def parse(name: str) -> BlockSelector:
        """The selector called "block-FxC", F filters by C input channels.

        Raises:
            PolicyError: there is no such block.
        """
        match = re.fullmatch(BLOCK + r"(\d{1,3})x(\d{1,3})", name)
        sizes = [int(size) for size in match.groups()] if match else []
        if not sizes or max(sizes) > MOST or math.prod(sizes) < 2:
            raise PolicyError(
                "cannot read the size of blocks",
                value=name,
                remedy="write the numbers of filters and of input channels, block-4x1 or block-1x2"
                f" say, at most {MOST} each and two weights at least",
            )
        return BlockSelector(name, BlockNorm(*sizes), weights_only=True)

    def first_top(self, x: Tensor, density: Density, axes: Axes) -> Tensor:
        """Whole blocks, of equal ones the first, until they have as many weights as asked."""
        found = self.score.of_blocks(x)
        sizes = self.score.sizes(x).expand_as(found).reshape(-1)
        order = found.reshape(-1).argsort(descending=True, stable=True)
        sizes = sizes[order]
        keep = torch.zeros(found.numel(), dtype=torch.bool, device=x.device)
        keep[order] = sizes.cumsum(0) - sizes < density.count(x.numel())
        return self.score.spread(keep.view(found.shape), x.shape)
