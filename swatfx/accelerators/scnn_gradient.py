"""SCNN's weight gradient, compiled: outer products of activations with a dense output gradient."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from swatfx.accelerators.compiled import compiled
from swatfx.accelerators.geometry import Ints, Mask


class Outer(NamedTuple):
    """The products of a weight gradient.

    Attributes:
        filters: of the group.
        R: rows of the weight gradient.
        S: its columns.
        OX: rows of the output gradient.
        OY: its columns.
        stride: of the forward layer.
        dilation: of the forward layer.
    """

    filters: int
    R: int
    S: int
    OX: int
    OY: int
    stride: int
    dilation: int


@compiled
def _hits(xs: Ints, ys: Ints, filled: int, first: int, last: int, outer: Outer, banks: Ints) -> int:
    """Most hits on one bank of a chunk: activations (xs, ys) times gradients first .. last - 1."""
    filters, R, S, _, OY, stride, dilation = outer
    banks[:] = 0
    most = 0
    for n in range(first, last):
        pixel = n // filters
        k = n % filters
        gx = pixel // OY * stride
        gy = pixel % OY * stride
        for i in range(filled):
            dx = xs[i] - gx
            dy = ys[i] - gy
            if dx < 0 or dy < 0 or dx % dilation or dy % dilation:
                continue
            r = dx // dilation
            s = dy // dilation
            if r >= R or s >= S:
                continue
            bank = (((k & 4) << 2) ^ ((r & 2) << 3) ^ ((s & 2) << 3)) + ((r & 1) << 3)
            bank = (bank + ((s & 1) << 2) + (k & 3)) % 32
            banks[bank] += 1
            most = max(most, banks[bank])
    return most


@compiled
def _conflicts(xs: Ints, ys: Ints, filled: int, outer: Outer, banks: Ints) -> int:
    """Cycles that one chunk of activations loses to conflicts over all gradients.

    Gradients are numbered pixel by pixel, filter innermost. Only pixels whose taps can meet one
    of the activations are looked at. Chunks of four within a pixel have four filters that differ
    mod 4, and so cost the same, whichever they are.
    """
    filters, R, S, OX, OY, stride, dilation = outer
    reach_x = (R - 1) * dilation
    reach_y = (S - 1) * dilation
    low_x, high_x, low_y, high_y = xs[0], xs[0], ys[0], ys[0]
    for i in range(1, filled):
        low_x = min(low_x, xs[i])
        high_x = max(high_x, xs[i])
        low_y = min(low_y, ys[i])
        high_y = max(high_y, ys[i])
    number = OX * OY * filters
    done = -1
    lost = 0
    for ox in range(max(0, -((reach_x - low_x) // stride)), min(OX, high_x // stride + 1)):
        for oy in range(max(0, -((reach_y - low_y) // stride)), min(OY, high_y // stride + 1)):
            begin = (ox * OY + oy) * filters
            end = begin + filters
            whole = end // 4 - (begin + 3) // 4
            if whole > 0:
                at = (begin + 3) // 4 * 4
                most = _hits(xs, ys, filled, at, at + 4, outer, banks)
                lost += whole * max(0, most - 1)
            for edge in (begin, end):
                chunk = edge // 4
                if edge % 4 and chunk > done:
                    done = chunk
                    last = min(4 * chunk + 4, number)
                    most = _hits(xs, ys, filled, 4 * chunk, last, outer, banks)
                    lost += max(0, most - 1)
    return lost


@compiled
def gradient_channel(
    activations: Mask, outer: Outer, th: int, tw: int, top: int, left: int, conflicts: bool
) -> tuple[int, int, int]:
    """Sum over channels of the slowest element for one group of filters, without halos.

    Args:
        activations: [C, H, W].
        outer: the products.
        th: rows of an element's part of the padded input.
        tw: its columns.
        top: padding.
        left: padding.
        conflicts: whether hits on one bank wait for each other.

    Returns:
        cycles; the same without conflicts; the mean element's, rounded up by channel.
    """
    C, H, W = activations.shape
    slots = (outer.OX * outer.OY * outer.filters + 3) // 4
    xs = np.empty(4, dtype=np.int64)
    ys = np.empty(4, dtype=np.int64)
    banks = np.zeros(32, dtype=np.int64)
    cycles = 0
    without = 0
    mean = 0
    for c in range(C):
        slowest = 0
        slowest_free = 0
        work = 0
        for ex in range(8):
            x0 = max(ex * th, top)
            x1 = min((ex + 1) * th, top + H)
            for ey in range(8):
                y0 = max(ey * tw, left)
                y1 = min((ey + 1) * tw, left + W)
                chunks = 0
                lost = 0
                filled = 0
                for x in range(x0, x1):
                    for y in range(y0, y1):
                        if activations[c, x - top, y - left]:
                            xs[filled] = x
                            ys[filled] = y
                            filled += 1
                        if filled == 4 or (filled > 0 and x == x1 - 1 and y == y1 - 1):
                            chunks += 1
                            if conflicts:
                                lost += _conflicts(xs, ys, filled, outer, banks)
                            filled = 0
                slowest = max(slowest, chunks * slots + lost)
                slowest_free = max(slowest_free, chunks * slots)
                work += chunks * slots + lost
        cycles += slowest
        without += slowest_free
        mean += (work + 63) // 64
    return cycles, without, mean
