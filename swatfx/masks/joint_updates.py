"""Updates of several layers between optimizer steps, whoever steps when.

An update is due after a training step, and reads each of its layers twice: before the layer's
optimizer moves it, and after. Where several optimizers hold its layers, each comes in its own time:
one may follow the other, take turns with it, or be skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from swatfx.compiled import SparseLayer
from swatfx.masks.optimizers import Optimizer, Owners


class JointUpdate:
    """What happens to some layers after a training step at which it is due.

    A layer arrives at the first step of its optimizer since the update was due. The update is made
    for layers as they arrive, where each stands alone, or for all of them once the last has come.
    Where an optimizer comes round again before that, it is made first, of those that are there.

    Args:
        layers: of the update.
        owners: of their weights. Layers that no optimizer holds never arrive.
        alone: whether what happens to a layer depends on no other.
    """

    def __init__(self, layers: Sequence[SparseLayer], owners: Owners, *, alone: bool) -> None:
        self.layers = list(layers)
        self._owners = owners
        self._alone = alone
        self._due = 0  # the training step of the update under way
        self._left: set[str] = set()  # layers that have not arrived for it
        self._arrived: list[SparseLayer] = []

    def is_due(self, step: int) -> bool:
        """Whether an update follows training step `step`, counted from 1."""
        raise NotImplementedError

    def see(self, layers: Sequence[SparseLayer]) -> None:
        """Read what is wanted of these layers before an optimizer moves them."""
        raise NotImplementedError

    def arrive(self, layer: SparseLayer) -> None:
        """Read what is wanted of the layer after its optimizer has moved it."""

    def update(self, layers: Sequence[SparseLayer], step: int) -> bool:
        """Make the update that was due after `step`; returns whether masks have changed."""
        raise NotImplementedError

    def hold(self, optimizer: Optimizer) -> None:
        """Weights of `optimizer` were moved outside of a step: put right what may not be moved."""

    def skip(self, optimizer: Optimizer) -> None:
        """The step that was seen coming was left out: forget what was read for it."""
        for layer in self._owners.share(optimizer, self.layers):
            self.unsee(layer)

    def unsee(self, layer: SparseLayer) -> None:
        """Forget what `see` read of the layer."""
        raise NotImplementedError

    def restart(self) -> None:
        """Forget an update under way."""
        self._due, self._left, self._arrived = 0, set(), []

    def awaits(self, layer: SparseLayer, step: int) -> bool:
        """Whether a step of the layer's optimizer, in training step `step`, makes it arrive."""
        return self.is_due(step) or layer.plan.name in self._left

    def before_step(self, optimizer: Optimizer, step: int) -> bool:
        """Before `optimizer` moves its weights in training step `step`; as `update`."""
        mine = self._owners.share(optimizer, self.layers)
        names = {layer.plan.name for layer in mine}
        again = any(layer.plan.name in names for layer in self._arrived)
        changed = again and self._conclude()
        self.see([layer for layer in mine if self.awaits(layer, step)])
        return changed

    def after_step(self, optimizer: Optimizer, step: int) -> bool:
        """After `optimizer` has moved its weights in training step `step`; as `update`."""
        changed = False
        if self.is_due(step) and step != self._due:
            changed = bool(self._arrived) and self._conclude()
            self._due = step
            self._left = {x.plan.name for x in self.layers if self._owners.of(x.weight)}
        for layer in self._owners.share(optimizer, self.layers):
            if layer.plan.name in self._left:
                self._left.remove(layer.plan.name)
                self._arrived.append(layer)
                self.arrive(layer)
        if self._arrived and (self._alone or not self._left):
            arrived, self._arrived = self._arrived, []
            changed = self.update(arrived, self._due) or changed
        return changed

    def _conclude(self) -> bool:
        arrived, self._arrived, self._left = self._arrived, [], set()
        return self.update(arrived, self._due)
