"""Weights as they are stored in an exported program: packed, and of fewer bits.

A packed weight is a bit an element and the values behind it; one of int8 has a scale a filter. The
program unpacks them itself, in plain ops, so that it runs wherever torch does; `load_program` does
that once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from swatfx.compiled import CONV, LINEAR
from swatfx.exporting.channels import args_of, aten, attribute
from swatfx.exporting.rebuilding import drop_guards
from swatfx.tensors import bits

VALUES = ("exact", "bf16", "int8")
_READERS = {
    CONV,
    LINEAR,
    aten.linear.default,
    *(
        op
        for conv in (aten.conv1d, aten.conv2d, aten.conv3d)
        for op in (conv.default, conv.padding)
    ),
}
PARTS = ("values", "bitmask", "scale")  # of a packed weight, below its name
_MOST = 127  # of int8


@dataclass(frozen=True)
class Stored:
    """A weight as it is stored.

    Attributes:
        values: of every element, or of those whose bit is set, in row-major order.
        bitmask: uint8 [ceil(n / 8)], as of `swatfx.tensors.bits`; None: every element is stored.
        scale: what each filter's values are multiplied by, broadcastable; None: nothing.
        shape: of the weight.
        dtype: of the weight.
    """

    values: Tensor
    bitmask: Tensor | None
    scale: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """On disk."""
        tensors = (self.values, self.bitmask, self.scale)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def stored(weight: Tensor, values: str, packed: bool, axis: int = 0) -> Stored:
    """The smallest way to store a weight (F, ...).

    Args:
        weight: any shape of at least one dimension.
        values: "exact", "bf16" (rounded) or "int8" (rounded to 127 steps a filter).
        packed: whether zeros may be left out.
        axis: of the filters.
    """
    kept, scale = weight.detach(), None
    if values == "int8" and kept.numel():
        rest = [d for d in range(kept.dim()) if d != axis % kept.dim()]
        largest = kept.abs().amax(rest, keepdim=True) if rest else kept.abs()
        scale = torch.where(largest > 0, largest / _MOST, 1)
        kept = (kept / scale).round().to(torch.int8)
    elif values == "bf16":
        kept = kept.to(torch.bfloat16)
    flat = kept.reshape(-1)
    shape = tuple(weight.shape)
    whole = Stored(flat.clone(), None, scale, shape, weight.dtype)
    if not packed:
        return whole
    keep = flat != 0
    small = Stored(flat[keep], bits.mask_to_bits(keep), scale, shape, weight.dtype)
    return small if small.bytes < whole.bytes else whole


class Unpack(nn.Module):
    """A stored weight; its forward, in plain ops, is the dense one."""

    values: Tensor
    bitmask: Tensor | None
    scale: Tensor | None

    def __init__(self, weight: Stored) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        self.register_buffer("values", weight.values)
        self.register_buffer("bitmask", weight.bitmask)
        self.register_buffer("scale", weight.scale)

    def forward(self) -> Tensor:
        """The weight, of its shape and dtype."""
        dense = self.values.to(self.dtype)
        if self.bitmask is not None:
            count = torch.Size(self.shape).numel()
            keep = bits.bits_to_mask.reference(self.bitmask, count)
            dense = dense.new_zeros(count).masked_scatter(keep, dense)
        dense = dense.view(self.shape)
        return dense if self.scale is None else dense * self.scale


def weights_read(gm: fx.GraphModule) -> Iterator[tuple[str, list[fx.Node], Tensor]]:
    """(path, nodes that read it, value) of each weight of a convolution or linear layer, where
    nothing else reads it.
    """
    read: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            read.setdefault(str(node.target), []).append(node)
    for path, nodes in read.items():
        value = attribute(gm, nodes[0])
        users = [(user, node) for node in nodes for user in node.users]
        plain = all(u.target in _READERS and args_of(u)[1] is n for u, n in users)
        if value is not None and value.is_floating_point() and plain:
            yield path, nodes, value


def pack_module(program: ExportedProgram, values: str, packed: bool) -> fx.GraphModule:
    """The program's module, with its weights stored so."""
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    drop_guards(gm)
    for path, nodes, value in list(weights_read(gm)):
        weight = stored(value, values, packed)
        if weight.bitmask is None and weight.values.dtype == value.dtype:
            continue
        owner, _, name = path.rpartition(".")
        delattr(gm.get_submodule(owner), name)
        gm.get_submodule(owner).add_module(name, Unpack(weight))
        with gm.graph.inserting_before(nodes[0]):
            unpacked = gm.graph.call_module(path)
        for node in nodes:
            node.replace_all_uses_with(unpacked)
            gm.graph.erase_node(node)
    gm.recompile()
    return gm
