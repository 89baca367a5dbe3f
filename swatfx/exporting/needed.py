"""Which channels of a graph have to stay: the fewest that what stays reads."""

from __future__ import annotations

import torch
from torch import Tensor

from swatfx.exporting.channels import Channels, Layer, Tracked

_NEAR = 0.01  # of the largest constant, which may stand for the others


class Needed:
    """The fewest channels that have to stay, and why each does."""

    def __init__(self, tracked: Tracked, multiple: int = 1) -> None:
        self.tracked = tracked
        self.multiple = multiple
        self.roots = tracked.roots()
        self.needed = torch.zeros(tracked.count, dtype=torch.bool)
        self.reasons: dict[int, str] = {}
        for i, why in tracked.pins:
            self._need(torch.tensor([i], dtype=torch.int64), why)
        steps = [self._by_readers, self._by_constants, self._by_groups, self._by_emptiness]
        steps += [self._by_multiples] if multiple > 1 else []
        while any(step() for step in steps):  # each lets others ask for more
            pass

    def kept(self, channels: Channels) -> Tensor:
        """Bool [C]."""
        return self.needed[self.roots[channels.ids]]

    def inputs(self, layer: Layer) -> Tensor:
        """Bool [C], of the channels that a layer reads."""
        if layer.source is None:
            return torch.ones(layer.weight.shape[1] * layer.groups, dtype=torch.bool)
        return self.kept(layer.source)

    def groups(self, layer: Layer) -> Tensor:
        """Bool [groups]."""
        return self.kept(layer.out).view(layer.groups, -1).any(1)

    def why(self, channel: int) -> str:
        """The first reason for which one of the id stays."""
        return self.reasons[int(self.roots[channel])]

    def _need(self, ids: Tensor, why: str) -> bool:
        roots = self.roots[ids]
        fresh = roots[~self.needed[roots]].tolist()
        for root in fresh:
            self.reasons.setdefault(root, why)
        self.needed[roots] = True
        return bool(fresh)

    def _demanded(self, layer: Layer) -> Tensor:
        """Bool [C]: input channels that filters that stay have weights for."""
        kept = self.kept(layer.out)
        used = (layer.weight != 0).reshape(*layer.weight.shape[:2], -1).any(-1).cpu()
        return (used & kept.unsqueeze(1)).view(layer.groups, -1, used.shape[1]).any(1).reshape(-1)

    def padded_constants(self, layer: Layer) -> Tensor:
        """Bool [C]: constants of its input that one of them can stand for."""
        assert layer.source is not None
        return layer.source.known & ~layer.absorbed & (layer.groups == 1)

    def _by_readers(self) -> bool:
        grew = False
        for layer in reversed(self.tracked.layers):
            if layer.source is not None:
                wanted = self._demanded(layer) & ~layer.absorbed & ~self.padded_constants(layer)
                grew |= self._need(layer.source.ids[wanted], f"{layer.name} reads it")
        return grew

    def _by_constants(self) -> bool:
        for layer in self.tracked.layers:
            if layer.source is None:
                continue
            values = layer.source.value.abs()
            wanted = self._demanded(layer) & self.padded_constants(layer)
            if not bool(wanted.any()):
                continue
            largest = values[wanted].max()
            there = self.kept(layer.source) & self.padded_constants(layer)
            if not bool((values[there] >= _NEAR * largest).any()):
                chosen = (wanted & (values == largest)).nonzero()[:1, 0]
                why = f"a constant that {layer.name} pads"
                if self._need(layer.source.ids[chosen], why):
                    return True
        return False

    def _by_groups(self) -> bool:
        """Groups of a convolution stay alike, or go."""
        grew = False
        for layer in self.tracked.layers:
            if layer.groups == 1 or layer.depthwise:
                continue
            sides = [c.ids.view(layer.groups, -1) for c in (layer.out, layer.source) if c]
            counts = [self.needed[self.roots[ids]].sum(1) for ids in sides]
            stay = torch.stack(counts).any(0) | (layer.source is None)
            for ids, count in zip(sides, counts, strict=True):
                most = max(int(count.max()), 1)
                for group in (stay & (count < most)).nonzero()[:, 0].tolist():
                    gone = ids[group][~self.needed[self.roots[ids[group]]]]
                    missing = gone[: most - int(count[group])]
                    grew |= self._need(missing, f"groups of {layer.name} are alike")
        return grew

    def _by_emptiness(self) -> bool:
        """No tensor loses its last channel."""
        for channels in self.tracked.of.values():
            if channels.ids.numel() and not bool(self.kept(channels).any()):
                return self._need(channels.ids[:1], "the last one there")
        return False

    def _by_multiples(self) -> bool:
        """Layers keep a multiple of so many filters, or all of them."""
        grew = False
        for layer in self.tracked.layers:
            gone = layer.out.ids[~self.kept(layer.out)]
            missing = gone[: (len(gone) - len(layer.out.ids)) % self.multiple]
            grew |= self._need(missing, f"{layer.name} has a multiple of {self.multiple} filters")
        return grew
