"""What every cycle model shares: the calls, the result, the lowering of groups and of backward.

A design fills in `multipliers` and `run`, and whatever else it knows better than the defaults here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from swatfx.accelerators import inputs
from swatfx.accelerators.cache import cached, digest
from swatfx.accelerators.geometry import (
    Mask,
    Problem,
    ceil_div,
    count_multiplications,
    input_gradient_problem,
    tile_cycles,
    tile_weight_gradient_cycles,
)
from swatfx.errors import InputError

CANNOT_SKIP = "dense: this design cannot skip here"


@dataclass(frozen=True)
class Count:
    """What one run of a design costs.

    Attributes:
        cycles: of the run.
        limits: cycles lost to named causes, each taken by itself: they may overlap.
        note: one sentence for the report, or nothing.
    """

    cycles: int
    limits: Mapping[str, int] = field(default_factory=dict, hash=False)
    note: str = ""


@dataclass(frozen=True)
class Cycles:
    """Simulated cycles of one layer in one pass, for one sample; never measured time.

    Attributes:
        cycles: with the given masks.
        dense_cycles: of the dense tile (DaDianNao) on the same problem, all multiplications done.
        own_dense_cycles: of the same design on all-ones masks.
        multiplications: products of two nonzeros that reach the output.
        multipliers: that the design has.
        full_slot_cycles: of a dense run that loses no cycle to its masks: by default all
            multiplications over the multipliers, rounded up, those with zeros of the padding and
            of a dilated gradient among them; SCNN has its own, in whole chunks, without conflicts.
        limits: cycles lost to named causes, each taken by itself: they may overlap.
        note: what the design could not do here, if anything.
    """

    cycles: int
    dense_cycles: int
    own_dense_cycles: int
    multiplications: int
    multipliers: int
    full_slot_cycles: int
    limits: Mapping[str, int] = field(default_factory=dict, hash=False)
    note: str = ""

    @property
    def utilisation(self) -> float:
        """Multiplications / (cycles * multipliers); 0 where nothing ran."""
        return self.multiplications / (self.cycles * self.multipliers) if self.cycles else 0.0

    @property
    def speedup(self) -> float:
        """Over the dense tile, whose multipliers may be more or fewer than this design's."""
        return _over(self.dense_cycles, self.cycles)

    @property
    def own_speedup(self) -> float:
        """Over the same design on all-ones masks."""
        return _over(self.own_dense_cycles, self.cycles)

    @property
    def full_slot_speedup(self) -> float:
        """Over a dense run of this design with every slot full."""
        return _over(self.full_slot_cycles, self.cycles)

    def __add__(self, other: Cycles) -> Cycles:
        """One after the other on the same design."""
        if self.multipliers != other.multipliers:
            raise InputError(
                "cycles of different designs do not add",
                value=(self.multipliers, other.multipliers),
                remedy="Add the layers of one design",
            )
        limits = dict(self.limits)
        for cause, lost in other.limits.items():
            limits[cause] = limits.get(cause, 0) + lost
        notes = dict.fromkeys(note for note in (self.note, other.note) if note)
        return Cycles(
            self.cycles + other.cycles,
            self.dense_cycles + other.dense_cycles,
            self.own_dense_cycles + other.own_dense_cycles,
            self.multiplications + other.multiplications,
            self.multipliers,
            self.full_slot_cycles + other.full_slot_cycles,
            limits,
            "; ".join(notes),
        )


def _over(base: int, cycles: int) -> float:
    if cycles:
        return base / cycles
    return float("inf") if base else 1.0


def total(runs: Iterable[Cycles]) -> Cycles:
    """The sum of `runs`, of which there must be one at least."""
    first, *rest = runs
    for run in rest:
        first = first + run
    return first


