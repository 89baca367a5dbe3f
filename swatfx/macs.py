"""MACs of a layer call in the three passes, dense and sparse (appendix A.3).

Three accountings. "paper" reproduces the paper's tables: every kernel position at every output
(forward, weight gradient) or input (input gradient) position, scaled by the target density.
"torch" counts as torch.utils.flop_counter does: every kernel position at every output in all three
passes (a strided input gradient costs no more than the forward), gradients only where they are
wanted; but a grouped weight gradient, which torch counts groups times over, once. "exact" counts
the products that a kernel skipping all zeros would form: none with padding, none with an inactive
weight or a dropped activation, no input gradient where nothing wants one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swatfx.meta import LayerCall


@dataclass(frozen=True)
class Macs:
    """MACs of one call: forward, input gradient, weight gradient."""

    forward: int
    input_gradient: int
    weight_gradient: int


def dense_macs(
    weight_shape: Sequence[int], input_shape: Sequence[int], output_shape: Sequence[int]
) -> Macs:
    """The paper's accounting of a dense conv or linear call, groups included.

    Args:
        weight_shape: (F, C / groups, *kernel) or (out, in).
        input_shape: (N, C, X, Y), (C, X, Y) or (*any, in).
        output_shape: (N, F, H, W), (F, H, W) or (*any, out).
    """
    weights = math.prod(weight_shape)
    spatial = len(weight_shape) - 2
    if not spatial:
        rows = math.prod(input_shape[:-1])
        return Macs(weights * rows, weights * rows, weights * rows)
    batch = input_shape[0] if len(input_shape) == len(weight_shape) else 1
    at_output = batch * math.prod(output_shape[-spatial:])
    at_input = batch * math.prod(input_shape[-spatial:])
    return Macs(weights * at_output, weights * at_input, weights * at_output)


def transposed_macs(weight_shape: Sequence[int], input_shape: Sequence[int]) -> Macs:
    """A transposed convolution: its weight meets every input position in each pass."""
    spatial = len(weight_shape) - 2
    batch = input_shape[0] if len(input_shape) == len(weight_shape) else 1
    macs = math.prod(weight_shape) * batch * math.prod(input_shape[-spatial:])
    return Macs(macs, macs, macs)


def scale(macs: Macs, weight: float, backward_weight: float, activation: float) -> Macs:
    """Scale by the densities that forward, input gradient and weight gradient see, rounding up."""
    return Macs(
        math.ceil(macs.forward * weight - 1e-6),
        math.ceil(macs.input_gradient * backward_weight - 1e-6),
        math.ceil(macs.weight_gradient * activation - 1e-6),
    )


def tap_counts(
    kernel: Sequence[int], input_size: Sequence[int], output_size: Sequence[int], call: LayerCall
) -> list[Tensor]:
    """Per spatial dimension, int64 [kernel]: outputs at which a tap meets an input, not padding."""
    counts = []
    for d, taps in enumerate(kernel):
        low = call.padding[d] + _pad_low(call, len(kernel), d)
        at = torch.arange(output_size[d]).unsqueeze(0) * call.stride[d]
        at = at + torch.arange(taps).unsqueeze(1) * call.dilation[d] - low
        if call.pad_mode != "constant":  # such padding repeats inputs: every tap meets one
            inside = torch.ones_like(at, dtype=torch.bool)
        else:
            inside = (at >= 0) & (at < input_size[d])
        counts.append(inside.sum(dim=1))
    return counts


def use_counts(
    kernel: Sequence[int], input_size: Sequence[int], output_size: Sequence[int], call: LayerCall
) -> list[Tensor]:
    """Per spatial dimension, int64 [input]: (tap, output) pairs that meet each input position."""
    counts = []
    for d, taps in enumerate(kernel):
        low = call.padding[d] + _pad_low(call, len(kernel), d)
        at = torch.arange(output_size[d]).unsqueeze(0) * call.stride[d]
        at = (at + torch.arange(taps).unsqueeze(1) * call.dilation[d] - low).reshape(-1)
        if call.pad_mode == "constant":
            at = at[(at >= 0) & (at < input_size[d])]
        else:
            at = _padded_source(at, input_size[d], call.pad_mode)
        counts.append(torch.bincount(at, minlength=input_size[d]))
    return counts


def _pad_low(call: LayerCall, spatial: int, dim: int) -> int:
    return call.pad[2 * (spatial - 1 - dim)] if call.pad else 0


def _padded_source(at: Tensor, size: int, mode: str) -> Tensor:
    """The input position that a padded position repeats."""
    if mode == "circular":
        return at % size
    if mode == "replicate":
        return at.clamp(0, size - 1)
    at = at.abs()
    return torch.where(at >= size, 2 * (size - 1) - at, at)


def exact_weight_macs(keep: Tensor, taps: Sequence[Tensor], batch: int) -> int:
    """Products of active weights `keep` (F, C / groups, *kernel) with inputs, all samples."""
    per_tap = keep.sum(dim=(0, 1), dtype=torch.int64) if keep.dim() > 2 else keep.sum()
    for d, count in enumerate(taps):
        per_tap = per_tap * count.view(*[-1 if i == d else 1 for i in range(len(taps))])
    return int(per_tap.sum().item()) * batch


def exact_activation_macs(keep: Tensor, uses: Sequence[Tensor], filters: int) -> int:
    """Products of kept activations `keep` (N, C, *spatial) with output gradients.

    `filters` is the number of filters that read a channel: F / groups.
    """
    positions = keep.sum(dim=tuple(range(keep.dim() - len(uses))), dtype=torch.int64)
    for d, count in enumerate(uses):
        positions = positions * count.view(*[-1 if i == d else 1 for i in range(len(uses))])
    return int(positions.sum().item()) * filters


def topk_speedup(reduction: float, period: int, step_ms: float, topk_ms: float) -> float:
    """Speedup over a period of dense steps with one Top-K refresh in it (equations 4 and 5)."""
    sparse = period * (1 - reduction) * step_ms + topk_ms
    return period * step_ms / sparse
