"""Annotate each layer node with simulated cycles, pass by pass and accelerator by accelerator.

Reads LayerPlans, weights and, if a real batch was observed, the activations' masks; writes records
of cycles on layer nodes. Masks that nothing real gives are drawn at the planned density from a
seeded generator. Changes no node.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from passes.annotate_cost import activation_density
from passes.trace_shapes import Run, Seen
from swatfx import meta
from swatfx.accelerators import Accelerator, Cycles
from swatfx.accelerators.options import SimulationOptions
from swatfx.accelerators.traffic import Traffic, operand_bytes
from swatfx.compiled import SparseLayer, SwatModule, layer_nodes, sparse_layers
from swatfx.meta import LayerCall, LayerPlan

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Geometry:
    """A layer call as a 2-D problem for one sample: what every accelerator is asked."""

    filters: int
    channels: int
    kernel: tuple[int, int]
    input_hw: tuple[int, int]
    stride: int
    padding: tuple[int, int, int, int]
    groups: int
    dilation: int
    spatial: bool = True

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[K, C / groups, R, S]."""
        return (self.filters, self.channels // self.groups, *self.kernel)

    @property
    def where(self) -> dict[str, Any]:
        """The keywords that all three calls share."""
        return {
            "input_hw": self.input_hw,
            "stride": self.stride,
            "padding": self.padding,
            "groups": self.groups,
            "dilation": self.dilation,
        }


def geometry_of(plan: LayerPlan, call: LayerCall, seen: Seen) -> Geometry | str:
    """The 2-D problem that a call is, or why no accelerator here can run it.

    Linear layers are 1x1 over their rows; 1-D convolutions have a width of 1.
    """
    shape = seen.input_shape
    if plan.kind == "linear":
        rows = math.prod(shape[1:-1]) if len(shape) > 1 else 1
        out, channels = plan.weight_shape
        return Geometry(out, channels, (1, 1), (rows, 1), 1, (0, 0, 0, 0), 1, 1, False)
    spatial = len(plan.weight_shape) - 2
    if spatial > 2:
        return "3-D convolution: the designs are two-dimensional"
    wide = spatial == 1
    stride = call.stride if not wide else call.stride * 2
    dilation = call.dilation if not wide else call.dilation * 2
    if len(set(stride)) > 1 or len(set(dilation)) > 1:
        return "stride or dilation differs by axis"
    pads = [(p, p) for p in call.padding]
    for axis in range(len(call.pad) // 2):
        low, high = pads[-1 - axis]
        pads[-1 - axis] = low + call.pad[2 * axis], high + call.pad[2 * axis + 1]
    pads += [(0, 0)] * wide
    hw = (*shape[-spatial:], 1)[:2]
    kernel = (*plan.weight_shape[2:], 1)[:2]
    channels = plan.weight_shape[1] * call.groups
    padding = (pads[0][0], pads[0][1], pads[1][0], pads[1][1])
    return Geometry(
        plan.weight_shape[0],
        channels,
        (kernel[0], kernel[1]),
        (int(hw[0]), int(hw[1])),
        stride[0],
        padding,
        call.groups,
        dilation[0],
    )


def annotate_cycles(
    gm: SwatModule,
    observed: Run,
    accelerators: Mapping[str, Accelerator],
    options: SimulationOptions,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Write `{accelerator: {pass: record}}` on every layer node that a run saw.

    Args:
        gm: the compiled model.
        observed: a run of `trace_shapes`, with masks if it was a real one.
        accelerators: name -> model.
        options: where masks come from, and what memory costs.
        tick: called after each layer and accelerator, for a progress bar.
    """
    layers = {layer.plan.name: layer for layer in sparse_layers(gm)}
    for node in layer_nodes(gm):
        calls = observed.nodes.get(node.key, [])
        if not calls:
            continue
        plan, call = node.plan, node.record.call
        found: dict[str, Any] = {}
        for seen in calls:
            shape: Geometry | str = plan.skipped or "no geometry"
            if call is not None:
                shape = geometry_of(plan, call, seen)
            if isinstance(shape, str):
                found["skipped"] = shape
                continue
            masks = _Masks(plan, layers.get(plan.name), seen, shape, options)
            found["masks"] = masks.source
            for name, accelerator in accelerators.items():
                for sample, kind, cycles, traffic in _passes(accelerator, plan, shape, masks, seen):
                    into = found.setdefault(name, {}).setdefault(kind, {})
                    _add(into, sample, cycles, traffic, accelerator.compresses, options)
        for _ in accelerators:
            tick()
        meta.update(node.node, cycles=found)


def _passes(
    accelerator: Accelerator, plan: LayerPlan, shape: Geometry, masks: _Masks, seen: Seen
) -> Iterator[tuple[int, str, Cycles, Traffic]]:
    """(sample, pass, cycles, traffic); no input gradient where nobody wants one."""
    ones = np.ones_like(masks.weights)
    forward = masks.weights if plan.rule.forward_weight else ones
    backward = masks.weights if plan.rule.backward_weight else ones
    outputs = math.prod(seen.output_shape) // max(masks.batch, 1)
    inputs = shape.channels * math.prod(shape.input_hw)
    gradient = np.ones(outputs, dtype=np.bool_)  # of the output: dense
    for sample in range(masks.samples):
        nonzero, kept = masks.nonzero(sample), masks.kept(sample)
        cycles = accelerator.conv_cycles(forward, nonzero, **shape.where)
        yield sample, "forward", cycles, masks.traffic(forward, nonzero, outputs)
        if seen.input_requires_grad:
            cycles = accelerator.backward_input(backward, None, **shape.where)
            yield sample, "input_gradient", cycles, masks.traffic(backward, gradient, inputs)
        cycles = accelerator.backward_weight(
            kept, filters=shape.filters, kernel=shape.kernel, **shape.where
        )
        # The output gradient stands in the weights' place; the weight gradient comes out.
        yield sample, "weight_gradient", cycles, masks.traffic(gradient, kept, ones.size)


def _add(
    into: dict[str, Any],
    sample: int,
    cycles: Cycles,
    traffic: Traffic,
    compresses: tuple[str, ...],
    options: SimulationOptions,
) -> None:
    """Add one call's sample of one pass to a JSON-able record; calls of a layer add up."""
    memory = traffic.cycles(compresses, options.bandwidth)
    limits = dict(cycles.limits)
    if memory > cycles.cycles:
        limits["memory"] = memory - cycles.cycles
    new = {
        "dense_cycles": cycles.dense_cycles,
        "own_dense_cycles": cycles.own_dense_cycles,
        "full_slot_cycles": cycles.full_slot_cycles,
        "multiplications": cycles.multiplications,
        "multipliers": cycles.multipliers,
        "memory_cycles": memory,
        "moved_bytes": traffic.moved(compresses),
        "weight_bytes": traffic.weights,
        "activation_bytes": traffic.activations,
        "output_bytes": traffic.outputs,
        "compressed_weight_bytes": traffic.weights_compressed,
        "compressed_activation_bytes": traffic.activations_compressed,
    }
    totals = into.setdefault("cycles", [])  # one a sample
    if sample == len(totals):
        totals.append(0)
    totals[sample] += max(cycles.cycles, memory)
    for key, value in new.items():
        into[key] = value if key == "multipliers" else into.get(key, 0) + value
    lost = into.setdefault("limits", {})
    for cause, count in limits.items():
        lost[cause] = lost.get(cause, 0) + count
    into["note"] = cycles.note


class _Masks:
    """The masks of one call: real where they were seen, else drawn at the planned density."""

    def __init__(
        self,
        plan: LayerPlan,
        layer: SparseLayer | None,
        seen: Seen,
        shape: Geometry,
        options: SimulationOptions,
    ) -> None:
        rng = np.random.default_rng([options.seed, zlib.crc32(plan.name.encode())])
        self._word = options.word_bytes
        plane = (shape.channels, *shape.input_hw)
        batched = len(seen.input_shape) > (len(plan.weight_shape) - 1 if shape.spatial else 1)
        self.batch = seen.input_shape[0] if batched else 1
        self.samples = min(options.samples, self.batch)
        sources = []
        if layer is not None and not layer.weight.is_meta and not options.draw_weights:
            keep = layer.keep_now() & (layer.weight != 0)
            self.weights = _array(keep).reshape(shape.weight_shape)
            sources.append("weights as they are")
        else:
            density = layer.weight_density.value if layer is not None else 1.0
            self.weights = _draw(rng, shape.weight_shape, density)
            sources.append("weights drawn" if layer is not None else "weights dense")
        if seen.nonzero is not None:
            self._nonzero = _planes(seen.nonzero, plan, plane, self.samples)
            kept = seen.keep if seen.keep is not None else seen.nonzero
            self._kept = _planes(kept, plan, plane, self.samples)
            sources.append("activations seen")
        else:
            density = options.natural_density
            self._nonzero = _draw(rng, (self.samples, *plane), density)
            if layer is not None and plan.rule.backward_activation:
                density = min(density, activation_density(plan, layer))
            self._kept = _draw(rng, (self.samples, *plane), density)
            sources.append(f"activations drawn, {options.natural_density:g} not zero")
        self.source = ", ".join(sources)

    def nonzero(self, sample: int) -> Mask:
        """Where the input is not zero: what the forward pass can skip."""
        return cast(Mask, self._nonzero[sample])

    def kept(self, sample: int) -> Mask:
        """What was saved: what the weight gradient sees."""
        return cast(Mask, self._kept[sample])

    def traffic(self, weights: Mask, activations: Mask, outputs: int) -> Traffic:
        """Bytes that a pass with these operands moves."""
        w = operand_bytes(weights.size, int(weights.sum()), self._word)
        a = operand_bytes(activations.size, int(activations.sum()), self._word)
        return Traffic(w[0], a[0], outputs * self._word, w[1], a[1])


def _planes(mask: Tensor, plan: LayerPlan, plane: tuple[int, int, int], samples: int) -> Mask:
    """(N, C, *spatial) or (*any, C) -> [samples, C, H, W]; N is 1 for a single sample."""
    array = _array(mask)
    if plan.kind == "linear":
        array = array.reshape(1 if array.ndim == 1 else array.shape[0], -1, array.shape[-1])
        array = array.swapaxes(1, 2)
    planes: Mask = array.reshape(-1, *plane)[:samples]
    return planes


def _draw(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> Mask:
    """A mask of exactly round(density * n) elements, at random places."""
    count = math.prod(shape)
    mask: Mask = np.zeros(count, dtype=np.bool_)
    mask[: round(density * count)] = True
    rng.shuffle(mask)
    return cast(Mask, mask.reshape(shape))


def _array(mask: Tensor) -> Mask:
    return cast(Mask, mask.detach().cpu().numpy().astype(np.bool_))
