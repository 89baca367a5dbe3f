"""Bytes that a layer moves between memory and an accelerator's buffers, as they are and compressed.

Buffers hold a whole layer at a time and transfers hide behind arithmetic (paper section 4.4), so
each operand moves once. A bandwidth that is not 0 bounds a layer from below by its transfers.
Compressed, a tensor is its nonzero values and one bit an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of the two operands and of the result of one pass of one layer, for one sample."""

    weights: int
    activations: int
    outputs: int
    weights_compressed: int
    activations_compressed: int

    def moved(self, compresses: tuple[str, ...]) -> int:
        """Bytes that a design moves which compresses "weights", "activations", both or neither."""
        weights = self.weights_compressed if "weights" in compresses else self.weights
        packed = "activations" in compresses
        return (
            weights + self.outputs + (self.activations_compressed if packed else self.activations)
        )

    def cycles(self, compresses: tuple[str, ...], bytes_per_cycle: float) -> int:
        """Cycles that the transfers take at a bandwidth; 0 bytes a cycle ignores memory."""
        return math.ceil(self.moved(compresses) / bytes_per_cycle) if bytes_per_cycle else 0


def operand_bytes(elements: int, nonzeros: int, word_bytes: int) -> tuple[int, int]:
    """(as it is, compressed) bytes of a tensor."""
    return elements * word_bytes, nonzeros * word_bytes + (elements + 7) // 8
