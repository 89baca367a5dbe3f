"""Decide which layers run sparse kernels, and in what memory order the graph keeps its tensors.

Reads LayerPlans, LayerCalls and the weights; writes `LayerPlan.kernels`, gives each linear layer
that runs sparse the argument `sparse_kernels`, and each convolution `layout="batch_innermost"`. Its
result and its input gradient lie so then, and what follows (norms, ReLUs, additions, pools) keeps
the order that it finds; a tensor that comes in another order is converted once, where it is made
(`layout_flow`). Linear layers pass on the order in which they compute (`linear_flow`). Values do
not change beyond rounding. A second run finds nothing left and changes nothing.

A model on the meta device has no device of its own yet: it is taken for one of this machine's CPU.

A layer can run sparse where all three of its products are sparse (the weight gradient by a packed
activation, or at active weights alone). Which of those that can do is the cheapest choice for the
whole graph, conversions counted (`predict_kernels`), where `compile` was given example inputs.
Without shapes, a rule: those whose densities are at most `MOST_DENSE`, above which dense kernels on
masked weights were measured to be as fast; and where most convolutions are too dense or of the
wrong kind, none. The rule also chooses where densities move: it sees those of now, and
`follow_densities` chooses again as they cross the rule's, with a margin: what runs sparse goes on
so up to `STAYS_SPARSE`. So the choice depends on the one before, which the buffers `sparse` of the
layers' states remember, in checkpoints too.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from passes.predict_kernels import WOULD_TAKE, Choice, Prediction
from passes.reading.aliasing import Versions
from passes.reading.saving_calls import Calls
from passes.writing.layout_flow import LayoutFlow
from passes.writing.linear_flow import Turned, turn, turned_layers
from passes.writing.saving_leaves import Leaves
from swatfx import kernels, masks
from swatfx.compiled import (
    LayerNode,
    Pack,
    SwatModule,
    all_parts,
    nodes_of,
    relative,
    sparse_nodes,
)
from swatfx.errors import InputError
from swatfx.kernels.library import ELEMENTS
from swatfx.kernels.problems import MAX_TAPS
from swatfx.meta import LayerCall, LayerPlan
from swatfx.ops.layout import between_linear, laid_out
from swatfx.passing import Context, PassResult
from swatfx.policy import Policy
from swatfx.tensors.layouts import BATCH_INNERMOST, FEATURES_OUTERMOST, ROW_MAJOR

MOST_DENSE = 0.3
STAYS_SPARSE = 0.36  # of what runs sparse already: a density that wavers shall not move it about
LEAST_FILTERS = 16  # of a group, unless it is depthwise: below, hardly a vector is filled
SPARSE = "sparse"
_RESHAPED = "what it makes has another name, and is written in place later"
_CHOSEN = ("layout", "sparse_kernels")  # keyword arguments of ops
# Layouts of packs -> as they were before.
_TOLD = {BATCH_INNERMOST: "", **dict.fromkeys(FEATURES_OUTERMOST, ROW_MAJOR)}
# Methods by the names that their papers give them, for people.
_NAMES = {
    name.lower(): name for name in ("RigL", "SET", "SNFS", "DSR", "DST", "SSC", "SAW", "meProp")
}


def choose_kernels(gm: SwatModule, ctx: Context) -> PassResult:
    """Choose for every layer, in the root graph and in every part."""
    todo = [layer for layer in sparse_nodes(gm) if not layer.plan.kernels]
    if not todo:
        return PassResult(gm, False)
    versions = _Known(gm)
    reasons, prediction = _reasons(gm, todo, None, versions)
    gm.swat.predicted = prediction
    for layer, reason in reasons.items():
        layer.replan(kernels=_told(reason))
        layer.layer_state.note_kernels(reason is None)
        if reason is None and not layer.is_conv:
            layer.tell(sparse_kernels=True)
    for prefix, part in all_parts(gm):
        flow = _lay_out(part, prefix, versions)
        sparse = [n for n in nodes_of(part, prefix) if not n.is_conv and n.plan.kernels == SPARSE]
        if sparse:
            turned = turned_layers(part, versions.of(part, prefix), sparse)
            calls = Calls(part, versions.eager(prefix))
            turn(sparse, turned, flow, calls, Leaves(gm), prefix)
        part.recompile()
    # A layer that several graphs call, or one calls twice, is one layer; all its calls run alike.
    layers = {layer.plan.name: reason for layer, reason in reasons.items()}
    count = sum(reason is None for reason in layers.values())
    note = f"{count} of {len(layers)} layers run sparse kernels"
    why = Counter(
        f"{WOULD_TAKE} longer at this input" if reason.startswith(WOULD_TAKE) else reason
        for reason in layers.values()
        if reason is not None
    )
    dense = [f"dense: {reason} ({times} of them)" for reason, times in why.most_common()]
    return PassResult(gm, True, (note, *dense, *filter(None, [prediction])))


class _Known:
    """Versions of the graphs of a model, found once each."""

    def __init__(self, gm: SwatModule) -> None:
        self._eager = gm.eager
        self._found: dict[SwatModule, Versions] = {}

    def of(self, part: SwatModule, prefix: str) -> Versions:
        """Those of a part, as its graph was when they were first asked for."""
        if part not in self._found:
            self._found[part] = Versions(part, self.eager(prefix))
        return self._found[part]

    def eager(self, prefix: str) -> dict[str, str]:
        """Modules below a part that stay eager, and why."""
        return {relative(prefix, path): reason for path, reason in self._eager.items()}


def kernels_on(gm: SwatModule, device: str) -> dict[str, str]:
    """Layer -> what `LayerPlan.kernels` would be, were the model on `device`. Changes nothing."""
    found: dict[str, str] = {}
    layers = list(sparse_nodes(gm))
    reasons, _ = _reasons(gm, layers, torch.device(device), _Known(gm))
    for layer, reason in reasons.items():
        found.setdefault(layer.plan.name, _told(reason))
    return found


def _told(reason: str | None) -> str:
    return SPARSE if reason is None else f"dense: {reason}"


def _reasons(
    gm: SwatModule, layers: list[LayerNode], device: torch.device | None, versions: _Known
) -> tuple[dict[LayerNode, str | None], str]:
    """(why each layer runs dense, or None; what that is predicted to take, for people).

    `device` stands in for the model's own.
    """
    asked = gm.swat.options.kernels
    fixed = {layer: _why_never(layer, asked, device) for layer in layers}
    convolutions = [layer for layer in layers if layer.is_conv]
    prediction, told = None, ""
    moves = gm.swat.policy.moves_densities
    if asked == "auto" and None in fixed.values() and gm.swat.example is not None and not moves:
        able = [layer for layer in convolutions if fixed[layer] is None]
        try:
            linear = [n for n in layers if fixed[n] is None and not n.is_conv]
            turned = _turned(gm, linear, versions)
            prediction = Prediction(gm, layers, _flows(gm, able, versions), turned)
        except InputError as error:  # shapes that depend on values, say
            told = f"kernels are chosen by densities alone: {error.problem}"
    if prediction is not None:
        fixed = {layer: reason or _too_few(layer) for layer, reason in fixed.items()}
    while True:
        choice = None if prediction is None else prediction.choose(fixed)
        reasons = _chosen(fixed, asked, prediction, choice)
        _agree(reasons, convolutions)
        sparse = [layer for layer in convolutions if reasons[layer] is None]
        flows = _flows(gm, sparse, versions)
        unsafe = {layer.plan.name for _, flow in flows for layer in flow.unsafe()}
        if not unsafe:
            break
        for layer in convolutions:  # all calls of a layer run alike
            if layer.plan.name in unsafe:
                fixed[layer] = fixed[layer] or _RESHAPED
    if prediction is not None and choice is not None:
        return reasons, choice.told(prediction)
    least = 0.4 if any(layer.layer_state.ran_sparse for layer in convolutions) else 0.5
    if asked == "auto" and len(sparse) < least * len(convolutions):
        for layer in sparse:
            reasons[layer] = "most convolutions run dense"
    return reasons, told


def _chosen(
    fixed: dict[LayerNode, str | None],
    asked: str,
    prediction: Prediction | None,
    choice: Choice | None,
) -> dict[LayerNode, str | None]:
    """`fixed`, with the reasons why others had better run dense."""
    reasons = dict(fixed)
    for layer in fixed if asked == "auto" else ():
        if reasons[layer] is not None:
            continue
        if prediction is None or choice is None or not prediction.reaches(layer):
            reasons[layer] = too_dense(layer) or _too_few(layer)
        else:
            reasons[layer] = choice.reason(layer)
    return reasons


def _flows(
    gm: SwatModule, layers: list[LayerNode], versions: _Known
) -> list[tuple[str, LayoutFlow]]:
    """(path, the layout's flow) of each part, if the convolutions `layers` run sparse."""
    found = []
    for prefix, part in all_parts(gm):
        own = [layer for layer in layers if layer.part is part]
        if own:
            found.append((prefix, LayoutFlow(part, versions.of(part, prefix), own)))
    return found


def _turned(gm: SwatModule, layers: list[LayerNode], versions: _Known) -> list[Turned]:
    """What may lie in "features_major", if the linear layers `layers` run sparse."""
    found = []
    for prefix, part in all_parts(gm):
        own = [layer for layer in layers if layer.part is part]
        found += turned_layers(part, versions.of(part, prefix), own) if own else []
    return found


def follow_densities(gm: SwatModule) -> None:
    """Choose anew where densities have moved so far that the choice is another.

    Not to be called inside of backward: what it recomputes has to run as forward did.
    """
    if gm.__dict__["choose_kernels"] is None or not gm.swat.policy.moves_densities:
        return
    reasons, _ = _reasons(gm, list(sparse_nodes(gm)), None, _Known(gm))
    if any((why is None) != (layer.plan.kernels == SPARSE) for layer, why in reasons.items()):
        choose_again(gm, Context(gm.swat.policy))


def choose_again(gm: SwatModule, ctx: Context) -> None:
    """Choose anew: the model moved to another device or dtype, or its densities moved."""
    for _, part in all_parts(gm):
        for node in list(part.graph.nodes):
            if node.target is laid_out:
                node.replace_all_uses_with(node.args[0])
                part.graph.erase_node(node)
    for layer in sparse_nodes(gm):
        kept = {k: v for k, v in layer.node.kwargs.items() if k not in _CHOSEN}
        layer.node.kwargs = kept
        layer.replan(kernels="")
        pack = layer.pack_module
        if pack is not None and pack.layout in _TOLD:
            pack.layout = _TOLD[pack.layout]
    for _, part in all_parts(gm):
        for node in list(part.graph.nodes):
            if node.target is between_linear:
                part.graph.erase_node(node)
        part.recompile()
    choose_kernels(gm, ctx)


def _why_never(layer: LayerNode, asked: str, device: torch.device | None) -> str | None:
    """Why the layer runs dense whatever its densities are, or None."""
    plan, call = layer.plan, layer.record.call
    assert call is not None
    if asked == "dense":
        return "asked for"
    unsuited = _unsuited(layer.weight_now(), device)
    if unsuited is not None:
        return unsuited
    if not kernels.available():
        return "no compiled kernels"
    dense = _dense_product(plan.rule)
    if dense is not None:
        return dense
    return _unfit(plan, call) if layer.is_conv else None


def too_dense(layer: LayerNode) -> str | None:
    """Why the densities of a layer, as they are now, do not allow sparse kernels, or None."""
    most = STAYS_SPARSE if layer.layer_state.ran_sparse else MOST_DENSE
    for name, density in layer.densities_now.items():
        if density > most:
            moves = layer.layer_state.remembers_kernels
            now = "density is" if moves else f"density {density:g} is"
            return f"{name} {now} above {MOST_DENSE}{' now' if moves else ''}"
    return None


def _unsuited(weight: Tensor | None, device: torch.device | None) -> str | None:
    """Why no sparse kernel runs on this device, or with this dtype."""
    where = device or (None if weight is None or weight.is_meta else weight.device)
    if where is not None and where.type != "cpu":
        return f"GPUs run reference kernels ({where.type})"
    if weight is not None and weight.dtype not in ELEMENTS:
        text = f"weights are {weight.dtype}, sparse kernels float32 and bfloat16"
        return text.replace("torch.", "")
    return None


def _dense_product(rule: Policy) -> str | None:
    """Which of the three products the method leaves dense, or None.

    A weight gradient is sparse where activations are, or where only active weights receive one.
    """
    name = _NAMES.get(rule.name, rule.name)
    if not rule.forward_weight:
        return f"{name} runs forward on dense weights"
    if not rule.backward_weight:
        return f"{name} takes input gradients from dense weights"
    if rule.backward_activation or rule.update == "active":
        return None
    if masks.needs(rule):
        return f"masks of {name} need dense weight gradients"
    return f"{name} leaves activations dense, and so weight gradients"


def _too_few(layer: LayerNode) -> str | None:
    """Why its vectors would not be filled, or None."""
    plan, call = layer.plan, layer.record.call
    assert call is not None
    groups = max(call.groups, 1)
    filters = plan.weight_shape[0] // groups
    is_depthwise = groups > 1 and tuple(plan.weight_shape[:2]) == (groups, 1)
    if filters >= LEAST_FILTERS or is_depthwise:
        return None
    if not layer.is_conv:
        return f"too few outputs ({filters})"
    return f"too few filters{' a group' if groups > 1 else ''} ({filters})"


def _unfit(plan: LayerPlan, call: LayerCall) -> str | None:
    kernel = plan.weight_shape[2:]
    if len(kernel) not in (1, 2):
        return f"{len(kernel)}d convolution"
    if call.pad:
        return f"{'uneven' if call.pad_mode == 'constant' else call.pad_mode} padding"
    if torch.Size(kernel).numel() > MAX_TAPS or max(kernel) > kernels.LARGEST_KERNEL:
        return "kernel too large"
    return "stride too large" if max(call.stride) > kernels.LARGEST_STRIDE else None


def _agree(reasons: dict[LayerNode, str | None], convolutions: list[LayerNode]) -> None:
    """Layers that share a packed input run alike, since it was packed in one order."""
    groups: dict[Pack, list[LayerNode]] = {}
    for layer in convolutions:
        pack = layer.pack_module
        if pack is not None:  # the module: two graphs may call one
            groups.setdefault(pack, []).append(layer)
    for group in groups.values():
        dense = [layer for layer in group if reasons[layer] is not None]
        for layer in group if dense else ():
            shares = f"shares its input with {dense[0].plan.name}, which is"
            reasons[layer] = reasons[layer] or shares


def _lay_out(part: SwatModule, prefix: str, versions: _Known) -> LayoutFlow | None:
    """Give sparse convolutions their layout, and let the graph keep it."""
    sparse = [n for n in nodes_of(part, prefix) if n.is_conv and n.plan.kernels == SPARSE]
    if not sparse:
        return None
    flow = LayoutFlow(part, versions.of(part, prefix), sparse)
    flow.run()
    for layer in sparse:
        layer.tell(layout=BATCH_INNERMOST)
        if layer.pack_module is not None:  # else its weight gradient reads the dense activation
            layer.pack_module.layout = BATCH_INNERMOST
    return flow