@dataclass(frozen=True)
class Accelerator(ABC):
    """A design; a frozen dataclass whose fields are its parameters.

    Masks are bool: weights [K, C, R, S] ([K, C] for a linear layer), activations [C, H, W], H along
    R, one sample. Padding is an int or (top, bottom, left, right).

    Groups are lowered to one problem a group, run one after the other: no design here runs two at
    once, so depthwise layers fill them badly, as they do in silicon. Dilation changes which
    activation a tap meets, and so the output's size, and costs no cycle of itself: designs that
    step through the taps never see the gaps, those that compress weights (SCNN, Ideal) see a
    kernel with zeros between the taps, which they do not store.
    """

    # Which operands move compressed: "weights", "activations", both or neither (`traffic`).
    compresses: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def multipliers(self) -> int:
        """How many products a cycle has room for."""

    @abstractmethod
    def run(self, problem: Problem, weights: Mask, activations: Mask) -> Count:
        """Cost of `problem` with nonzeros where `weights` [K, C, R, S], `activations` [C, H, W]."""

    def run_dense(self, problem: Problem) -> int:
        """Cycles of `problem` on all-ones masks."""
        return self.run(problem, problem.dense_weights(), problem.dense_activations()).cycles

    def run_weight_gradient(self, problem: Problem, activations: Mask) -> Count:
        """Cost of the weight gradient of `problem`, a forward layer; output gradients are dense.

        By default that of the dense tile, or of this design with every slot full if it is smaller.
        """
        cycles = max(
            tile_weight_gradient_cycles(problem, self.tile_columns),
            ceil_div(problem.dense_multiplications, self.multipliers),
        )
        return Count(cycles, note=CANNOT_SKIP)

    def run_weight_gradient_dense(self, problem: Problem) -> int:
        """Cycles of the weight gradient of `problem` with all activations nonzero."""
        return self.run_weight_gradient(problem, problem.dense_activations()).cycles

    def run_full_slots(self, problem: Problem) -> int:
        """Cycles of `problem` with every slot full."""
        return ceil_div(problem.dense_multiplications, self.multipliers)

    def run_weight_gradient_full_slots(self, problem: Problem) -> int:
        """Cycles of the weight gradient of `problem` with every slot full."""
        return ceil_div(problem.dense_multiplications, self.multipliers)

    @property
    def tile_columns(self) -> int:
        """Windows at once of the dense tile that `dense_cycles` compares with."""
        return 1

    def conv_cycles(
        self,
        weight_mask: Any,
        activation_mask: Any = None,
        *,
        input_hw: tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
        groups: int = 1,
        dilation: int = 1,
    ) -> Cycles:
        """Cycles of a layer's forward pass for one sample.

        Args:
            weight_mask: [K, C / groups, R, S], or [K, C] for a linear layer (input_hw (1, 1)).
            activation_mask: [C, H, W]; None: dense.
            input_hw: H and W.
            stride: of both axes.
            padding: an int, or (top, bottom, left, right).
            groups: run one after the other.
            dilation: of both axes.
        """
        weights, one, groups = self._forward(
            weight_mask, input_hw, stride, padding, groups, dilation
        )
        shape = (one.C * groups, one.H, one.W)
        activations = inputs.planes_of(activation_mask, "activation mask", shape)
        return self._simulate("forward", one, groups, weights, activations)

    def backward_input(
        self,
        weight_mask: Any,
        gradient_mask: Any = None,
        *,
        input_hw: tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
        groups: int = 1,
        dilation: int = 1,
    ) -> Cycles:
        """Cycles of a layer's input gradient, as a stride-1 convolution.

        The output gradient is dilated by the stride, the kernel rotated by 180 degrees and
        transposed to [C, K, R, S]; padding is R - 1 - p, with more at the bottom and right where
        the strided forward left a remainder, so that the output is H x W. All three baselines are
        of this problem, which for a stride of 2 is four times the forward one: zeros of the
        dilation count as slots of the dense tile and of `full_slot_cycles`.

        Args:
            weight_mask: the forward layer's, [K, C / groups, R, S].
            gradient_mask: of the output gradient, [K, OX, OY]; None: dense, but for the zeros
                that the dilation puts in, which are zeros to every design (also in
                `own_dense_cycles`).
            input_hw: H and W of the forward layer's input.
            stride: the forward layer's.
            padding: the forward layer's.
            groups: the forward layer's.
            dilation: the forward layer's.
        """
        weights, one, groups = self._forward(
            weight_mask, input_hw, stride, padding, groups, dilation
        )
        shape = (one.K * groups, one.OX, one.OY)
        gradients = inputs.planes_of(gradient_mask, "gradient mask", shape)
        back = input_gradient_problem(one)
        turned = weights.reshape(groups, one.K, one.C, one.R, one.S)[..., ::-1, ::-1]
        turned = turned.swapaxes(1, 2).reshape(groups * back.K, back.C, back.R, back.S)
        spread = None
        if gradients is not None:
            spread = np.zeros((back.C * groups, back.H, back.W), dtype=np.bool_)
            step, (rows, cols) = back.spread, back.crop
            seen = gradients[:, ceil_div(rows, step) :, ceil_div(cols, step) :]
            place = spread[:, -rows % step :: step, -cols % step :: step]
            place[...] = seen[:, : place.shape[1], : place.shape[2]]
        return self._simulate("input gradient", back, groups, np.ascontiguousarray(turned), spread)

    def backward_weight(
        self,
        activation_mask: Any = None,
        *,
        filters: int,
        kernel: int | tuple[int, int],
        input_hw: tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
        groups: int = 1,
        dilation: int = 1,
        channels: int | None = None,
    ) -> Cycles:
        """Cycles of a layer's weight gradient, the saved activation being the sparse operand.

        The output gradient is dense, and the gradient of every weight is wanted, active or not.

        Args:
            activation_mask: what the forward pass saved, [C, H, W]; None: dense.
            filters: K of the forward layer.
            kernel: R and S.
            input_hw: H and W.
            stride: the forward layer's.
            padding: the forward layer's.
            groups: the forward layer's.
            dilation: the forward layer's.
            channels: C, wanted where there is no activation mask.
        """
        rows, cols = inputs.pair(input_hw, "input_hw")
        if activation_mask is None and channels is None:
            raise InputError(
                "neither an activation mask nor channels", remedy="Pass channels= for a dense run"
            )
        count = len(activation_mask) if channels is None else inputs.integer(channels, "channels")
        activations = inputs.planes_of(activation_mask, "activation mask", (count, rows, cols))
        R, S = inputs.pair(kernel, "kernel")
        groups = inputs.integer(groups, "groups")
        one = inputs.fitting(
            Problem(
                inputs.split(inputs.integer(filters, "filters"), groups, "filters"),
                inputs.split(count, groups, "channels"),
                R,
                S,
                rows,
                cols,
                inputs.one_for_both(stride, "stride"),
                inputs.sides(padding),
                inputs.one_for_both(dilation, "dilation"),
            )
        )
        return self._simulate("weight gradient", one, groups, None, activations)

    def _forward(
        self,
        weight_mask: Any,
        input_hw: Any,
        stride: Any,
        padding: Any,
        groups: Any,
        dilation: Any,
    ) -> tuple[Mask, Problem, int]:
        weights = inputs.weight_mask_of(weight_mask)
        groups = inputs.integer(groups, "groups")
        filters, channels, R, S = weights.shape
        rows, cols = inputs.pair(input_hw, "input_hw")
        problem = Problem(
            inputs.split(filters, groups, "filters"),
            channels,
            R,
            S,
            rows,
            cols,
            inputs.one_for_both(stride, "stride"),
            inputs.sides(padding),
            inputs.one_for_both(dilation, "dilation"),
        )
        return weights, inputs.fitting(problem), groups

    def _simulate(
        self, kind: str, one: Problem, groups: int, weights: Mask | None, activations: Mask | None
    ) -> Cycles:
        """Run every group of one call; a group without a mask of its own is dense."""
        key = (self, kind, one, groups, digest(weights), digest(activations))

        def compute() -> Cycles:
            runs = []
            for group in range(groups):
                w = None if weights is None else weights[group * one.K : (group + 1) * one.K]
                a = activations
                if a is not None:
                    a = a[group * one.C : (group + 1) * one.C]
                runs.append(self._simulate_group(kind, one, w, a))
            return total(runs)

        return cached(key, compute)

    def _simulate_group(
        self, kind: str, one: Problem, weights: Mask | None, activations: Mask | None
    ) -> Cycles:
        seen = one.dense_activations() if activations is None else activations
        if weights is None:
            dense, full = self.run_weight_gradient_dense, self.run_weight_gradient_full_slots
            tile = tile_weight_gradient_cycles
            count = self.run_weight_gradient(one, seen)
        else:
            dense, full, tile = self.run_dense, self.run_full_slots, tile_cycles
            count = self.run(one, weights, seen)
        own = cached((self, kind, one), lambda: dense(one))
        return Cycles(
            count.cycles,
            tile(one, self.tile_columns),
            own,
            count_multiplications(one, weights, activations),
            self.multipliers,
            full(one),
            count.limits,
            count.note,
        )
