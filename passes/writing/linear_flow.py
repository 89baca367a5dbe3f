"""Where sparse linear layers, and layer norms, may pass on the memory order in which they compute.

Reads nodes and modules. `turn` tells layers and their packs, by `between_linear` calls, and puts
leaves of ours in the place of functions that would copy. Runs after the flow of the convolutions'
layout was written into the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from passes.reading.memory_order import ELEMENTWISE, KEEPING, passing_on
from passes.writing.naming import rename
from passes.writing.saving_leaves import Leaves, replace_by_leaf
from swatfx.compiled import LayerNode, LayerNorm, LayerNormOf, SwatModule
from swatfx.ops.coded import LAYER_NORM, RULES
from swatfx.ops.layout import between_linear, laid_out
from swatfx.tensors.layouts import BATCH_INNERMOST, FEATURES_MAJOR, IMAGES_INNERMOST

if TYPE_CHECKING:
    from passes.reading.aliasing import Versions
    from passes.reading.saving_calls import Calls
    from passes.writing.layout_flow import LayoutFlow


class Turned(NamedTuple):
    """Tensors between linear layers that nobody else sees, and that meet each other.

    Attributes:
        makers: layers whose result elementwise functions alone read, for `readers` alone.
        readers: layers that read such results, mediately or not.
        between: calls of elementwise functions.
    """

    makers: list[LayerNode]
    readers: list[LayerNode]
    between: list[fx.Node]


def turned_layers(part: SwatModule, versions: Versions, layers: list[LayerNode]) -> list[Turned]:
    """What may lie in "features_major": tensors between linear layers, each with what it needs.

    Args:
        part: whose graph it is; nothing in it is changed.
        versions: of its tensors.
        layers: the linear layers that run sparse.
    """
    makers = {layer.node: layer for layer in layers}
    readers = {
        (layer.input, reader): layer
        for layer in layers
        for reader in (layer.node, layer.pack, layer.activation_state)
        if reader is not None and layer.weight is not layer.input
    }
    turned: list[Turned] = []
    known: set[fx.Node] = set()
    for start in layers:
        if start.node in known:
            continue
        seen, todo = {start.node}, [start.node]
        found: list[LayerNode] | None = []
        while todo and found is not None:
            node = todo.pop()
            for user in node.users:
                if (node, user) in readers:
                    found.append(readers[node, user])
                    continue
                operands = passing_on(part, user, ELEMENTWISE)
                if node not in operands or versions.is_foreign(user):
                    found = None
                    break
                todo += [n for n in (user, *operands) if n not in seen]
                seen.update((user, *operands))
            sources = node in makers or passing_on(part, node, ELEMENTWISE)
            found = found if sources else None
        if found:
            ends = {layer.node: layer for layer in found}
            between = [n for n in seen if n not in makers]
            turned.append(
                Turned([makers[n] for n in seen if n in makers], list(ends.values()), between)
            )
            known |= seen
    return turned


class Block(NamedTuple):
    """What sees channels last that come from convolutions and go back to them.

    Attributes:
        layers: linear layers.
        norm: a call that may be a layer norm, before them or alone.
    """

    layers: list[LayerNode]
    norm: fx.Node | None


def blocks_between_convolutions(
    flow: LayoutFlow, layers: list[LayerNode], turned: list[Turned]
) -> list[Block]:
    """Where all between two conversions may lie as convolutions do: (channel, y, x, image).

    Args:
        flow: that has run over the graph; nothing in it is changed.
        layers: the graph's linear layers that run sparse.
        turned: `turned_layers` of them.
    """
    ends = {one.readers[0]: one for one in turned if len(one.readers) == 1}
    known = {layer for one in turned for layer in (*one.makers, *one.readers)}
    found = []
    for last in layers:
        if (last in known and last not in ends) or not _is_put_back(flow, last.node):
            continue
        first = ends[last].makers if last in ends else [last]
        block = _block([*first, last] if last in ends else first, first)
        found += [] if block is None else [block]
    for node in flow.graph.nodes:
        only = next(iter(node.users)) if len(node.users) == 1 else None
        if _is_permuted(node, -1) and only is not None and _is_put_back(flow, only):
            found.append(Block([], only))
    return found


def _block(layers: list[LayerNode], first: list[LayerNode]) -> Block | None:
    """Of layers, the `first` of which read what a convolution made; None if they do not."""
    source, *others = {layer.input for layer in first}
    readers = {n for one in first for n in (one.node, one.pack, one.activation_state)}
    norm = None
    if others or set(source.users) - readers:
        return None
    if not _is_permuted(source, -1):
        norm, source = source, next(iter(source.all_input_nodes), source)
        if not _is_permuted(source, -1) or set(source.users) != {norm}:
            return None
    (origin, *_) = source.all_input_nodes
    told = origin.kwargs.get("layout") == BATCH_INNERMOST
    return Block(layers, norm) if told or _lays_out(origin) else None


def _lays_out(node: fx.Node) -> bool:
    return node.target is laid_out and str(node.args[1]) == BATCH_INNERMOST


def _is_put_back(flow: LayoutFlow, node: fx.Node) -> bool:
    """Whether `node` is read with channels second alone, and only by what the layout begins with.

    What keeps the convolutions' order may come between.
    """
    views = list(node.users)
    if len(views) != 1 or not _is_permuted(views[0], 1) or not views[0].users:
        return False
    todo = views
    while todo:
        made = todo.pop()
        for user in made.users:
            passes_on = made in passing_on(flow.part, user, KEEPING)
            if _lays_out(user) or (passes_on and user in flow.lies):
                continue
            if not passes_on or flow.versions.is_foreign(user):
                return False
            todo.append(user)
    return True


def _is_permuted(node: fx.Node, to: int) -> bool:
    """Whether `node` puts the second dimension last (`to` -1), or the last one second (1)."""
    if node.target not in ("permute", torch.permute) or not node.args:
        return False
    if not isinstance(node.args[0], fx.Node):
        return False
    dims: Any = node.args[1:] or (node.kwargs.get("dims"),)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    size = len(dims)
    if size < 3 or not all(type(d) is int and -size <= d < size for d in dims):
        return False
    wanted = (0, *range(2, size), 1) if to == -1 else (0, size - 1, *range(1, size - 1))
    return tuple(d % size for d in dims) == wanted


def turn(
    layers: list[LayerNode],
    turned: list[Turned],
    flow: LayoutFlow | None,
    calls: Calls,
    leaves: Leaves,
    prefix: str,
) -> None:
    """Let what lies between sparse linear layers alone lie as their kernels compute it.

    Between two convolutions that is as these do: nothing is converted. A layer whose input or
    gradient comes so keeps its packed input so as well: its weight gradient then reads both as they
    lie.

    Args:
        layers: a graph's linear layers that run sparse.
        turned: `turned_layers` of them.
        flow: of the convolutions' layout, written; None: no convolution runs sparse.
        calls: of the graph.
        leaves: of the model.
        prefix: path of the graph's part.
    """
    blocks = [] if flow is None else blocks_between_convolutions(flow, layers, turned)
    rewritten: list[tuple[fx.Node, str, Any]] = []  # with rule and arguments
    told: set[LayerNode] = set()
    for block in blocks:
        if block.norm is not None:
            found = calls.coded(block.norm)
            if found is not None and found[0] == LAYER_NORM:
                rewritten.append((block.norm, *found[:2]))
            elif not _is_leaf(calls.part, block.norm):
                continue
        told.update(block.layers)
        for layer in block.layers:
            _tell(layer, IMAGES_INNERMOST, makes=True)
    for one in turned:
        for layer in (*one.makers, *one.readers):
            if layer not in told:
                _tell(layer, FEATURES_MAJOR, makes=layer in one.makers)
        for node in one.between:
            found = calls.coded(node)
            if found is not None and F.gelu in RULES[found[0]].functions:
                rewritten.append((node, *found[:2]))
    # Torch's own are slow with features outermost.
    for node, rule, args in rewritten:
        replace_by_leaf(node, leaves.of_rule(rule, node, prefix), args)


def _is_leaf(part: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a layer norm that is a leaf of ours already."""
    if node.op != "call_module":
        return False
    return isinstance(part.get_submodule(str(node.target)), (LayerNorm, LayerNormOf))


def _tell(layer: LayerNode, layout: str, *, makes: bool) -> None:
    """Let a linear layer keep its input in `layout`, and where it `makes` so, return in it."""
    if makes:
        with layer.part.graph.inserting_before(layer.node):
            told = layer.part.graph.call_function(between_linear, (layer.input, layout))
        rename(told, f"{layer.node.name}_layout")
        layer.tell(layout=told)
    if layer.pack_module is not None:
        layer.pack_module.layout = layout
