"""Density: the fraction of a tensor that Top-K keeps, and how many elements that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from swatfx.errors import PolicyError

_SLACK = 1e-6  # a computed density of 0.2 * n may land a rounding error above an integer
_INT64 = 2**62
SAME = 1e-6  # what averaging one density with itself may move it by


@dataclass(frozen=True)
class Density:
    """A fraction in (0, 1] of the elements to keep.

    A sparsity that the user wrote is kept as the exact fraction that its decimal digits say, so
    that .95 of 1000 keeps 50 elements and not 51. A density that was computed (ERK, momentum) is a
    plain float.

    Attributes:
        value: the density, a fraction of 1.
        exact: the exact density where the user wrote it, else None.
    """

    value: float
    exact: Fraction | None = None

    @staticmethod
    def from_sparsity(sparsity: float) -> Density:
        """Density of a sparsity that the user wrote; `sparsity` in [0, 1)."""
        exact = 1 - Fraction(str(check_sparsity(sparsity)))
        return Density(float(exact), exact if exact.denominator < _INT64 else None)

    def count(self, elements: int) -> int:
        """How many of `elements` are kept: n - floor(s n), or ceil(d n - 1e-6) if computed.

        At least one, if there are any: no density is 0.
        """
        if self.exact is not None:
            return elements - math.floor((1 - self.exact) * elements)
        return min(elements, max(1, math.ceil(self.value * elements - _SLACK)))

    def count_within(self, elements: int) -> int:
        """The most of `elements` that are no larger a share than the density; at least one."""
        share = self.value * elements + _SLACK if self.exact is None else self.exact * elements
        return min(elements, max(1, math.floor(share)))

    @property
    def is_dense(self) -> bool:
        """Whether everything is kept."""
        return self.value >= 1.0

    def to_json(self) -> list[object]:
        """`[value, "numerator/denominator" or None]`."""
        return [self.value, None if self.exact is None else str(self.exact)]

    @staticmethod
    def from_json(data: list[object]) -> Density:
        """Inverse of `to_json`."""
        value, exact = data
        return Density(float(str(value)), None if exact is None else Fraction(str(exact)))


DENSE = Density(1.0, Fraction(1))


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return `sparsity` if it is a number in [0, 1), else raise PolicyError."""
    ok = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not ok or not 0 <= sparsity < 1:
        raise PolicyError(
            f"{name} must be a number in [0, 1)",
            value=sparsity,
            remedy="0 means dense, 0.9 keeps a tenth of the elements",
        )
    return sparsity
