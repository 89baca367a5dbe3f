"""The geometry of one layer as the cycle models see it, and what can be counted from it alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from swatfx.accelerators.compiled import compiled

Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def ceil_div(a: int, b: int) -> int:
    """A / b rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Problem:
    """A convolution without groups; a linear layer is 1x1.

    Attributes:
        K: filters.
        C: channels.
        R: kernel size along H.
        S: kernel size along W.
        H: rows of the input, without padding.
        W: columns of the input, without padding.
        stride: of both axes.
        padding: zeros on the top, bottom, left and right.
        dilation: distance between kernel taps, of both axes.
        spread: distance between input elements that can be nonzero: the forward stride in an
            input gradient, else 1.
        crop: rows and columns cut off the top and left of an input that is spread.
    """

    K: int
    C: int
    R: int
    S: int
    H: int
    W: int
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: int = 1
    spread: int = 1
    crop: tuple[int, int] = (0, 0)

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns that the kernel spans."""
        return self.dilation * (self.R - 1) + 1, self.dilation * (self.S - 1) + 1

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the padded input."""
        top, bottom, left, right = self.padding
        return self.H + top + bottom, self.W + left + right

    @property
    def OX(self) -> int:
        """Rows of the output."""
        return (self.padded[0] - self.extent[0]) // self.stride + 1

    @property
    def OY(self) -> int:
        """Columns of the output."""
        return (self.padded[1] - self.extent[1]) // self.stride + 1

    @property
    def windows(self) -> int:
        """Pixels of the output."""
        return self.OX * self.OY

    @property
    def taps(self) -> int:
        """Weights of one filter."""
        return self.C * self.R * self.S

    @property
    def dense_multiplications(self) -> int:
        """Multiplications of the dense layer, those with padding among them."""
        return self.K * self.taps * self.windows

    def support(self) -> Mask:
        """Where the input can be nonzero, [H, W]."""
        mask = np.zeros((self.H, self.W), dtype=np.bool_)
        first = [-cut % self.spread for cut in self.crop]
        mask[first[0] :: self.spread, first[1] :: self.spread] = True
        return mask

    def dense_activations(self) -> Mask:
        """The densest input there is, [C, H, W]."""
        return np.repeat(self.support()[None], self.C, axis=0)

    def dense_weights(self) -> Mask:
        """All weights, [K, C, R, S]."""
        return np.ones((self.K, self.C, self.R, self.S), dtype=np.bool_)

    @property
    def is_folded(self) -> bool:
        """Whether the dense tile folds this layer space-to-depth first."""
        return self.C == 3 and self.stride > 1

    def folded(self) -> Problem:
        """The layer as the dense tile runs it: strided and 3 channels become 3 * stride**2.

        Only K, C, R, S and the output size of the result mean anything.
        """
        if not self.is_folded:
            return self
        rows, cols = (ceil_div(extent, self.stride) for extent in self.extent)
        return replace(
            self,
            C=3 * self.stride**2,
            R=rows,
            S=cols,
            H=self.OX + rows - 1,
            W=self.OY + cols - 1,
            stride=1,
            padding=(0, 0, 0, 0),
            dilation=1,
        )


def input_gradient_problem(forward: Problem) -> Problem:
    """The stride-1 convolution that gives `forward`'s input gradient.

    Where the forward padding exceeds the kernel's reach, the dilated gradient is cropped.
    """
    p = forward
    rows = _turned_axis(p.H, p.OX, p.extent[0], p.stride, p.padding[0])
    cols = _turned_axis(p.W, p.OY, p.extent[1], p.stride, p.padding[2])
    return Problem(
        K=p.C,
        C=p.K,
        R=p.R,
        S=p.S,
        H=rows[0],
        W=cols[0],
        padding=(rows[1], rows[2], cols[1], cols[2]),
        dilation=p.dilation,
        spread=p.stride,
        crop=(rows[3], cols[3]),
    )


