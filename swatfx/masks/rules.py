"""Rules by which held masks change: what is dropped, what is grown, and where.

A mask update drops active weights (DROPS), shares the number of weights to grow over the layers
(SHARES), and makes as many weights active (GROWS). The rules see tensors and counts; they know
nothing of graphs, optimizers or schedules. Add one by adding it here, or at run time:
`swatfx.masks.GROWS["mine"] = GrowRule(by_score(lambda layer: layer.weight.abs()))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swatfx.density import Density
from swatfx.errors import UnknownNameError
from swatfx.policy import Policy
from swatfx.selectors.topk import largest

DSR_THRESHOLD = 1e-3  # what global-magnitude starts at
_TOLERANCE = 0.1  # of the number of weights that it is to drop


@dataclass(frozen=True)
class MaskedLayer:
    """What rules see of one layer at a mask update.

    Attributes:
        name: of the layer.
        weight: its values, of the layer's shape.
        keep: bool mask of the active weights; for grow rules, without what was just dropped.
        target: density that the layer is to have after the update; more than that is dropped.
        generator: for draws, on the host, so that every device draws alike; seeded by the policy's
            seed, the layer's name and the step.
        gradient: dense gradient of this step, where the grow rule needs it.
        momentum: dense momentum after this step, likewise.
        select: what the layer's selector would keep of the weights as they are.
    """

    name: str
    weight: Tensor
    keep: Tensor
    target: Density
    generator: torch.Generator
    select: Callable[[], Tensor]
    gradient: Tensor | None = None
    momentum: Tensor | None = None

    @property
    def active(self) -> int:
        """Number of active weights."""
        return int(self.keep.sum().item())

    @property
    def capacity(self) -> int:
        """Number of inactive weights: what can be grown."""
        return self.keep.numel() - self.active


# (layers, fraction of active weights to drop, float64 [1] that the rule may remember by) -> masks
DropRule = Callable[[Sequence[MaskedLayer], float, Tensor], list[Tensor]]
# (layers after dropping, weights dropped in each) -> weights to grow in each, the same in total
ShareRule = Callable[[Sequence[MaskedLayer], Sequence[int]], list[int]]


@dataclass(frozen=True)
class GrowRule:
    """Which inactive weights become active.

    Attributes:
        choose: (layer after dropping, how many) -> bool mask of those to grow.
        needs: of "gradient" and "momentum", the dense tensors that `choose` reads.
        rests: whether nothing is to be grown after the last step of a training, since it would
            never be trained.
    """

    choose: Callable[[MaskedLayer, int], Tensor]
    needs: frozenset[str] = frozenset()
    rests: bool = True


def drop_count(layer: MaskedLayer, fraction: float) -> int:
    """Weights to drop: `fraction` of those within the target, and all that are beyond it."""
    beyond = max(0, layer.active - layer.target.count(layer.keep.numel()))
    return beyond + math.floor(fraction * (layer.active - beyond) + 1e-9)


def _draw(layer: MaskedLayer) -> Tensor:
    draw = torch.rand(layer.weight.shape, generator=layer.generator, device="cpu")
    return draw.to(layer.weight.device)


_ALONE: set[DropRule] = set()  # drop rules that look at each layer by itself


def _per_layer(choose: Callable[[MaskedLayer, float], Tensor]) -> DropRule:
    def drop(layers: Sequence[MaskedLayer], fraction: float, memory: Tensor) -> list[Tensor]:
        return [choose(layer, fraction) for layer in layers]

    _ALONE.add(drop)
    return drop


def _none(layer: MaskedLayer, fraction: float) -> Tensor:
    return torch.zeros_like(layer.keep)


def _magnitude(layer: MaskedLayer, fraction: float) -> Tensor:
    return largest(-layer.weight.abs(), layer.keep, drop_count(layer, fraction))


def _random(layer: MaskedLayer, fraction: float) -> Tensor:
    return largest(_draw(layer), layer.keep, drop_count(layer, fraction))


def _signed(layer: MaskedLayer, fraction: float) -> Tensor:
    """SET: the smallest positive and the largest negative, the fraction of each sign."""
    negative = layer.keep & (layer.weight < 0)
    share = int(negative.sum().item()) / max(layer.active, 1)
    count = drop_count(layer, fraction)
    of_negative = round(share * count)
    scores = -layer.weight.abs()
    return largest(scores, negative, of_negative) | largest(
        scores, layer.keep & ~negative, count - of_negative
    )


def _unselected(layer: MaskedLayer, fraction: float) -> Tensor:
    return layer.keep & ~layer.select()


def _global_magnitude(
    layers: Sequence[MaskedLayer], fraction: float, memory: Tensor
) -> list[Tensor]:
    """DSR: all active weights below one threshold, which then doubles or halves.

    Where every weight of a layer is below it, the largest stays.
    """
    threshold = float(memory.item()) or DSR_THRESHOLD
    dropped = []
    for layer in layers:
        below = layer.keep & (layer.weight.abs() < threshold)
        if torch.equal(below, layer.keep) and layer.active:
            below = below & ~largest(layer.weight.abs(), layer.keep, 1)
        dropped.append(below)
    wanted = fraction * sum(layer.active for layer in layers)
    count = sum(int(mask.sum().item()) for mask in dropped)
    if count < (1 - _TOLERANCE) * wanted:
        threshold *= 2
    elif count > (1 + _TOLERANCE) * wanted:
        threshold /= 2
    memory.fill_(threshold)
    return dropped


def by_score(score: Callable[[MaskedLayer], Tensor]) -> Callable[[MaskedLayer, int], Tensor]:
    """Grow the inactive weights whose score is largest."""

    def choose(layer: MaskedLayer, count: int) -> Tensor:
        return largest(score(layer), ~layer.keep, count)

    return choose


def _gradient(layer: MaskedLayer) -> Tensor:
    assert layer.gradient is not None  # the rule says that it needs it
    return layer.gradient.abs()


def _momentum(layer: MaskedLayer) -> Tensor:
    assert layer.momentum is not None
    return layer.momentum.abs()


def _selected(layer: MaskedLayer, count: int) -> Tensor:
    return layer.select() & ~layer.keep


def share_out(total: int, weights: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to `weights`, none above its capacity, `total` in sum.

    What a full layer cannot take is shared out over the others. The sum falls short of `total` only
    where the capacities' does.
    """
    result = [0] * len(weights)
    total = min(total, sum(capacities))
    while (rest := total - sum(result)) > 0:
        open_ = [i for i, c in enumerate(capacities) if result[i] < c]
        mass = math.fsum(weights[i] for i in open_)
        even = not (mass > 0 and math.isfinite(mass))
        shares = {i: rest * (1 / len(open_) if even else weights[i] / mass) for i in open_}
        fits = all(math.floor(share) <= capacities[i] - result[i] for i, share in shares.items())
        for i, share in shares.items():
            result[i] += min(math.floor(share), capacities[i] - result[i])
        if fits:  # what rounding down has left: to the largest remainders
            order = sorted(open_, key=lambda i: (math.floor(shares[i]) - shares[i], i))
            for i in [i for i in order if result[i] < capacities[i]][: total - sum(result)]:
                result[i] += 1
    return result


