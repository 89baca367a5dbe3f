"""Filters and channels that do nothing leave a compiled model: a truly smaller network of it.

A channel is needed where a filter that stays reads it, unless its value is one everywhere and can
go into a bias. Convolutions that pad see such a constant end at the border: one channel stands for
all of them there. See `swatfx.exporting.channels` for what holds channels together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from swatfx.arguments import COUNT, INPUTS, checked
from swatfx.compiled import unwrap
from swatfx.errors import ExportError
from swatfx.exporting.channels import (
    Channels,
    Layer,
    args_of,
    aten,
    attribute,
    shape_of,
    split_dim,
)
from swatfx.exporting.names import rename_nodes
from swatfx.exporting.needed import Needed
from swatfx.exporting.plain import inference_module
from swatfx.exporting.program import Example, exported
from swatfx.exporting.rebuilding import drop_guards, rebuilt
from swatfx.exporting.tracking import VIEWS_WITH_SIZES, Tracker
from swatfx.pipeline import TRACING
from swatfx.tables import Table


@dataclass(frozen=True)
class ShrunkLayer:
    """What became of one convolution or linear layer.

    Attributes:
        name: path of its module.
        filters: before and after.
        inputs: channels that it reads, before and after.
        stays: why filters whose weights are all zero were not removed -> how many.
    """

    name: str
    filters: tuple[int, int]
    inputs: tuple[int, int]
    stays: Mapping[str, int]


@dataclass(frozen=True)
class Shrunk:
    """A smaller network, and what was removed; `print` shows a table.

    Attributes:
        module: plain PyTorch, for evaluation; it takes what the compiled model takes.
        layers: in graph order.
        parameters: how many numbers the network has, before and after.
    """

    module: fx.GraphModule
    layers: tuple[ShrunkLayer, ...]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        titles = ("layer", "filters", "inputs", "empty filters that stay")
        rows = [
            (one.name, _change(one.filters), _change(one.inputs), _reasons(one.stays))
            for one in self.layers
        ]
        last = ("all parameters", _change(self.parameters), "", "")
        return Table(titles, (*rows, last)).to_text()


def _change(numbers: tuple[int, int]) -> str:
    before, after = numbers
    return str(before) if before == after else f"{before} -> {after}"


def _reasons(stays: Mapping[str, int]) -> str:
    return "; ".join(f"{count}: {why}" for why, count in stays.items())


@checked(example_inputs=INPUTS, multiple=COUNT)
def shrink(
    gm: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    *,
    dynamic_shapes: Any = None,
    multiple: int = 1,
) -> Shrunk:
    """A smaller network that computes what `gm.eval()` computes after `swatfx.refresh(gm)`.

    Filters and input channels that selectors such as `filter`, `filter-l2`, `channel` and
    `input-channel` left empty are removed, and with them what only they needed: what norms, sums,
    concatenations, flattening, depthwise and grouped convolutions know of them. Where another
    branch needs a channel it stays, and the result says why. `gm` is not changed.

    Args:
        gm: a compiled model.
        example_inputs: positional inputs, or a dict of inputs by name.
        dynamic_shapes: as of `swatfx.export`.
        multiple: of how many filters each layer keeps one; others' kernels like 8 or 16.

    Raises:
        ExportError: torch.export cannot follow the model.
    """
    if example_inputs is None:
        raise ExportError("shrinking wants example inputs", remedy="swatfx.shrink(gm, (x,))")
    with TRACING:
        example = Example.of(example_inputs, dynamic_shapes)
        return shrunk(inference_module(unwrap(gm)), example, multiple)


def shrunk(module: nn.Module, example: Example, multiple: int = 1) -> Shrunk:
    """The same of a plain module in evaluation mode."""
    program = exported(module, example).run_decompositions({})
    found = program.module()
    assert isinstance(found, fx.GraphModule)
    _tidy(found)
    values = [attribute(found, n) for n in found.graph.nodes if n.op == "get_attr"]
    before = sum(value.numel() for value in values if value is not None)
    needed = Needed(Tracker(found).run(), multiple)
    told = tuple(_told(layer, needed) for layer in needed.tracked.layers)
    rename_nodes(found.graph, {})
    smaller = _Writer(found, needed).write()
    return Shrunk(smaller, told, (before, sum(p.numel() for p in smaller.state_dict().values())))


def _told(layer: Layer, needed: Needed) -> ShrunkLayer:
    """What becomes of a layer."""
    out, inputs = needed.kept(layer.out), needed.inputs(layer)
    empty = (layer.weight.flatten(1) == 0).all(1).cpu() & out
    stays = Counter(needed.why(i) for i in layer.out.ids[empty].tolist())
    filters, read = (len(out), int(out.sum())), (len(inputs), int(inputs.sum()))
    return ShrunkLayer(layer.name, filters, read, dict(stays))


def _tidy(gm: fx.GraphModule) -> None:
    """Batch norms and splits in one form each, no guards, and nothing that nobody reads."""
    drop_guards(gm)
    graph = gm.graph
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is aten._native_batch_norm_legit_no_training.default:
                x, weight, bias, mean, variance, momentum, eps = args_of(node)
                args = (x, weight, bias, mean, variance, False, momentum, eps, False)
                plain = graph.call_function(aten.batch_norm.default, args)
                for user in list(node.users):
                    plain.meta = dict(user.meta)
                    user.replace_all_uses_with(plain)
                    graph.erase_node(user)
                graph.erase_node(node)
            elif node.target is aten.split.Tensor:
                dim, size = split_dim(node), args_of(node)[1]
                whole = shape_of(args_of(node)[0])[dim]
                if isinstance(whole, int) and isinstance(size, int):
                    sizes = [min(size, whole - at) for at in range(0, whole, size)]
                    node.target = aten.split_with_sizes.default
                    node.args = (args_of(node)[0], sizes, dim)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


class _Writer:
    """Writes the smaller network."""

    def __init__(self, gm: fx.GraphModule, needed: Needed) -> None:
        self.gm = gm
        self.needed = needed
        self.of = needed.tracked.of
        self.smaller: dict[fx.Node, Tensor] = {}

    def write(self) -> fx.GraphModule:
        """A module of its own, of what is still read."""
        layers = {layer.node: layer for layer in self.needed.tracked.layers}
        for node in list(self.gm.graph.nodes):
            if node in layers:
                self._write_layer(layers[node])
            elif node in self.of:
                self._write_sizes(node, self.of[node])
                self._write_constants(node, self.of[node])
        for node in self.gm.graph.nodes:
            node.meta.pop("val", None)  # shapes are others
        for node in reversed(list(self.gm.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.gm.graph.erase_node(node)
        return rebuilt(self.gm, self.smaller)

    def _write_layer(self, layer: Layer) -> None:
        needed, node = self.needed, layer.node
        out, inputs, groups = needed.kept(layer.out), needed.inputs(layer), needed.groups(layer)
        if bool(out.all()) and bool(inputs.all()):
            return
        weight = layer.weight.clone()
        bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.clone()
        if layer.source is not None:
            gone = layer.source.known & ~inputs
            self._absorb(layer, weight, bias, gone)
        per_group = zip(
            *(each.view(layer.groups, -1) for each in (out, inputs)),
            *(each.view(layer.groups, -1, *each.shape[1:]) for each in (weight, bias)),
            groups.tolist(),
            strict=True,
        )
        weights, biases = [], []
        for some, read, w, b, stays in per_group:
            if stays:
                weights.append(w[some.to(w.device)][:, read.to(w.device)])
                biases.append(b[some.to(b.device)])
        args = [*args_of(node), *[None] * (3 - len(args_of(node)))]
        args[1] = self._tensor(node, args[1], torch.cat(weights))
        if layer.bias is not None or bool(bias.any()):
            args[2] = self._tensor(node, args[2], torch.cat(biases), f"{layer.name}.bias")
        if layer.groups > 1:
            args[6] = int(groups.sum())
        node.args = tuple(args)

    def _absorb(self, layer: Layer, weight: Tensor, bias: Tensor, gone: Tensor) -> None:
        """Let bias, or one channel, stand for the constants that are `gone`."""
        assert layer.source is not None
        value = layer.source.value
        wide = weight.double().cpu().view(layer.groups, -1, *weight.shape[1:])
        constant = (value * (gone & layer.absorbed)).view(layer.groups, 1, -1)
        kernel = wide.reshape(*wide.shape[:3], -1).sum(3)
        bias += (kernel * constant).sum(2).view(-1).to(bias)
        padded = gone & self.needed.padded_constants(layer)
        there = self.needed.padded_constants(layer) & self.needed.inputs(layer)
        if bool(padded.any()) and bool(there.any()):
            chosen = int((value.abs() * there).argmax())
            shares = (value * padded / value[chosen]).view(-1, *[1] * (weight.dim() - 2))
            weight[:, chosen] += (wide[0] * shares).sum(1).to(weight)

    def _write_sizes(self, node: fx.Node, channels: Channels) -> None:
        """Numbers of channels that a call names."""
        args = list(args_of(node))
        if node.target in VIEWS_WITH_SIZES:
            sizes = list(args[1])
            if isinstance(sizes[channels.dim], int) and sizes[channels.dim] != -1:
                sizes[channels.dim] = int(self.needed.kept(channels).sum())
            args[1] = sizes
        elif node.target is aten.slice.Tensor and args[1] % len(shape_of(node)) == channels.dim:
            source = self.needed.kept(self.of[args[0]])
            total = len(source)
            start, end, _ = slice(*args[2:4]).indices(total)
            args[2:4] = [int(source[:start].sum()), int(source[:end].sum())]
        elif node.target is aten.split_with_sizes.default and split_dim(node) == channels.dim:
            pieces = self.needed.kept(channels).split(list(args[1]))
            args[1] = [int(piece.sum()) for piece in pieces]
        node.args = tuple(args)

    def _write_constants(self, node: fx.Node, channels: Channels) -> None:
        """Parameters that have an element a channel."""
        kept = self.needed.kept(channels)
        if bool(kept.all()):
            return
        by_channel = node.target in (aten.batch_norm.default, aten.prelu.default)
        for place, n in enumerate(args_of(node)):
            constant = attribute(self.gm, n)
            if constant is None:
                continue
            dim = 0 if by_channel else constant.dim() - len(shape_of(node)) + channels.dim
            if dim >= 0 and constant.dim() and constant.shape[dim] == len(kept) > 1:
                where = kept.nonzero()[:, 0].to(constant.device)
                node.update_arg(place, self._tensor(node, n, constant.index_select(dim, where)))

    def _tensor(self, user: fx.Node, old: Any, value: Tensor, path: str = "") -> fx.Node:
        """A node that reads `value`, under the name of what it takes the place of."""
        target = old.target if isinstance(old, fx.Node) else path
        with user.graph.inserting_before(user):
            node = user.graph.create_node("get_attr", target)
        self.smaller[node] = value
        return node
