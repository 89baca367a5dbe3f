"""What counts as a layer call: conv and linear nodes, their arguments in one normal form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.tracing.composites.padded import padded_conv
from passes.tracing.module_kinds import opaque_reason
from swatfx.compiled import evaluate, evaluation_mode, weight_chain
from swatfx.meta import LayerCall

# torch.conv2d and F.conv2d are one object; torch._C._nn.linear is F.linear.
_CONVS: dict[Any, tuple[str, int]] = {
    F.conv1d: ("conv1d", 1),
    F.conv2d: ("conv2d", 2),
    F.conv3d: ("conv3d", 3),
}
_TRANSPOSED: dict[Any, tuple[str, int]] = {
    F.conv_transpose1d: ("conv_transpose1d", 1),
    F.conv_transpose2d: ("conv_transpose2d", 2),
    F.conv_transpose3d: ("conv_transpose3d", 3),
}
_MODULES: dict[type[nn.Module], tuple[str, int]] = {
    nn.Conv1d: ("conv1d", 1),
    nn.Conv2d: ("conv2d", 2),
    nn.Conv3d: ("conv3d", 3),
    nn.Linear: ("linear", 0),
    nn.ConvTranspose1d: ("conv_transpose1d", 1),
    nn.ConvTranspose2d: ("conv_transpose2d", 2),
    nn.ConvTranspose3d: ("conv_transpose3d", 3),
}


@dataclass(frozen=True)
class Site:
    """One layer call in a graph.

    Attributes:
        kind: as in `LayerPlan.kind`.
        spatial: number of spatial dimensions; 0 for linear layers.
        input: the node that is the input activation.
        weight: path of the weight in the graph's module, or the node that computes it.
        bias: path, node or None.
        value: the weight tensor as it is now; None if it depends on the graph's inputs.
        options: stride, padding, dilation, groups as given, and the padding mode.
    """

    kind: str
    spatial: int
    input: fx.Node
    weight: str | fx.Node
    bias: str | fx.Node | None
    value: Tensor | None
    options: tuple[Any, Any, Any, Any, str] = (1, 0, 1, 1, "zeros")

    @property
    def is_transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return self.kind.startswith("conv_transpose")


def find_site(gm: fx.GraphModule, node: fx.Node) -> Site | None:
    """The layer call that `node` is, or None."""
    if node.op == "call_module":
        return _module_site(gm, node)
    if node.op == "call_function":
        return _function_site(gm, node)
    return None


def _module_site(gm: fx.GraphModule, node: fx.Node) -> Site | None:
    module = gm.get_submodule(str(node.target))
    found = next(
        (about for kind_of, about in _MODULES.items() if isinstance(module, kind_of)), None
    )
    if found is None:
        return None
    kind, spatial = found
    given = [*node.args, *node.kwargs.values()]
    if not given or not isinstance(given[0], fx.Node):
        return None
    path = str(node.target)
    bias = f"{path}.bias" if getattr(module, "bias", None) is not None else None
    if opaque_reason(module):
        value: Tensor | None = module._parameters.get(
            "weight"
        )  # a hook may set it: do not run anything
    else:
        value = _weight_of(module)
    options: tuple[Any, Any, Any, Any, str] = (1, 0, 1, 1, "zeros")
    if spatial:
        conv: Any = module
        options = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return Site(kind, spatial, given[0], f"{path}.weight", bias, value, options)


def _weight_of(module: nn.Module) -> Tensor:
    with torch.no_grad(), evaluation_mode(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _function_site(gm: fx.GraphModule, node: fx.Node) -> Site | None:
    target = node.target
    if target is F.linear:
        names = ["input", "weight", "bias"]
        kind, spatial = "linear", 0
    elif target in _CONVS:
        names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
        kind, spatial = _CONVS[target]
    elif target is padded_conv:
        names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups", "mode"]
        kind, spatial = "", 0  # known from the weight
    elif target in _TRANSPOSED:
        names = ["input", "weight", "bias", "stride", "padding"]
        kind, spatial = _TRANSPOSED[target]
    else:
        return None
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    source, weight = given.get("input"), given.get("weight")
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    options = (
        given.get("stride", 1),
        given.get("padding", 0),
        given.get("dilation", 1),
        given.get("groups", 1),
        str(given.get("mode", "zeros")),
    )
    value = evaluate(gm, weight)
    if target is padded_conv:
        assert value is not None  # the module's own weight
        spatial = value.dim() - 2
        kind = f"conv{spatial}d"
    bias = given.get("bias")
    return Site(
        kind,
        spatial,
        source,
        str(weight.target) if weight.op == "get_attr" else weight,
        str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else bias,  # type: ignore[arg-type]
        value,
        options,
    )


def roots(node: fx.Node) -> list[str]:
    """Paths of the parameters and modules that a computed weight comes from."""
    return [str(n.target) for n in weight_chain(node) or {} if n.op in ("get_attr", "call_module")]


def expression(gm: fx.GraphModule, node: fx.Node) -> str:
    """A digest of what `node` computes: equal for equal computations on the same parameters."""
    known: dict[fx.Node, str] = {}
    chain = weight_chain(node)
    if chain is None:
        return f"{id(gm)} {node.name}"
    for n, is_cast in chain.items():
        if is_cast:
            known[n] = known[n.all_input_nodes[0]]
            continue
        target: object = n.target
        if n.op in ("get_attr", "call_module"):
            target = gm
            for atom in str(n.target).split("."):
                target = getattr(target, atom)
            target = id(target)
        text = repr((n.op, str(target), fx.map_arg((n.args, n.kwargs), known.__getitem__)))
        known[n] = hashlib.sha256(text.encode()).hexdigest()
    return known[node]


def as_tuple(value: Any, length: int) -> tuple[int, ...] | None:
    """An int or a sequence of ints as a tuple of `length`; None if it is known only at run time."""
    values = (value,) * length if isinstance(value, int) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, int) for v in values):
        return None
    return tuple(values) * length if len(values) == 1 else tuple(values)


def normal_call(name: str, site: Site, kernel: tuple[int, ...]) -> LayerCall | None:
    """The arguments in normal form; None if some are known only at run time.

    String paddings become numbers, and whatever a convolution kernel cannot pad by itself (modes
    other than zeros, "same" with an even extent) becomes `pad`, to be applied before it.
    """
    if not site.spatial:
        return LayerCall(name)
    stride, padding, dilation, groups, mode = site.options
    strides = as_tuple(stride, site.spatial)
    dilations = as_tuple(dilation, site.spatial)
    if strides is None or dilations is None or not isinstance(groups, int):
        return None
    pad: tuple[int, ...] = ()
    if padding == "valid":
        paddings: tuple[int, ...] | None = (0,) * site.spatial
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        paddings = tuple(t // 2 for t in totals)
        if any(t % 2 for t in totals):
            pad = tuple(x for t in reversed(totals) for x in (0, t % 2))
    else:
        paddings = as_tuple(padding, site.spatial)
    if paddings is None:
        return None
    if mode != "zeros":
        both = [(p, p + (pad[-1 - 2 * i] if pad else 0)) for i, p in enumerate(paddings)]
        pad = tuple(x for low, high in reversed(both) for x in (low, high))
        paddings = (0,) * site.spatial
        if not any(pad):
            pad = ()
    return LayerCall(
        name,
        strides,
        paddings,
        dilations,
        groups,
        pad,
        "constant" if mode == "zeros" else mode,
    )
