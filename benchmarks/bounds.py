"""What a sparse convolution's three products cannot be faster than, by what they do and by rates.

Forward multiplies every nonzero weight by a vector of images at every position of the output, and
adds; the input gradient likewise, of the input. In the weight gradient every nonzero of the packed
activation is multiplied by the output gradient's vector of filters at every kernel position. Each
such product loads its vector and makes one multiply-add a sum; of bfloat16 a vector holds twice as
many elements as of floats, but a dot product adds to as many sums as a multiply-add does.

Kernel positions that lie in the padding count: kernels multiply by the zeros that are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.layer_sides import Layer, SparseConv
from benchmarks.rates import Rates
from swatfx.ops.where import active_weight
from swatfx.tensors import bits

PRODUCTS = ("forward", "input_gradient", "weight_gradient")
BOUNDS = ("load", "multiply", "memory")
_BYTES = {"fp32": 4, "bf16": 2}
_WEIGHT_BYTES = 4  # weights, and their gradients, are float32


@dataclass(frozen=True)
class Kept:
    """What a layer's masks leave, counted.

    Attributes:
        weights: nonzero weights.
        activations: nonzero elements of the packed activation.
        packed_bytes: that the packed activation takes.
    """

    weights: int
    activations: int
    packed_bytes: int


def counted(module: SparseConv) -> Kept:
    """What the masks of a sparse side leave, of its own weight and input."""
    x, _ = module.data.of(module.layout, module.dtype)
    state, kept = module.given()
    seen = active_weight(module.weight.detach(), state, "nchw", x.dtype)
    mask = bits.bits_to_mask(kept[: bits.header_bytes(x.numel())], x.numel())
    return Kept(int(seen.count_nonzero()), int(mask.count_nonzero()), kept.numel())


@dataclass(frozen=True)
class Amounts:
    """What one product does.

    Attributes:
        products: a nonzero times an element, each.
        loaded: bytes that are loaded into registers for them.
        moved: bytes of what is read and written, each once.
    """

    products: int
    loaded: int
    moved: int

    def bounds(self, rates: Rates, dtype: str) -> dict[str, float]:
        """Seconds of each of BOUNDS, and of loads that all come from the second-level cache."""
        return {
            "load": self.loaded / rates.l1,
            "load_l2": self.loaded / rates.l2,
            "multiply": self.products / rates.products(dtype),
            "memory": self.moved / rates.memory,
        }


def amounts(layer: Layer, dtype: str, kept: Kept) -> dict[str, Amounts]:
    """What each of PRODUCTS does; `dtype` is "fp32" or "bf16", of activations and gradients."""
    size = _BYTES[dtype]
    positions, taps = layer.batch * layer.side**2, layer.kernel**2
    inputs, outputs = layer.inputs * positions * size, layer.outputs * positions * size
    weights = layer.inputs * layer.outputs * taps * _WEIGHT_BYTES
    by_weights = kept.weights * positions
    by_activations = kept.activations * taps * layer.outputs
    by_weight = Amounts(by_weights, by_weights * size, inputs + outputs + weights)
    return {
        "forward": by_weight,
        "input_gradient": by_weight,
        "weight_gradient": Amounts(
            by_activations, by_activations * size, kept.packed_bytes + outputs + weights
        ),
    }


def reached(
    done: Amounts, rates: Rates, dtype: str, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The bounds of a product in seconds, the largest, and what part of `seconds` that is.

    `seconds` is a spread, of which the median is compared.
    """
    bounds = done.bounds(rates, dtype)
    largest = max(BOUNDS, key=bounds.__getitem__)
    return {
        "seconds": bounds,
        "largest": largest,
        "reached": bounds[largest] / seconds["median"],
    }
