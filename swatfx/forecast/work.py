"""What a call has to do, as the quantities that its time is a sum over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

POINTWISE, SPATIAL, STRIDED = "pointwise", "spatial", "strided"
DEPTHWISE, LINEAR = "depthwise", "linear"
NORM, CONVERSION = "norm", "conversion"
LAYERS = (POINTWISE, SPATIAL, STRIDED, DEPTHWISE, LINEAR)
KINDS = (*LAYERS, NORM, CONVERSION)
SPARSE, DENSE, PLAIN = "sparse", "dense", "plain"

_LANES = {"fp32": 16, "bf16": 32}


@dataclass(frozen=True)
class Work:
    """One call in a training step: forward and backward.

    Attributes:
        kind: one of KINDS.
        dtype: "fp32" or "bf16", of activations.
        macs: products of one of the three passes, were all dense.
        vector_macs: likewise, with the positions that fill up vectors of lanes.
        inputs: elements of the activation.
        outputs: of the result.
        weights: of the weight.
        weight_density: of what forward and the input gradient multiply by.
        activation_density: of the packed activation that the weight gradient reads; None where it
            is formed at active weights alone, from a dense activation.
    """

    kind: str
    dtype: str
    macs: int = 0
    vector_macs: int = 0
    inputs: int = 0
    outputs: int = 0
    weights: int = 0
    weight_density: float = 1.0
    activation_density: float | None = None

    @staticmethod
    def of_layer(
        dtype: str,
        weight_shape: Sequence[int],
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        *,
        stride: Sequence[int] = (),
        groups: int = 1,
        weight_density: float = 1.0,
        activation_density: float | None = None,
    ) -> Work:
        """Of a linear layer or a convolution.

        Args:
            dtype: "fp32" or "bf16".
            weight_shape: (F, C / groups, *kernel) or (out, in).
            input_shape: (N, C, *spatial), (C, *spatial) or (*any, in).
            output_shape: likewise, of F channels.
            stride: of a convolution.
            groups: likewise.
            weight_density: see above.
            activation_density: see above.
        """
        weights = math.prod(weight_shape)
        kind = _kind(weight_shape, stride, groups)
        spatial = len(weight_shape) - 2
        positions = math.prod(output_shape) // weight_shape[0]
        lanes = _LANES[dtype]
        if kind in (POINTWISE, LINEAR):
            filled = math.ceil(positions / lanes) * lanes
        else:
            batch = output_shape[0] if len(output_shape) == spatial + 2 else 1
            rows = math.prod(output_shape[-spatial:-1])
            filled = rows * _filled(batch, output_shape[-1], lanes)
        return Work(
            kind,
            dtype,
            weights * positions,
            weights * filled,
            math.prod(input_shape),
            math.prod(output_shape),
            weights,
            weight_density,
            activation_density,
        )

    @staticmethod
    def of_tensor(kind: str, dtype: str, elements: int) -> Work:
        """Of a norm with what follows it, or a conversion into another memory order and back."""
        return Work(kind, dtype, inputs=elements)

    def quantities(self, side: str) -> tuple[float, ...]:
        """What a side's time is a weighted sum of; the first is the call itself."""
        if self.kind not in LAYERS:
            return 1.0, self.inputs
        if side != SPARSE:
            return 1.0, self.macs, self.inputs, self.outputs, self.weights
        density = self.activation_density
        products = self.vector_macs * self.weight_density
        return (
            1.0,
            products,
            0.0 if density is None else self.macs * density,
            products if density is None else 0.0,
            self.inputs,
            0.0 if density is None else self.inputs * density,
            self.outputs,
            self.weights,
        )


def _kind(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> str:
    if len(weight_shape) == 2:
        return LINEAR
    if groups > 1 and tuple(weight_shape[:2]) == (groups, 1):
        return DEPTHWISE
    if max(stride, default=1) > 1:
        return STRIDED
    return POINTWISE if math.prod(weight_shape[2:]) == 1 else SPATIAL


def _filled(batch: int, width: int, lanes: int) -> int:
    """Positions of a row of all images, with those that fill up its vectors.

    A vector holds `lanes` images of one column; of fewer images, several columns.
    """
    whole, rest = divmod(batch, lanes)
    return whole * lanes * width + math.ceil(rest * width / lanes) * lanes
