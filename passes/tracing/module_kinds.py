"""Which modules are layers, hold layers, or have to be called as they are."""

from __future__ import annotations

import torch
from torch import fx, nn

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_LISTS = (nn.ParameterList, nn.ParameterDict)
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def opaque_reason(m: nn.Module) -> str | None:
    """Why `m` has to be called as a module, or None."""
    if any(getattr(m, table, None) for table in _HOOK_TABLES):
        return "hook on the module"
    if is_script(m):
        return "untraceable: TorchScript module"
    reason = untraceable_reason(m)
    return None if reason is None else f"untraceable: {reason}"


def untraceable_reason(m: nn.Module) -> str | None:
    """Why no one graph can stand for the forward of `m`, as far as `m` itself tells; or None."""
    if is_patched(m):
        return "forward replaced on the instance"
    if _has_several_graphs(m):
        return "a GraphModule that changes between several graphs"
    return None


def is_script(m: nn.Module) -> bool:
    """Whether `m` is TorchScript, whose attributes are not Python's."""
    return isinstance(m, torch.jit.ScriptModule)


def is_patched(m: nn.Module) -> bool:
    """Whether a user has set another forward on `m` itself (we do so with parts)."""
    return not isinstance(m.__dict__.get("forward"), (type(None), fx.GraphModule))


def _has_several_graphs(m: nn.Module) -> bool:
    """Whether `m` holds other graphs than it runs now: for evaluation, as torchvision's do."""
    if not isinstance(m, fx.GraphModule):
        return False
    graphs = [value for value in m.__dict__.values() if isinstance(value, fx.Graph)]
    others = [graph for graph in graphs if graph is not m.graph]
    return any(graph.python_code("self").src != m.code for graph in others)


def has_layers(m: nn.Module) -> bool:
    """Whether `m` is or holds a conv or linear layer."""
    return any(layer_kind(child) or _is_attention(child) for child in m.modules())


def may_call_layers(m: nn.Module) -> bool:
    """Whether `m` might: it holds layers, or a matrix of its own in a user's class."""
    if has_layers(m):
        return True
    return any(_holds_matrix(child) for child in m.modules())


def owns_layer(m: nn.Module) -> bool:
    """Whether the forward of `m` itself might use a layer's weight that is its own."""
    return bool(layer_weights(m)) or owns_matrix(m)


def owns_matrix(m: nn.Module) -> bool:
    """Whether `m` is a user's module with a matrix, which it might multiply by."""
    return _holds_matrix(m) and not isinstance(m, _LISTS)


def _holds_matrix(m: nn.Module) -> bool:
    foreign = isinstance(m, _LISTS) or not type(m).__module__.startswith("torch.nn.")
    return foreign and any(p is not None and p.dim() > 1 for p in m._parameters.values())


def layer_kind(m: nn.Module) -> str | None:
    """The kind of layer that `m` is ("conv2d", "linear", ...), TorchScript included; or None."""
    scripted = getattr(m, "original_name", "") if isinstance(m, torch.jit.ScriptModule) else None
    for kind in LAYERS:
        if isinstance(m, kind) or scripted == kind.__name__:
            return kind.__name__.lower().replace("transpose", "_transpose")
    return None


def layer_weights(m: nn.Module) -> dict[str, str]:
    """Names of the parameters of `m` itself that are weights of a layer, and the layers' kinds."""
    if _is_attention(m):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return {name: "linear" for name in names if m._parameters.get(name) is not None}
    kind = layer_kind(m)
    return {} if kind is None else {"weight": kind}


def _is_attention(m: nn.Module) -> bool:
    return isinstance(m, nn.MultiheadAttention)
