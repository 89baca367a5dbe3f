"""SCNN (Parashar et al., ISCA 2017): both operands compressed, outer products, 8 x 8 elements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import numpy as np

from swatfx.accelerators.base import Accelerator, Count
from swatfx.accelerators.compiled import compiled
from swatfx.accelerators.geometry import Ints, Mask, Problem, ceil_div
from swatfx.accelerators.inputs import integer
from swatfx.accelerators.scnn_gradient import Outer, gradient_channel
from swatfx.accelerators.scnn_kernels import Classes, Phase, add_phase
from swatfx.errors import InputError

SIDE = 8  # elements along each axis
CHUNK = 4  # I and F: activations and weights that meet in one cycle


@compiled
def axis_classes(
    positions: int, taps: int, output: int, stride: int, dilation: int, phase: int
) -> tuple[Ints, Ints]:
    """Classes of one axis in one phase.

    Args:
        positions: padded length of the axis.
        taps: of the kernel.
        output: length of the output.
        stride: of the layer.
        dilation: of the kernel.
        phase: position mod stride.

    Returns:
        the class of each position ([positions], -1 in another phase), and for each class and tap
        a value ([classes, taps]): -1 where the product falls outside the output or the tap is in
        another phase, else bit 0 and bit 1 of the output coordinate, that bit 1 without the
        position's own bit 1, which is the position's flip.
    """
    of = np.full(positions, -1, dtype=np.int64)
    table = np.full((positions, taps), -1, dtype=np.int64)
    row = np.empty(taps, dtype=np.int64)
    found = 0
    for x in range(phase, positions, stride):
        reduced = x // stride
        for r in range(taps):
            row[r] = -1
            if (r * dilation) % stride == phase:
                out = reduced - (r * dilation) // stride
                if out >= 0 and out < output:
                    row[r] = (out & 3) ^ (reduced & 2)
        for j in range(found):
            same = True
            for r in range(taps):
                same = same and table[j, r] == row[r]
            if same:
                of[x] = j
                break
        if of[x] < 0:
            table[found] = row
            of[x] = found
            found += 1
    return of, table[:found]


def halo_area(problem: Problem, rows: int, cols: int, padding: tuple[int, int]) -> int:
    """Partial sums of one filter that the largest of eight neighbours takes.

    Args:
        problem: gives the kernel's extent.
        rows: of an element's part of the input.
        cols: its columns.
        padding: the larger of each axis' two sides.
    """
    xs = (problem.extent[0] - 1 - padding[0], rows, padding[0])
    ys = (problem.extent[1] - 1 - padding[1], cols, padding[1])
    return max(xs[i] * ys[j] for i in range(3) for j in range(3) if (i, j) != (1, 1))


@dataclass(frozen=True)
class SCNN(Accelerator):
    """8 x 8 elements of 4 x 4 multipliers with 32 accumulator banks, at the published size.

    The padded input is split over the elements, weights are broadcast channel by channel, and every
    chunk of 4 activations meets every chunk of 4 weights of its stride phase, in as many cycles as
    the fullest bank takes. Padding that differs by side enters the halo with the larger of an
    axis' two sides. Dilated kernels hold zeros between the taps, which are not stored.

    Weight gradient: channel by channel a convolution of the activation with the dense, dilated
    output gradient as its kernel, and R x S outputs for each filter. Most products of an outer
    product then fall outside the output and their slots are lost, which makes the design unfit for
    it: expect hundreds of times the dense tile's cycles.

    `limits`: "bank conflicts", "halo", and "load imbalance", cycles that the slowest element of a
    channel takes beyond the mean one.

    Args:
        conflicts: False: a bank takes any number of hits a cycle.
        accumulators: an element's, 6,144.
    """

    compresses: ClassVar[tuple[str, ...]] = ("weights", "activations")

    conflicts: bool = True
    accumulators: int = 6144

    def __post_init__(self) -> None:
        integer(self.accumulators, "accumulators")

    @property
    def multipliers(self) -> int:
        """Of all elements."""
        return SIDE * SIDE * CHUNK * CHUNK

    def filters_at_once(self, out_rows: int, out_cols: int) -> int:
        """Kc: how many filters' outputs an element holds."""
        held = ceil_div(out_rows, SIDE) * ceil_div(out_cols, SIDE)
        if held > self.accumulators:
            raise InputError(
                f"one filter's {out_rows} x {out_cols} output takes {held} accumulators an element",
                value=self.accumulators,
                remedy="Use a smaller input, or SCNN(accumulators=...)",
            )
        return self.accumulators // held

    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """Section 3 of the paper, exactly."""
        return self._run(problem, np.ascontiguousarray(weights.transpose(1, 2, 3, 0)), activations)

    def run_dense(self, problem: Problem) -> int:
        """All channels are alike: one of them tells."""
        one = replace(problem, C=1)
        halo = self._halo(one, problem.K)
        count = self.run(one, one.dense_weights(), one.dense_activations())
        return (count.cycles - halo) * problem.C + halo

    def run_weight_gradient(self, problem: Problem, activations: Mask) -> Count:
        """Every channel by itself; the kernel is the dense output gradient of each filter."""
        p = problem
        Kc = self.filters_at_once(p.R, p.S)
        rows, cols = (ceil_div(n, SIDE) * SIDE for n in p.padded)
        part = rows // SIDE, cols // SIDE, p.padding[0], p.padding[2]
        cycles = without = mean = 0
        for first in range(0, p.K, Kc):
            outer = Outer(min(Kc, p.K - first), p.R, p.S, p.OX, p.OY, p.stride, p.dilation)
            spent = gradient_channel(activations, outer, *part, self.conflicts)
            cycles += int(spent[0])
            without += int(spent[1])
            mean += int(spent[2])
        halo = p.C * self._gradient_halo(p)
        return Count(cycles + halo, _limits(cycles, without, mean, halo))

    def run_weight_gradient_dense(self, problem: Problem) -> int:
        """All channels are alike."""
        one = replace(problem, C=1)
        return self.run_weight_gradient(one, one.dense_activations()).cycles * problem.C

    def run_full_slots(self, problem: Problem) -> int:
        """A dense run that waits for no bank and takes every position of the padded input.

        Zeros of the padding, of a dilated gradient and of the extension to a multiple of 8 fill
        slots like any value: what an input gradient costs where nothing knows of its zeros.
        """
        p = problem
        Kc = self.filters_at_once(p.OX, p.OY)
        x_counts, y_counts = (_phase_counts(n, p.stride) for n in p.padded)
        taps = _tap_counts(p.R, p), _tap_counts(p.S, p)
        cycles = 0
        for first in range(0, p.K, Kc):
            many = min(Kc, p.K - first)
            cycles += p.C * max(
                sum(
                    ceil_div(xs[a] * ys[b], CHUNK) * ceil_div(taps[0][a] * taps[1][b] * many, CHUNK)
                    for a in range(p.stride)
                    for b in range(p.stride)
                )
                for xs in x_counts
                for ys in y_counts
            )
        return cycles + self._halo(p, p.K)

    def run_weight_gradient_full_slots(self, problem: Problem) -> int:
        """Every position of the padded activation meets every output gradient, conflict-free."""
        p = problem
        Kc = self.filters_at_once(p.R, p.S)
        rows, cols = (ceil_div(n, SIDE) for n in p.padded)
        groups = [min(Kc, p.K - first) for first in range(0, p.K, Kc)]
        chunks = sum(ceil_div(p.windows * many, CHUNK) for many in groups)
        return p.C * (ceil_div(rows * cols, CHUNK) * chunks + self._gradient_halo(p))

    def _gradient_halo(self, problem: Problem) -> int:
        """Halos of one channel's weight gradient, with the dilated output gradient as kernel."""
        p = problem
        kernel = replace(p, R=(p.OX - 1) * p.stride + 1, S=(p.OY - 1) * p.stride + 1, dilation=1)
        return self._halo(kernel, p.K)

    def _run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        p = problem
        Kc = self.filters_at_once(p.OX, p.OY)
        rows, cols = (ceil_div(n, SIDE) * SIDE for n in p.padded)
        spent = np.zeros((p.C, ceil_div(p.K, Kc), SIDE * SIDE), dtype=np.int64)
        free = np.zeros_like(spent)
        part = rows // SIDE, cols // SIDE
        shape = (p.stride, p.dilation, p.padding[0], p.padding[2])
        for a, b in product(range(p.stride), range(p.stride)):
            xs = axis_classes(rows, p.R, p.OX, p.stride, p.dilation, a)
            ys = axis_classes(cols, p.S, p.OY, p.stride, p.dilation, b)
            if len(xs[1]) and len(ys[1]) and _tap_counts(p.R, p)[a] and _tap_counts(p.S, p)[b]:
                phase, classes = Phase(*part, *shape, a, b), Classes(*xs, *ys)
                add_phase(weights, activations, Kc, phase, classes, self.conflicts, spent, free)
        cycles, without = int(spent.max(axis=2).sum()), int(free.max(axis=2).sum())
        mean = int(np.ceil(spent.mean(axis=2)).sum())
        halo = self._halo(p, p.K)
        return Count(cycles + halo, _limits(cycles, without, mean, halo))

    def _halo(self, problem: Problem, filters: int) -> int:
        """Halos of all groups of filters: their sizes add up to `filters`."""
        p = problem
        rows, cols = (ceil_div(n, SIDE) for n in p.padded)
        top, bottom, left, right = p.padding
        return filters * halo_area(p, rows, cols, (max(top, bottom), max(left, right)))


def _phase_counts(positions: int, stride: int) -> list[list[int]]:
    """How many positions of each phase the eight parts of one axis have."""
    part = ceil_div(positions, SIDE)
    return [
        [len(range((a - e * part) % stride, part, stride)) for a in range(stride)]
        for e in range(SIDE)
    ]


def _tap_counts(taps: int, problem: Problem) -> list[int]:
    """How many taps of one axis each phase has."""
    phases = [tap * problem.dilation % problem.stride for tap in range(taps)]
    return [phases.count(phase) for phase in range(problem.stride)]


def _limits(cycles: int, without: int, mean: int, halo: int) -> dict[str, int]:
    return {"bank conflicts": cycles - without, "load imbalance": cycles - mean, "halo": halo}
