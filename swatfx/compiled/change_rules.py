"""Which changes to the modules of a compiled model its graph can follow, and what to say else.

Used by `swatfx.compiled.changes`. Nothing here changes anything.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from swatfx.errors import ChangedModelError

_REMEDY = "undo it, or make the change to the model first and call swatfx.compile on that"
hooks_of = operator.attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
ITERATED = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Of torch's own modules, options are what `__constants__` lists, but for what the tensors say.
_IN_SHAPES = {"in_channels", "out_channels", "in_features", "out_features", "inplace"}


@dataclass(frozen=True)
class Known:
    """A module that a graph took over, or that lies above one it did.

    Attributes:
        path: below the graph's root.
        module: the module itself.
        kind: its type.
        code: that of an fx GraphModule, where the graph stands for its call; or None.
        forward: what stands for its forward: a part of ours, or None.
        is_called: whether the graph stands for its call, so that hooks on it would not run.
        options: values of its constants.
        children: how many it has, where its forward runs through them all.
    """

    path: str
    module: nn.Module
    kind: type
    code: str | None
    forward: Any
    is_called: bool
    options: tuple[tuple[str, Any], ...]
    children: int | None


@dataclass(frozen=True)
class Weight:
    """A parameter that is the weight of sparse calls in a graph."""

    owner: str
    leaf: str
    layer: str
    state: str
    tensor: Tensor
    shape: tuple[int, ...]
    is_zeroed: bool  # outside of a held mask


def options_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """(name, value) of the constants of one of torch's own modules that a graph holds."""
    if not is_torchs(type(module)):
        return ()
    names = [n for n in getattr(module, "__constants__", ()) if n not in _IN_SHAPES]
    return tuple((name, getattr(module, name)) for name in names if hasattr(module, name))


def is_torchs(kind: type) -> bool:
    """Whether a module type is torch's own, so that its options say all about it."""
    return kind.__module__.startswith("torch.nn.modules.")


def code_of(module: nn.Module) -> str | None:
    """The forward of an fx GraphModule, as text; None for any other module."""
    return module.__dict__.get("_code") if isinstance(module, fx.GraphModule) else None


