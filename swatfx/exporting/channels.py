"""Which channels of which tensors of an exported graph belong together, and which are constant.

A graph of plain aten ops without writes in place is walked once, in its order. A convolution or
linear layer makes new channels; what comes behind it hands them on (norms, activations, pools,
sums, concatenation, flattening, depthwise convolutions), so that a channel is removed from all of
these tensors or from none. Whatever is not known here pins the channels that it reads: they stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor.

    Attributes:
        dim: where they lie.
        ids: int64 [C], of the channel that each is.
        known: bool [C], whether it has one value everywhere.
        value: float64 [C], which, where it is known.
    """

    dim: int
    ids: Tensor
    known: Tensor
    value: Tensor

    def where(self, known: Tensor) -> Channels:
        """The same, of which fewer values are known."""
        known = self.known & known
        return replace(self, known=known, value=self.value * known)

    def moved(self, dim: int) -> Channels:
        """The same in another place."""
        return replace(self, dim=dim)

    def at(self, index: Any) -> Channels:
        """Some of them, or in another order."""
        return Channels(self.dim, self.ids[index], self.known[index], self.value[index])


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        node: the call.
        weight: (F, C / groups, *kernel).
        bias: (F,), or None.
        source: channels of its input; None: they have to stay.
        out: its own.
        groups: of the convolution.
        depthwise: whether its channels are those of its input.
        absorbed: bool [C]: a constant channel of the input that a bias can stand for.
    """

    node: fx.Node
    weight: Tensor
    bias: Tensor | None
    source: Channels | None
    out: Channels
    groups: int
    depthwise: bool
    absorbed: Tensor

    @property
    def name(self) -> str:
        """Of its module."""
        return owner(self.node.args[1])


def owner(weight: Any) -> str:
    """Path of the module that a parameter's node is read from."""
    return str(weight.target).rpartition(".")[0] or str(weight.target)


@dataclass
class Tracked:
    """What is known of a graph's channels.

    Attributes:
        layers: in graph order.
        of: channels by node; a node that is not in it has none.
        pins: (id, why it has to stay).
        pairs: ids that are the same channel.
        count: of ids.
    """

    layers: list[Layer] = field(default_factory=list)
    of: dict[fx.Node, Channels] = field(default_factory=dict)
    pins: list[tuple[int, str]] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0

    def new(self, known: Tensor, value: Tensor, dim: int) -> Channels:
        """Channels of their own."""
        ids = torch.arange(self.count, self.count + known.numel())
        self.count += known.numel()
        return Channels(dim, ids, known, value)

    def roots(self) -> Tensor:
        """int64 [count]: the same number for ids that are the same channel."""
        parent = list(range(self.count))

        def find(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for one, other in self.pairs:
            parent[find(one)] = find(other)
        return torch.tensor([find(i) for i in range(self.count)], dtype=torch.int64)


def attribute(root: torch.nn.Module, node: Any) -> Tensor | None:
    """The tensor that a node reads from the module, None if it is no such node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = root
    for atom in str(node.target).split("."):
        value = getattr(value, atom)
    return value.detach() if isinstance(value, Tensor) else None


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """A call's positional arguments."""
    return node.args


def shape_of(node: fx.Node) -> Sequence[Any]:
    """Of the node's tensor; sizes that vary are symbols."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def along(constant: Tensor, dim: int) -> Tensor | None:
    """A constant that varies along `dim` alone, counted from the end, as a vector or of one
    element; None if it varies elsewhere.
    """
    if constant.dim() < -dim:
        dim = -1 if constant.numel() == 1 else dim
    varies = [d for d in range(-constant.dim(), 0) if constant.shape[d] != 1 and d != dim]
    return None if varies else constant.reshape(-1)


def split_dim(node: fx.Node) -> int:
    """Along which a node splits its input."""
    source, _, dim = (*args_of(node), 0)[:3]
    return int(dim % len(shape_of(source)))
