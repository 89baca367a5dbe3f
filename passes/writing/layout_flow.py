"""How the layout of sparse convolutions flows through a graph.

Reads nodes and modules; inserts `laid_out` calls, which copy a tensor into a layout where it is not
in it yet. A tensor is converted where it is made, once for all its readers that want it, unless
somebody writes into it in between: then its readers convert it themselves. What reads strides
(views) or is somebody else's Python (eager modules, who gets the graph's outputs) goes on to see
row-major order.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.reading.aliasing import Versions
from passes.reading.memory_order import KEEPING, passing_on
from passes.writing.naming import rename
from swatfx.compiled import CONV, LINEAR, LayerNode, SwatModule
from swatfx.ops.layout import laid_out
from swatfx.tensors.layouts import BATCH_INNERMOST, ROW_MAJOR

# Whose results are row-major whatever the operands are.
_ROW_MAJOR_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.Embedding)
_ROW_MAJOR = (
    "contiguous",
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    torch.matmul,
    operator.matmul,
    torch.bmm,
    CONV,
    LINEAR,
)
# Whose results share memory with their operand in some memory orders and not in others.
_SHARES_BY_ORDER = {
    "as_strided", "channel_shuffle", "contiguous", "flatten", "pixel_shuffle", "pixel_unshuffle",
    "ravel", "reshape", "reshape_as", "resize_", "resize_as_", "unflatten", "view", "view_as",
    "view_as_complex",
}  # fmt: skip
_SHARING_MODULES = (
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
)
# What a layout may make fail, and what it may make differ.
_VIEWS = ("view", "view_as", torch.view_as_complex)
_STRIDES = (
    "as_strided",
    "stride",
    "is_contiguous",
    "storage_offset",
    "data_ptr",
    "storage",
    "untyped_storage",
    torch.as_strided,
)


class LayoutFlow:
    """The layout in one graph, from the sparse convolutions `layers` on.

    All is decided on the graph as it was found, since positions and aliases are of that.
    """

    def __init__(self, part: SwatModule, versions: Versions, layers: list[LayerNode]) -> None:
        self.part = part
        self.graph = part.graph
        self.layers = layers
        self.sparse = dict.fromkeys(layer.node for layer in layers)
        self.versions = versions
        self.nodes = list(self.graph.nodes)
        self.operands = {node: self._operands(node) for node in self.nodes}
        self.wanted = self._wanted()
        self.lies, self.derived = self._flow()

    def run(self) -> None:
        """Insert the conversions."""
        back = [(source, node) for node in self.nodes for source in self._foreign_inputs(node)]
        for source, readers in self.wanted.items():
            self._convert(source, readers)
        for source, reader in back:
            self._convert_back(source, reader)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The inputs whose memory order `node` passes on; empty for all that goes its own way."""
        nodes = passing_on(self.part, node, KEEPING)
        return nodes if all(self._may_copy(n, node) for n in nodes) else []

    def _may_copy(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether `node` may work on a copy of `source`.

        Where its result shares memory with it, nobody may write into that and another see it.
        """
        return not (self.versions.shares(source, node) and self.versions.is_contested(source))

    def unsafe(self) -> list[LayerNode]:
        """The sparse convolutions whose layout would change which tensors see a write.

        A view or a copy, that is a matter of memory order in `reshape` and its like. It makes a
        difference where somebody writes into either of the two later. Python that may write gets a
        copy as well: none may know what it gets by another name. And what asks a part of a tensor
        for its strides shall hear eager's.
        """
        last = self.nodes[-1]
        todo = [
            node
            for node in self.nodes
            if self._asks_a_view(node)
            or self._writes_elsewhere(node)
            or (
                self._shares_by_order(node)
                and any(n in self.derived for n in node.all_input_nodes)
                and self.versions.of(node, node) != self.versions.of(node, last)
            )
        ]
        if not todo:
            return []
        above = set(todo)
        while todo:
            sources = todo.pop().all_input_nodes
            fresh = [n for n in sources if n in self.derived and n not in above]
            above.update(fresh)
            todo += [n for n in fresh if n not in self.sparse]
        # What lies so for the sake of convolutions behind it has none above.
        return [layer for layer in self.layers if layer.node in above] or self.layers

    @staticmethod
    def _first(node: fx.Node) -> fx.Node | None:
        """The operand, by position or by name."""
        first = node.args[0] if node.args else node.kwargs.get("input")
        return first if isinstance(first, fx.Node) else None

    def _asks_a_view(self, node: fx.Node) -> bool:
        """Whether `node` reads strides of a part of a tensor in another order: no copy has them."""
        first = self._first(node) if node.target in _STRIDES else None
        return first is not None and first in self.derived and first not in self.lies

    def _writes_elsewhere(self, node: fx.Node) -> bool:
        """Whether a write into the copy that `node` gets is missed by another name of the tensor.

        Its later readers read the copy, and a caller gets both that or neither.
        """
        return self._is_foreign(node) and any(
            self._foreign_readers(n)[0] is node and self.versions.is_known_otherwise(n, node)
            for n in self._foreign_inputs(node)
        )

    def _foreign_readers(self, source: fx.Node) -> list[fx.Node]:
        readers = list(filter(self._is_foreign, source.users))
        return sorted(readers, key=self.nodes.index) if readers[1:] else readers

    def _shares_by_order(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.part.get_submodule(str(node.target)), _SHARING_MODULES)
        if node.op not in ("call_method", "call_function"):
            return False
        name = getattr(node.target, "__name__", str(node.target))
        return name in _SHARES_BY_ORDER or "memory_format" in node.kwargs

    # ---- Into the layout ----

    def _wanted(self) -> dict[fx.Node, list[fx.Node]]:
        """What comes in another layout -> those of its readers that want it converted."""
        found: dict[fx.Node, list[fx.Node]] = {}
        passed: set[fx.Node] = set()
        stack: list[tuple[fx.Node, fx.Node]] = []
        for layer in self.layers:
            readers = (layer.node, layer.pack, layer.activation_state)
            stack += [(layer.input, reader) for reader in readers if reader is not None]
        while stack:
            source, reader = stack.pop()
            if source in self.sparse:
                continue
            if not self.operands[source]:
                if self._sees(source, reader):
                    found.setdefault(source, []).append(reader)
            elif source not in passed:
                passed.add(source)
                stack += [(operand, source) for operand in self.operands[source]]
        return {node: found[node] for node in self.nodes if node in found}

    def _sees(self, source: fx.Node, reader: fx.Node) -> bool:
        """Whether `reader` reads `source` as it was made."""
        return self.versions.of(source, reader) == self.versions.of(source, source.next)

    def _convert(self, source: fx.Node, readers: list[fx.Node]) -> None:
        after = source
        if source.op == "placeholder":
            after = [n for n in self.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(after):
            new = self._call(source, BATCH_INNERMOST)
        for reader in readers:
            reader.replace_input_with(source, new)

    def _call(self, source: fx.Node, layout: str) -> fx.Node:
        new = self.graph.call_function(laid_out, (source, layout))
        rename(new, f"{source.name}_laid_out")
        return new

    # ---- And out of it ----

    def _flow(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """(nodes in the layout, nodes whose strides may stem from one that is)."""
        lies, derived = set(self.sparse), set(self.sparse)
        for node in self.nodes:
            operands = self.operands[node]
            if any(n in lies or node in self.wanted.get(n, ()) for n in operands):
                lies.add(node)
                derived.add(node)
            elif any(n in derived for n in node.all_input_nodes) and not self._is_settled(node):
                derived.add(node)
        return lies, derived

    def _is_settled(self, node: fx.Node) -> bool:
        """Whether the result of `node` is row-major, whatever its inputs are."""
        if node.op == "call_module":
            module = self.part.get_submodule(str(node.target))
            return isinstance(module, _ROW_MAJOR_MODULES) or self._is_foreign(node)
        return node.target in _ROW_MAJOR or self._is_foreign(node)

    def _is_foreign(self, node: fx.Node) -> bool:
        """Whether somebody else's Python gets the inputs of `node`: it may ask for strides."""
        return node.op == "output" or self.versions.is_foreign(node)

    def _foreign_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that `node` has to see in row-major order."""
        if self._is_foreign(node):
            return [n for n in node.all_input_nodes if n in self.derived]
        first = self._first(node)
        if first is None:
            return []
        if node.target in _VIEWS and first in self.derived:
            return [first]  # nobody writes through it later: `unsafe`
        return [first] if node.target in _STRIDES and first in self.lies else []

    def _convert_back(self, source: fx.Node, reader: fx.Node) -> None:
        with self.graph.inserting_before(reader):
            new = self._call(source, ROW_MAJOR)
        later = [reader]
        if self.versions.is_foreign(reader):  # it may write into what it gets: all see that
            old = [n for n in source.users if n in self.operands]
            later += [n for n in old if self.versions.is_before(reader, n)]
        for node in later:
            node.replace_input_with(source, new)