def _is_copied(kind: type, known: type) -> bool:
    """Whether both are classes that fx made of one: it makes another for every copy."""
    return issubclass(known, fx.GraphModule) and kind.__mro__[1:] == known.__mro__[1:]


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, or None."""
    module: nn.Module | None = root
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def known_now(known: Known, module: nn.Module | None, name: str) -> Known:
    """What is known of the module at this place, as it is now.

    Args:
        known: as it was noted.
        module: what is there now.
        name: its path below the model.

    Raises:
        ChangedModelError: it is another thing than the graph stands for.
    """
    if module is None:
        raise ChangedModelError("was removed from the compiled model", layer=name, remedy=_REMEDY)
    moved = module is not known.module
    is_copy = not moved and _is_copied(type(module), known.kind)
    if type(module) is not known.kind and not is_copy:
        if "_is_fsdp_managed_module" in module.__dict__:
            raise sharded(name)
        raise ChangedModelError(
            f"is now a {_name(type(module))}, but a {_name(known.kind)} was compiled",
            layer=name,
            remedy=_REMEDY,
        )
    if moved and not is_torchs(known.kind):
        raise ChangedModelError(
            "was replaced by another module, whose forward may go another way",
            layer=name,
            value=_name(type(module)),
            remedy=_REMEDY,
        )
    if known.code is not None and code_of(module) != known.code:
        raise ChangedModelError(
            "its fx graph has changed since it was compiled, but the graph stands for its call",
            layer=name,
            remedy=_REMEDY,
        )
    forward = module.__dict__.get("forward")
    # A module that has just come has no part yet, unless another graph has seen it come.
    if forward is not known.forward and not (moved and forward is None):
        raise ChangedModelError(
            "its forward was replaced on the instance, but the graph stands for its call",
            layer=name,
            value=_name(forward),
            remedy=_REMEDY,
        )
    if known.is_called and any(hooks_of(module)):
        raise ChangedModelError(
            f"has {_hook(module)} since it was compiled, which would never run: the graph stands"
            " for its call",
            layer=name,
            remedy="remove it (costs and densities are what swatfx.report tells), or register it on"
            " the model and call swatfx.compile on that: the layer then stays dense",
        )
    if known.children is not None and len(module._modules) != known.children:
        raise ChangedModelError(
            f"has {len(module._modules)} children, but was compiled with {known.children}",
            layer=name,
            remedy=_REMEDY,
        )
    for option, value in known.options:
        found = getattr(module, option, None)
        if found != value:
            raise ChangedModelError(
                f"{option} is {found!r}, but was compiled as {value!r}", layer=name, remedy=_REMEDY
            )
    return replace(known, module=module, kind=type(module)) if moved or is_copy else known


def weight_now(weight: Weight, owner: nn.Module | None) -> Weight:
    """What is known of a weight, as it is now; `weight` itself if it is the same.

    Raises:
        ChangedModelError: it is no plain parameter of the same kind.
    """
    tensor = None if owner is None else owner._parameters.get(weight.leaf)
    if owner is None or tensor is None:
        found = None if owner is None else getattr(owner, weight.leaf, None)
        raise ChangedModelError(
            f"{weight.leaf!r} is no parameter any more",
            layer=weight.layer,
            value=_name(type(found)),
            remedy=_REMEDY,
        )
    shape = tuple(tensor.shape)
    if tensor is weight.tensor and shape == weight.shape:
        return weight
    if type(tensor).__name__ == "DTensor":
        raise sharded(weight.layer)
    if _is_temporary(tensor) and shape == weight.shape:
        return weight
    fits = tensor.is_floating_point() and type(tensor) is nn.Parameter
    if not fits or len(shape) != len(weight.shape) or shape[2:] != weight.shape[2:]:
        raise ChangedModelError(
            f"its weight is a {_name(type(tensor))} of {tensor.dtype} and shape {list(shape)}, but"
            f" was compiled with shape {list(weight.shape)}",
            layer=weight.layer,
            remedy=_REMEDY,
        )
    return replace(weight, tensor=tensor, shape=shape)


def check_bias(module: nn.Module | None, name: str) -> None:
    """Raise ChangedModelError if a module that had no bias has one."""
    if module is not None and module._parameters.get("bias") is not None:
        raise ChangedModelError(
            "has a bias, but was compiled without one", layer=name, remedy=_REMEDY
        )


def _is_temporary(tensor: Tensor) -> bool:
    """Whether a functional call, or a tracer of torch's, has put it there for one call."""
    home = type(tensor).__module__
    return type(tensor) is Tensor or home.startswith(("torch._subclasses", "torch._functorch"))


def sharded(layer: str | None) -> ChangedModelError:
    """The model was sharded (FSDP, tensor parallelism): no rank sees a whole weight to rank."""
    return ChangedModelError(
        "its weight is spread over ranks (fully_shard, FSDP or tensor parallelism), and Top-K wants"
        " the whole weight",
        layer=layer,
        remedy="use torch.nn.parallel.DistributedDataParallel; shard only what lies around the"
        " compiled model (fully_shard's ignored_params)",
    )


def children_differ(found: int) -> ChangedModelError:
    """The root, which runs through its children, has others."""
    return ChangedModelError(
        "the model has other children than when it was compiled", value=found, remedy=_REMEDY
    )


def torn(names: str) -> ChangedModelError:
    """Parameters, or modules, that were one are two."""
    return ChangedModelError(
        "one and the same when the model was compiled, but not now", layer=names, remedy=_REMEDY
    )


def _hook(module: nn.Module) -> str:
    """The first hook of `module`, in words."""
    names = ("a forward hook", "a forward pre-hook", "a backward hook", "a backward pre-hook")
    tables = zip(names, hooks_of(module), strict=True)
    name, table = next(pair for pair in tables if pair[1])
    hook = next(iter(table.values()))
    return f"{name} ({_name(hook)})"


def _name(thing: Any) -> str:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    home = getattr(kind, "__module__", None) or ""
    short = home.startswith(("torch.nn.modules", "torch.nn.parameter", "builtins")) or not home
    return str(kind.__qualname__) if short else f"{home}.{kind.__qualname__}"
