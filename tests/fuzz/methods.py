"""What the methods do in one layer, after the paper: densities, selections, where each acts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch


@dataclass(frozen=True)
class Rule:
    """How one layer takes part.

    Attributes:
        weight_density: of the weights kept: an exact fraction, or a float that was computed.
        activation_density: likewise.
        gradient_density: likewise, of the output gradient.
        forward_weight: and so on: which products see what is kept.
        active_only: the weight gradient reaches active weights only.
        held: the mask of the first moment stays.
    """

    weight_density: Fraction | float = Fraction(1)
    activation_density: Fraction | float = Fraction(1)
    gradient_density: Fraction | float = Fraction(1)
    weight_selector: str = "nchw"
    activation_selector: str = "nchw"
    gradient_selector: str = "nchw"
    forward_weight: bool = True
    forward_activation: bool = False
    backward_weight: bool = True
    backward_activation: bool = True
    active_only: bool = False
    held: bool = False
    period: int = 1
    value_dtype: torch.dtype | None = None


# name -> the fields in which a method differs from SWAT (the paper's tables of variants).
_FIELDS: dict[str, dict[str, bool]] = {
    "swat-u": {},
    "swat-erk": {},
    "saw": {"forward_weight": False},
    "forward-weights": {"backward_weight": False, "backward_activation": False},
    "forward-activations": {
        "forward_weight": False,
        "forward_activation": True,
        "backward_weight": False,
        "backward_activation": False,
    },
    "swat-active-update": {"active_only": True},
    "meprop": {"forward_weight": False, "backward_weight": False, "backward_activation": False},
    "dst": {"backward_activation": False},
    "static": {"backward_activation": False, "active_only": True, "held": True},
}
METHODS = tuple(_FIELDS)


@dataclass(frozen=True)
class Method:
    """A policy: what `text` writes for swatfx, and `rules` reads for the oracle."""

    name: str = "swat-u"
    sparsity: float = 0.9
    activation_sparsity: float | None = None
    weight_selector: str = "nchw"
    activation_selector: str = "nchw"
    gradient_selector: str = "nchw"
    period: int = 1
    held: bool = False
    first_dense: bool = False

    def text(self) -> str:
        """The policy's string form."""
        parts = [f"{self.name}:{0 if self.name == 'dst' else self.sparsity}"]
        parts.append(f"first_dense={self.first_dense}")
        if self.activation_sparsity is not None and self.name not in ("meprop", "dst"):
            parts.append(f"activation_sparsity={self.activation_sparsity}")
        if self.name not in ("dst", "static"):
            parts.append(f"weight_selector={self.weight_selector}")
        parts.append(f"activation_selector={self.activation_selector}")
        parts.append(f"gradient_selector={self.gradient_selector}")
        if self.period > 1:
            parts.append(f"period={self.period}")
        if self.held:
            parts.append("hold_from_epoch=0")
        return ",".join(parts)

    def rules(
        self, shapes: Sequence[tuple[int, ...]], value_dtype: torch.dtype | None
    ) -> list[Rule]:
        """One a layer that takes part; `shapes` are their weights'."""
        erk = self.name in ("swat-erk", "static")
        weights = spread(shapes, self.sparsity, erk)
        activations = weights
        if self.activation_sparsity is not None:
            activations = spread(shapes, self.activation_sparsity, erk)
        result = []
        for weight, activation in zip(weights, activations, strict=True):
            gradient: Fraction | float = Fraction(1)
            if self.name == "meprop":
                weight, activation, gradient = Fraction(1), Fraction(1), exact(self.sparsity)
            acts = {"forward_weight": True, "backward_weight": True} | _FIELDS[self.name]
            if not (acts["forward_weight"] or acts["backward_weight"]):
                weight = Fraction(1)  # no product sees what would be selected
            selector = {"dst": "learned", "static": "random"}.get(self.name, self.weight_selector)
            result.append(
                Rule(
                    weight,
                    activation,
                    gradient,
                    selector,
                    self.activation_selector,
                    self.gradient_selector,
                    **{"held": self.held, **_FIELDS[self.name]},
                    period=self.period,
                    value_dtype=value_dtype,
                )
            )
        return result


def exact(sparsity: float) -> Fraction:
    """The density that the decimal digits of a sparsity say."""
    return 1 - Fraction(str(sparsity))


def count(density: Fraction | float, elements: int) -> int:
    """How many are kept: n - floor(s n), or ceil(d n - 1e-6) of a computed density."""
    if isinstance(density, Fraction):
        return elements - math.floor((1 - density) * elements)
    return min(elements, max(1, math.ceil(density * elements - 1e-6)))


def count_held(density: Fraction | float, elements: int) -> int:
    """Of a random mask that is held: no larger a share than the density, but one at least."""
    share = density * elements + (0 if isinstance(density, Fraction) else 1e-6)
    return min(elements, max(1, math.floor(share)))


def spread(shapes: Sequence[tuple[int, ...]], sparsity: float, erk: bool) -> list[Fraction | float]:
    """Densities of layers: all alike, or by Erdos-Renyi-kernel with layers capped at 1."""
    if not erk:
        return [exact(sparsity) for _ in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        budget = float(exact(sparsity)) * sum(sizes) - sum(sizes[i] for i in dense)
        rest = [i for i in range(len(shapes)) if i not in dense]
        if not rest:
            return [1.0 for _ in shapes]
        scale = budget / sum(raw[i] * sizes[i] for i in rest)
        over = {i for i in rest if raw[i] * scale > 1}
        if not over:
            return [1.0 if i in dense else min(1.0, raw[i] * scale) for i in range(len(shapes))]
        dense |= over
