"""Kernels of a compiled model, chosen again as its densities move."""

from __future__ import annotations

from collections.abc import Sequence

from passes.choose_kernels import follow_densities, too_dense
from swatfx.compiled import SparseLayer, SwatModule
from swatfx.masks import Optimizer
from swatfx.ops.recomputed import inside_backward


class KernelChoice:
    """After the step that moved a density across the rule's, lets kernels be chosen again.

    An optimizer that steps inside of backward (a hook on a gradient) moves densities and no
    kernels: what backward has yet to recompute has to run as forward did.

    Args:
        gm: the compiled model.
        layers: those that take part.
    """

    def __init__(self, gm: SwatModule, layers: Sequence[SparseLayer]) -> None:
        self._gm = gm
        self._nodes = [layer.node for layer in layers]
        self._allowed: list[bool] | None = None  # by its densities, each layer; None: not known

    def start(self, step: int) -> None:
        """Densities may have been written by others."""
        self._allowed = None

    def stop(self) -> None:
        """Nothing is held on to."""

    def before_step(self, optimizer: Optimizer, step: int) -> bool:
        """Nothing has moved yet."""
        return False

    def hold(self, optimizer: Optimizer) -> None:
        """Weights alone have moved."""

    def skip(self, optimizer: Optimizer) -> None:
        """Nothing was read."""

    def after_step(self, optimizer: Optimizer, step: int) -> bool:
        """Look at the densities, where no backward is under way; no mask changes."""
        if not inside_backward():
            allowed = [too_dense(node) is None for node in self._nodes]
            if allowed != self._allowed:
                follow_densities(self._gm)
                self._allowed = allowed
        return False
