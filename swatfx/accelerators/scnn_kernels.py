"""SCNN's compiled loops: how many cycles the chunks of one channel take in each element.

Hits on the 32 accumulator banks are kept as 4-bit counters in two 64-bit words. With reduced
coordinates x' = x div stride, r' = r div stride of one phase, an output is (x' - r', y' - s'),
and its bank depends on an activation only by x' mod 2, y' mod 2, bit 1 of x' xor y' (the *flip*,
which swaps the two words), and by which r' and s' stay within the output: its *class*. The
counters of a chunk of weights are therefore tabled once a class, a chunk of activations is the sum
of four table entries, and what it costs over all weights is found once for each distinct set of
four classes (a *combination*) of a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from swatfx.accelerators.compiled import compiled
from swatfx.accelerators.geometry import Ints, Mask

Words = npt.NDArray[np.uint64]

_ONE = np.uint64(1)
_TWO = np.uint64(2)
_THREE = np.uint64(3)
_NONE = np.uint64(0)
_BIT0 = np.uint64(0x1111111111111111)
_BIT2 = np.uint64(0x4444444444444444)


class Phase(NamedTuple):
    """One stride phase of a layer on the 8 x 8 elements.

    Attributes:
        th: rows of an element's part of the padded input.
        tw: its columns.
        stride: of the layer.
        dilation: of the kernel.
        top: rows of padding above.
        left: columns of padding to the left.
        x: the phase of the rows.
        y: that of the columns.
    """

    th: int
    tw: int
    stride: int
    dilation: int
    top: int
    left: int
    x: int
    y: int


class Classes(NamedTuple):
    """What `axis_classes` says of both axes in one phase.

    Attributes:
        class_x: class of each padded row.
        values_x: of each class and tap.
        class_y: class of each padded column.
        values_y: of each class and tap.
    """

    class_x: Ints
    values_x: Ints
    class_y: Ints
    values_y: Ints


TABLE_WORDS = 1 << 16  # of the table for one block of weight chunks: fits the second-level cache


@compiled
def _sort4(c: Ints) -> None:
    for i, j in ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2)):
        if c[i] > c[j]:
            c[i], c[j] = c[j], c[i]


@compiled
def _hash(c: Ints) -> int:
    value = 0
    for i in range(4):
        value = ((value + c[i]) * 0x9E3779B1) & 0x7FFFFFFF
    return value ^ (value >> 15)


@compiled
def _same(a: Ints, b: Ints) -> bool:
    return bool(a[0] == b[0] and a[1] == b[1] and a[2] == b[2] and a[3] == b[3])


@compiled
def _combinations(
    plane: Mask,
    phase: Phase,
    classes: Classes,
    chunk_element: Ints,
    chunk_combination: Ints,
    slots: Ints,
    known: Ints,
) -> tuple[int, int]:
    """Chunks of four activations of one channel and phase, and their distinct combinations.

    Args:
        plane: activations of the channel, [H, W].
        phase: of the layer.
        classes: of its axes.
        chunk_element: out, the element of each chunk.
        chunk_combination: out, the combination of each chunk.
        slots: scratch of a hash table, a power of two long and twice the chunks at least.
        known: out, [combinations, 4] classes * 2 + flip, ascending; 0 is none.

    Returns:
        the number of chunks and that of combinations.
    """
    th, tw, stride, _, top, left, phase_x, phase_y = phase
    class_x, _, class_y, values_y = classes
    classes_y = values_y.shape[0]
    H, W = plane.shape
    chunks = 0
    distinct = 0
    mask = slots.size - 1
    slots[:] = -1
    c = np.zeros(4, dtype=np.int64)
    for ex in range(8):
        x0 = max(ex * th, top)
        x1 = min((ex + 1) * th, top + H)
        x0 += (phase_x - x0) % stride
        for ey in range(8):
            y0 = max(ey * tw, left)
            y1 = min((ey + 1) * tw, left + W)
            y0 += (phase_y - y0) % stride
            filled = 0
            for x in range(x0, x1, stride):
                for y in range(y0, y1, stride):
                    if plane[x - top, y - left]:
                        flip = (x // stride ^ y // stride) >> 1 & 1
                        c[filled] = 2 * (class_x[x] * classes_y + class_y[y] + 1) + flip
                        filled += 1
                    last = x + stride >= x1 and y + stride >= y1
                    if filled == 4 or (last and filled > 0):
                        for i in range(filled, 4):
                            c[i] = 0
                        if filled < 4:
                            flip = c[0] & 1
                        else:
                            flip = min(min(c[0], c[1]), min(c[2], c[3])) & 1
                        for i in range(filled):
                            c[i] ^= flip
                        filled = 0
                        _sort4(c)
                        at = _hash(c) & mask
                        while slots[at] >= 0 and not _same(known[slots[at]], c):
                            at = (at + 1) & mask
                        if slots[at] < 0:
                            slots[at] = distinct
                            known[distinct] = c
                            distinct += 1
                        chunk_element[chunks] = ex * 8 + ey
                        chunk_combination[chunks] = slots[at]
                        chunks += 1
    return chunks, distinct


@compiled
def _fill_table(
    table: Words,
    used: Mask,
    values_x: Ints,
    values_y: Ints,
    taps_r: Ints,
    taps_s: Ints,
    filters: Ints,
    first: int,
    count: int,
) -> None:
    """Counters of each used class for weights first .. first + count: [2 * classes + 2, chunks]."""
    classes_y = values_y.shape[0]
    for cls in range(values_x.shape[0] * classes_y):
        if not used[cls]:
            continue
        row = 2 * cls + 2
        a = cls // classes_y
        b = cls % classes_y
        for q in range((count + 3) // 4):
            low = _NONE
            high = _NONE
            for w in range(first + 4 * q, min(first + 4 * q + 4, first + count)):
                vx = values_x[a, taps_r[w]]
                vy = values_y[b, taps_s[w]]
                if vx < 0 or vy < 0:
                    continue
                k = filters[w]
                hit = _ONE << np.uint64(4 * ((vx & 1) << 3 | (vy & 1) << 2 | (k & 3)))
                if ((k >> 2) ^ (vx >> 1) ^ (vy >> 1)) & 1:
                    high += hit
                else:
                    low += hit
            table[row, q] = low
            table[row + 1, q] = high


@compiled
def _cost(table: Words, c: Ints, chunks: int) -> int:
    """Cycles of one combination over `chunks` chunks of weights: sum of max(1, most hits)."""
    a, b, d, e = c[0], c[1], c[2], c[3]
    total = 0
    for q in range(chunks):
        a0, b0, d0, e0 = table[a, q], table[b, q], table[d, q], table[e, q]
        a1, b1, d1, e1 = table[a ^ 1, q], table[b ^ 1, q], table[d ^ 1, q], table[e ^ 1, q]
        low = a0 + b0 + d0 + e0
        high = a1 + b1 + d1 + e1
        # 16 hits on one bank, the only sum that a 4-bit counter cannot hold
        all16 = ((a0 & b0 & d0 & e0) | (a1 & b1 & d1 & e1)) & _BIT2
        keep_low = _BIT0
        keep_high = _BIT0
        most = 0
        t_low = (low >> _THREE) & keep_low
        t_high = (high >> _THREE) & keep_high
        if (t_low | t_high) != _NONE:
            keep_low, keep_high, most = t_low, t_high, most + 8
        t_low = (low >> _TWO) & keep_low
        t_high = (high >> _TWO) & keep_high
        if (t_low | t_high) != _NONE:
            keep_low, keep_high, most = t_low, t_high, most + 4
        t_low = (low >> _ONE) & keep_low
        t_high = (high >> _ONE) & keep_high
        if (t_low | t_high) != _NONE:
            keep_low, keep_high, most = t_low, t_high, most + 2
        if ((low & keep_low) | (high & keep_high)) != _NONE:
            most += 1
        if all16 != _NONE:
            most = 16
        total += max(1, most)
    return total


@compiled
def _combination_costs(
    table: Words,
    values_x: Ints,
    values_y: Ints,
    taps_r: Ints,
    taps_s: Ints,
    filters: Ints,
    weights: int,
    known: Ints,
    distinct: int,
    costs: Ints,
) -> None:
    """Cycles of every combination over all `weights` (r, s, filter), with bank conflicts.

    The weights are taken in blocks that let the table stay in cache.
    """
    used = np.zeros(values_x.shape[0] * values_y.shape[0], dtype=np.bool_)
    for i in range(distinct):
        costs[i] = 0
        for j in range(4):
            if known[i, j] > 1:
                used[(known[i, j] >> 1) - 1] = True
    block = 4 * table.shape[1]
    for first in range(0, weights, block):
        count = min(block, weights - first)
        _fill_table(table, used, values_x, values_y, taps_r, taps_s, filters, first, count)
        for i in range(distinct):
            costs[i] += _cost(table, known[i], (count + 3) // 4)


@compiled
def add_phase(
    weights: Mask,
    activations: Mask,
    Kc: int,
    phase: Phase,
    classes: Classes,
    conflicts: bool,
    spent: Ints,
    free: Ints,
) -> None:
    """Add what one stride phase costs every element, channel and group of filters.

    Args:
        weights: [C, R, S, K].
        activations: [C, H, W].
        Kc: filters of a group.
        phase: of the layer.
        classes: of its axes.
        conflicts: whether hits on one bank wait for each other.
        spent: cycles, added to, [C, groups, 64].
        free: cycles without conflicts, added to, [C, groups, 64].
    """
    values_x, values_y = classes.values_x, classes.values_y
    stride, dilation = phase.stride, phase.dilation
    C, R, S, K = weights.shape
    H, W = activations.shape[1:]
    longest = R * S * min(Kc, K)
    taps_r = np.empty(longest, dtype=np.int64)
    taps_s = np.empty(longest, dtype=np.int64)
    filters = np.empty(longest, dtype=np.int64)
    most_chunks = min(H * W, (H * W + 3) // 4 + 64)
    chunk_element = np.empty(most_chunks, dtype=np.int64)
    chunk_combination = np.empty(most_chunks, dtype=np.int64)
    known = np.zeros((most_chunks, 4), dtype=np.int64)
    costs = np.empty(most_chunks, dtype=np.int64)
    size = 64
    while size < 2 * most_chunks:
        size *= 2
    slots = np.empty(size, dtype=np.int64)
    entries = 2 * values_x.shape[0] * values_y.shape[0] + 2
    width = max(1, min((longest + 3) // 4, TABLE_WORDS // entries))
    table = np.zeros((entries, width), dtype=np.uint64)
    for c in range(C):
        chunks, distinct = _combinations(
            activations[c], phase, classes, chunk_element, chunk_combination, slots, known
        )
        if chunks == 0:
            continue
        for group in range(spent.shape[1]):
            n = 0
            for r in range(R):
                if r * dilation % stride != phase.x:
                    continue
                for s in range(S):
                    if s * dilation % stride != phase.y:
                        continue
                    for k in range(group * Kc, min((group + 1) * Kc, K)):
                        if weights[c, r, s, k]:
                            taps_r[n] = r
                            taps_s[n] = s
                            filters[n] = k
                            n += 1
            if n == 0:
                continue
            each = (n + 3) // 4
            if conflicts:
                _combination_costs(
                    table, values_x, values_y, taps_r, taps_s, filters, n, known, distinct, costs
                )
            else:
                costs[:distinct] = each
            for i in range(chunks):
                spent[c, group, chunk_element[i]] += costs[chunk_combination[i]]
                free[c, group, chunk_element[i]] += each