def _same_layer(layers: Sequence[MaskedLayer], dropped: Sequence[int]) -> list[int]:
    return list(dropped)


def _by_momentum(layers: Sequence[MaskedLayer], dropped: Sequence[int]) -> list[int]:
    """SNFS: in proportion to the mean momentum of each layer's active weights."""
    means = []
    for layer in layers:
        assert layer.momentum is not None
        total = float((layer.momentum.abs() * layer.keep).sum().item())
        means.append(total / max(layer.active, 1))
    return share_out(sum(dropped), means, [layer.capacity for layer in layers])


def _by_survivors(layers: Sequence[MaskedLayer], dropped: Sequence[int]) -> list[int]:
    """DSR: in proportion to the weights that are still active."""
    active = [float(layer.active) for layer in layers]
    return share_out(sum(dropped), active, [layer.capacity for layer in layers])


DROPS: dict[str, DropRule] = {
    "none": _per_layer(_none),
    "magnitude": _per_layer(_magnitude),
    "signed": _per_layer(_signed),
    "random": _per_layer(_random),
    "global-magnitude": _global_magnitude,
    "unselected": _per_layer(_unselected),
}
GROWS: dict[str, GrowRule] = {
    "none": GrowRule(lambda layer, count: torch.zeros_like(layer.keep), rests=False),
    "random": GrowRule(by_score(_draw)),
    "gradient": GrowRule(by_score(_gradient), frozenset({"gradient"})),
    "momentum": GrowRule(by_score(_momentum), frozenset({"momentum"})),
    # Soft filter pruning sets its filters to zero for good only then.
    "selected": GrowRule(_selected, rests=False),
}
SHARES: dict[str, ShareRule] = {
    "layer": _same_layer,
    "momentum": _by_momentum,
    "survivors": _by_survivors,
}


def check_rules(policy: Policy) -> None:
    """Raise UnknownNameError if the policy names a rule that is not known."""
    tables: tuple[tuple[str, str, Mapping[str, object]], ...] = (
        ("drop rule", policy.drop, DROPS),
        ("grow rule", policy.grow, GROWS),
        ("grow share", policy.grow_share, SHARES),
    )
    for kind, name, table in tables:
        if name not in table:
            raise UnknownNameError(kind, name, table)


def needs(policy: Policy) -> frozenset[str]:
    """Of "gradient" and "momentum", what an update by this policy reads."""
    shares = frozenset({"momentum"}) if policy.grow_share == "momentum" else frozenset()
    return GROWS[policy.grow].needs | shares


def stand_alone(policy: Policy) -> bool:
    """Whether an update by this policy does to each layer what it would do to that layer alone."""
    return policy.grow_share == "layer" and DROPS[policy.drop] in _ALONE


def update(
    policy: Policy, layers: Sequence[MaskedLayer], fraction: float, memory: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(new mask, what was dropped) of each layer.

    Args:
        policy: whose drop, grow and grow_share rules are followed.
        layers: that share a budget.
        fraction: of active weights to drop.
        memory: float64 [1], zero at first; the drop rule may write it.
    """
    dropped = DROPS[policy.drop](layers, fraction, memory)
    if policy.grow_share == "layer":  # a dense layer has nowhere else to grow: it stays as it is
        dropped = [
            mask & (not layer.target.is_dense) for layer, mask in zip(layers, dropped, strict=True)
        ]
    left = [
        replace(layer, keep=layer.keep & ~mask) for layer, mask in zip(layers, dropped, strict=True)
    ]
    counts = SHARES[policy.grow_share](left, [int(mask.sum().item()) for mask in dropped])
    grown = [
        GROWS[policy.grow].choose(layer, count) for layer, count in zip(left, counts, strict=True)
    ]
    return [(layer.keep | new, mask) for layer, new, mask in zip(left, grown, dropped, strict=True)]
