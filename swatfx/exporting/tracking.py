"""Walks an exported graph, op by op, and notes what becomes of channels."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from swatfx.exporting.channels import (
    Channels,
    Layer,
    Tracked,
    along,
    args_of,
    aten,
    attribute,
    shape_of,
    split_dim,
)

_CONVS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_CONVS |= {aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3}
# Elementwise, though not all of them are tagged so.
_ELEMENTWISE = {
    aten.hardswish.default,
    aten.dropout.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.leaky_relu.default,
}
_COPIES = {aten.clone, aten.alias, aten.detach, aten.contiguous, aten._to_copy, aten.to}
# What a channel of one value leaves as it is, however large the others are.
_POOLS = {
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
}
_AVERAGES = {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default}
_MEANS = {aten.mean.dim, aten.amax.default, aten.amin.default}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
VIEWS_WITH_SIZES = {*_VIEWS, aten.expand.default}
_VIEWS |= {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints}


class Tracker:
    """Walks a graph, op by op."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.found = Tracked()
        self.visits: dict[Any, Callable[[fx.Node, Channels], Channels | None]] = {
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(_POOLS | _AVERAGES, self._pool),
            **dict.fromkeys(_MEANS, self._mean),
            **dict.fromkeys(_VIEWS, self._view),
            aten.batch_norm.default: self._norm,
            aten.prelu.default: self._prelu,
            aten.permute.default: self._permute,
            aten.transpose.int: self._transpose,
            aten.expand.default: self._expand,
            aten.pad.default: self._pad,
            aten.constant_pad_nd.default: self._pad,
            aten.cat.default: self._cat,
            aten.slice.Tensor: self._slice,
            # Its pieces are told apart where they are taken.
            aten.split_with_sizes.default: lambda node, source: source,
        }

    def run(self) -> Tracked:
        """What is known once all of the graph was seen."""
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            channels = self._visit(node)
            if channels is not None:
                self.found.of[node] = channels
        return self.found

    def _visit(self, node: fx.Node) -> Channels | None:
        target, of = node.target, self.found.of
        if target in _CONVS or target is aten.linear.default:
            return self._layer(node)
        sources = [of[n] for n in node.all_input_nodes if n in of]
        if not sources or target is aten.sym_size.int:
            return None
        if target is operator.getitem:
            return self._piece(node)
        visit = self.visits.get(target)
        if visit is None and torch.Tag.pointwise in getattr(target, "tags", ()):
            visit = self._elementwise
        channels = None if visit is None else visit(node, sources[0])
        if channels is None:
            self._pin(node)
        return channels

    def _pin(self, node: fx.Node) -> None:
        leaves = node.op == "output"
        for n in node.all_input_nodes:
            if n in self.found.of:
                why = "it leaves the network" if leaves else f"{_plain_name(node)} reads all of it"
                self._keep(self.found.of[n], why)

    def _keep(self, channels: Channels, why: str) -> None:
        self.found.pins += [(i, why) for i in channels.ids.tolist()]

    def _layer(self, node: fx.Node) -> Channels | None:
        args = [*args_of(node), *[None] * (7 - len(args_of(node)))]
        weight, bias = attribute(self.gm, args[1]), attribute(self.gm, args[2])
        spatial = _CONVS.get(node.target, 0)
        if weight is None or (bias is None and args[2] is not None) or node.kwargs:
            self._pin(node)
            return None
        source = self.found.of.get(args[0])
        rank = len(shape_of(args[0]))
        dim = rank - 1 - spatial
        if source is not None and source.dim != dim:
            self._pin(node)
            source = None
        groups = int(args[6] or 1) if spatial else 1
        inputs = weight.shape[1] * groups
        absorbed = torch.zeros(inputs, dtype=torch.bool)
        wide = weight.double().cpu()
        kernel = wide.reshape(*weight.shape[:2], -1).sum(-1)
        value = torch.zeros(weight.shape[0], dtype=torch.float64)
        if bias is not None:
            value += bias.double().cpu()
        used = (wide != 0).reshape(*weight.shape[:2], -1).any(-1)  # NaN counts
        if source is not None:
            pads = args[4] if spatial and args[4] is not None else 0
            padded = pads != "valid" and pads not in (0, [0] * spatial, [0])
            absorbed = source.known & (source.value == 0) if padded else source.known
            per_group = absorbed.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
            constant = (source.value * absorbed).view(groups, -1)
            value += (kernel * constant.repeat_interleave(weight.shape[0] // groups, 0)).sum(1)
            used &= ~per_group
        known = ~used.any(1)
        depthwise = groups > 1 and groups == inputs and source is not None
        if depthwise:
            assert source is not None
            ids = source.ids.repeat_interleave(weight.shape[0] // groups)
            out = Channels(dim, ids, known, value * known)
        else:
            out = self.found.new(known, value * known, dim)
        layer = Layer(node, weight, bias, source, out, groups, depthwise, absorbed)
        self._share(layer)
        self.found.layers.append(layer)
        return out

    def _share(self, layer: Layer) -> None:
        """Layers of one weight lose the same of it."""
        for other in self.found.layers:
            if args_of(other.node)[1].target == args_of(layer.node)[1].target:
                self._tied([other.out, layer.out])
                if other.source and layer.source:
                    self._tied([other.source, layer.source])
                for source in (other.source, layer.source):
                    if source and not (other.source and layer.source):
                        self._keep(source, f"{layer.name} reads another tensor, too")
                return

    def _norm(self, node: fx.Node, source: Channels) -> Channels | None:
        arrays = [attribute(self.gm, n) for n in args_of(node)[1:5]]
        scale, shift, mean, variance = (None if a is None else a.double().cpu() for a in arrays)
        if mean is None or variance is None or source.dim != 1 or args_of(node)[5]:
            return None
        value = (source.value - mean) / (variance + args_of(node)[7]).sqrt()
        known = source.known
        if scale is not None:
            value, known = value * scale, known | (scale == 0)
            value = torch.where(scale == 0, 0.0, value)
        value = value if shift is None else value + shift
        return Channels(source.dim, source.ids, known, value * known)

    def _prelu(self, node: fx.Node, source: Channels) -> Channels | None:
        slope = attribute(self.gm, args_of(node)[1])
        if slope is None or source.dim != 1:
            return None
        below = source.value * slope.double().cpu()
        return replace(source, value=torch.where(source.value > 0, source.value, below))

    def _pool(self, node: fx.Node, source: Channels) -> Channels | None:
        spatial = re.search(r"(\d)d", str(node.target))
        assert spatial is not None  # all of them say so
        if source.dim != len(shape_of(node)) - 1 - int(spatial[1]):
            return None
        if node.target in _AVERAGES and not _unpadded(node):  # with zeros, which count
            return source.where(source.value == 0)
        return source

    def _mean(self, node: fx.Node, source: Channels) -> Channels | None:
        rank = len(shape_of(args_of(node)[0]))
        given = args_of(node)[1]
        dims = {d % rank for d in ([given] if isinstance(given, int) else given or range(rank))}
        if source.dim in dims:
            return None
        keep = bool(args_of(node)[2]) if len(args_of(node)) > 2 else False
        return source.moved(source.dim - (0 if keep else sum(d < source.dim for d in dims)))

    def _view(self, node: fx.Node, source: Channels) -> Channels | None:
        if node.target in (aten.squeeze.dim, aten.squeeze.dims):
            rank, dims = len(shape_of(args_of(node)[0])), args_of(node)[1]
            dims = [dims] if isinstance(dims, int) else dims
            if source.dim in [d % rank for d in dims]:  # of which one may be left
                return None
        return _viewed(source, shape_of(args_of(node)[0]), shape_of(node))

    def _permute(self, node: fx.Node, source: Channels) -> Channels | None:
        rank = len(shape_of(node))
        order = [d % rank for d in args_of(node)[1]]
        return source.moved(order.index(source.dim))

    def _transpose(self, node: fx.Node, source: Channels) -> Channels | None:
        rank = len(shape_of(node))
        one, other = (d % rank for d in args_of(node)[1:3])
        swapped = {one: other, other: one}
        return source.moved(swapped.get(source.dim, source.dim))

    def _expand(self, node: fx.Node, source: Channels) -> Channels | None:
        dim = source.dim + len(shape_of(node)) - len(shape_of(args_of(node)[0]))
        same = shape_of(node)[dim] == source.ids.numel()
        return source.moved(dim) if same else None

    def _pad(self, node: fx.Node, source: Channels) -> Channels | None:
        rank = len(shape_of(node))
        if source.dim >= rank - len(args_of(node)[1]) // 2:
            return None
        said = [a for a in args_of(node)[2:] if a is not None]
        if said and said[0] in ("reflect", "replicate", "circular"):
            return source
        filled = float(said[-1]) if said and said[-1] != "constant" else 0.0
        return source.where(source.value == filled)

    def _cat(self, node: fx.Node, source: Channels) -> Channels | None:
        pieces = args_of(node)[0]
        dim = (args_of(node)[1] if len(args_of(node)) > 1 else 0) % len(shape_of(node))
        found = [self.found.of.get(n) for n in pieces]
        if any(c is None or c.dim != source.dim for c in found):
            return None
        facts = [c for c in found if c is not None]
        if dim != source.dim:
            return self._tied(facts).where(torch.zeros_like(facts[0].known))
        return Channels(
            dim,
            torch.cat([c.ids for c in facts]),
            torch.cat([c.known for c in facts]),
            torch.cat([c.value for c in facts]),
        )

    def _slice(self, node: fx.Node, source: Channels) -> Channels | None:
        rank = len(shape_of(node))
        given, usual = args_of(node)[1:], (0, None, None, 1)
        dim, start, end, step = given + usual[len(given) :]
        if dim % rank != source.dim:
            return source
        if step != 1 or not all(x is None or isinstance(x, int) for x in (start, end)):
            return None
        return source.at(slice(start, end))

    def _piece(self, node: fx.Node) -> Channels | None:
        pieces, index = args_of(node)
        whole = self.found.of.get(pieces)
        if whole is None or pieces.target is not aten.split_with_sizes.default:
            self._pin(node)
            return None
        sizes = args_of(pieces)[1]
        if split_dim(pieces) != whole.dim:
            return whole
        start = sum(sizes[:index])
        return whole.at(slice(start, start + sizes[index]))

    def _tied(self, facts: Sequence[Channels]) -> Channels:
        """The first of some whose channels are the same, which is noted."""
        for other in facts[1:]:
            self.found.pairs += zip(facts[0].ids.tolist(), other.ids.tolist(), strict=True)
        return facts[0]

    def _elementwise(self, node: fx.Node, source: Channels) -> Channels | None:
        rank = len(shape_of(node))
        places: dict[fx.Node, int] = {}
        for n in node.all_input_nodes:
            if n in self.found.of:
                places[n] = self.found.of[n].dim + rank - len(shape_of(n))
        count = max(self.found.of[n].ids.numel() for n in places)
        for n in [n for n in places if self.found.of[n].ids.numel() != count]:
            self._keep(self.found.of[n], f"{_plain_name(node)} spreads it over others")
            del places[n]
        dim = next(iter(places.values()))
        for n in node.all_input_nodes:
            here = shape_of(n)
            at = dim - rank + len(here)
            if n in places:
                if places[n] != dim:
                    return None
            elif attribute(self.gm, n) is None and at >= 0 and not _equal(here[at], 1):
                return None
        tied = self._tied([self.found.of[n] for n in places])
        known, value = self._values(node, dim - rank, places, count)
        exact = node.meta["val"].dtype.is_floating_point  # and nothing was cut off
        return Channels(dim, tied.ids, known & exact, value * known)

    def _values(
        self, node: fx.Node, dim: int, places: dict[fx.Node, int], count: int
    ) -> tuple[Tensor, Tensor]:
        """Which channels of an elementwise op are constant, and their values; `dim` is negative."""
        known = torch.ones(count, dtype=torch.bool)
        zeroed = torch.zeros(count, dtype=torch.bool)

        def vector(n: fx.Node) -> Tensor:
            nonlocal known, zeroed
            if n in places:
                channels = self.found.of[n]
                known = known & channels.known
                zeroed = zeroed | channels.known & (channels.value == 0)
                return channels.value
            constant = attribute(self.gm, n)
            if constant is not None:
                flat = along(constant, dim)
                if flat is not None:
                    return flat.double().cpu()
            known = known & False
            return torch.ones(count, dtype=torch.float64)

        given = args_of(node), dict(node.kwargs)
        args, kwargs = fx.map_arg(given, vector)
        target: Any = node.target
        if target.overloadpacket in _COPIES or target is aten.dropout.default:
            return known, args[0]
        try:
            value = torch.as_tensor(target(*args, **kwargs)).double().expand(count)
        except (RuntimeError, TypeError):  # an op that wants integers or flags
            return known & False, torch.zeros(count, dtype=torch.float64)
        if node.target is aten.mul.Tensor:
            value, known = torch.where(zeroed, 0.0, value), known | zeroed
        return known & value.isfinite(), torch.nan_to_num(value)


def _plain_name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return name.strip("_")


def _unpadded(node: fx.Node) -> bool:
    pads = args_of(node)[3] if len(args_of(node)) > 3 else 0
    counted = args_of(node)[5] if len(args_of(node)) > 5 else True
    return not counted or not any(pads if isinstance(pads, (list, tuple)) else [pads])


def _equal(one: Any, other: Any) -> bool:
    return bool(statically_known_true(one == other))


def _viewed(source: Channels, before: Sequence[Any], after: Sequence[Any]) -> Channels | None:
    """Channels behind a view: where their dimension stays, or is flattened with others."""
    old = [d for d in range(len(before)) if not _equal(before[d], 1) or d == source.dim]
    new = [d for d in range(len(after)) if not _equal(after[d], 1)]
    if source.ids.numel() == 1:
        return None
    while old and new and old[0] != source.dim and _equal(before[old[0]], after[new[0]]):
        old, new = old[1:], new[1:]
    while old and new and old[-1] != source.dim and _equal(before[old[-1]], after[new[-1]]):
        old, new = old[:-1], new[:-1]
    if source.dim not in old or len(new) != 1:
        return None
    sizes = [before[d] for d in old]
    if not all(isinstance(n, int) for n in sizes):
        return None
    places = torch.arange(torch.Size(sizes).numel()).view(sizes)
    which = torch.arange(source.ids.numel())
    shape = [-1 if d == source.dim else 1 for d in old]
    return source.at(which.view(shape).expand_as(places).reshape(-1)).moved(new[0])