def _turned_axis(
    size: int, output: int, extent: int, stride: int, before: int
) -> tuple[int, int, int, int]:
    """One axis of an input gradient: gradient's length, padding before and after it, crop."""
    length = (output - 1) * stride + 1
    crop = min(length, max(0, before - (extent - 1)))
    beyond = max(0, length - (size + before))
    length = max(1, length - crop - beyond)
    pad = max(0, extent - 1 - before)
    return length, pad, size + extent - 1 - pad - length, crop


def fold_weights(problem: Problem, weights: Mask) -> Mask:
    """`weights` [K, C, R, S] of `problem` in the layout of `problem.folded()`."""
    if not problem.is_folded:
        return weights
    target = problem.folded()
    stride = problem.stride
    out = np.zeros((target.K, target.C, target.R, target.S), dtype=np.bool_)
    for r in range(problem.R):
        for s in range(problem.S):
            x, y = r * problem.dilation, s * problem.dilation
            first = (y % stride) * stride * 3 + (x % stride) * 3
            out[:, first : first + 3, x // stride, y // stride] = weights[:, :, r, s]
    return out


@compiled
def _filters_per_tap(weights: Mask) -> Ints:
    """Nonzero weights of each (channel, r, s) over all filters: [K, taps] -> [taps]."""
    filters, taps = weights.shape
    counts = np.zeros(taps, dtype=np.int64)
    for k in range(filters):
        for i in range(taps):
            counts[i] += weights[k, i]
    return counts


@compiled
def _meetings(
    activations: Mask,
    R: int,
    S: int,
    OX: int,
    OY: int,
    stride: int,
    dilation: int,
    top: int,
    left: int,
) -> Ints:
    """Nonzeros that each (channel, r, s) meets over all windows: [C, H, W] -> [C * R * S]."""
    C, H, W = activations.shape
    counts = np.zeros(C * R * S, dtype=np.int64)
    for c in range(C):
        for r in range(R):
            for s in range(S):
                total = 0
                for ox in range(OX):
                    x = ox * stride + r * dilation - top
                    if x < 0 or x >= H:
                        continue
                    first = s * dilation - left
                    for oy in range(OY):
                        y = first + oy * stride
                        if y >= 0 and y < W:
                            total += activations[c, x, y]
                counts[(c * R + r) * S + s] = total
    return counts


def count_multiplications(problem: Problem, weights: Mask | None, activations: Mask | None) -> int:
    """Products of nonzero pairs that reach the output.

    Args:
        problem: the geometry.
        weights: [K, C, R, S]; None: all of them.
        activations: [C, H, W]; None: `problem.support()` in every channel.
    """
    p = problem
    seen = p.support()[None] if activations is None else activations
    met = _meetings(seen, p.R, p.S, p.OX, p.OY, p.stride, p.dilation, p.padding[0], p.padding[2])
    if activations is None:
        met = np.tile(met, p.C)
    if weights is None:
        return p.K * int(met.sum())
    return int(_filters_per_tap(weights.reshape(p.K, p.taps)) @ met)


LANES = ROWS = TILES = 16


def tile_cycles(problem: Problem, columns: int = 1) -> int:
    """Cycles of the dense tile (DaDianNao): 16 lanes, 16 rows, 16 tiles, `columns` windows."""
    p = problem.folded()
    passes = ceil_div(p.K, ROWS * TILES) * ceil_div(p.C, LANES) * p.R * p.S
    return ceil_div(problem.windows, columns) * passes


def tile_weight_gradient_cycles(problem: Problem, columns: int = 1) -> int:
    """The dense tile on the weight gradient: lanes take pixels, rows channels, tiles filters.

    ceil(P / 16) * ceil(C / 16) * ceil(R * S / columns) * ceil(K / 16): the tap takes the place of
    the window.
    """
    p = problem
    steps = ceil_div(p.windows, LANES) * ceil_div(p.C, ROWS) * ceil_div(p.K, TILES)
    return steps * ceil_div(p.R * p.S, columns)
