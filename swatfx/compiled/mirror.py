"""A mirror of a model: the same tree of modules with the same tensors, to be rewritten."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from swatfx.errors import InputError

TABLES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_CONTAINERS = (dict, list, set, OrderedDict)  # most of a module's attributes: empty hook tables


def mirror(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer.

    Plain attributes are deep-copied, so that references between modules stay inside the copy;
    whatever cannot be copied (locks, handles) is shared.

    Raises:
        InputError: a lazy module that has not seen an input yet.
    """
    memo: dict[int, Any] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if nn.parameter.is_lazy(tensor):
                raise InputError(
                    "the layer is lazy and has no shape yet",
                    layer=name,
                    remedy="run one forward pass before swatfx.compile",
                )
            if tensor is not None:
                memo[id(tensor)] = tensor
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = module
            continue
        twin = module.__class__.__new__(module.__class__)
        memo[id(module)] = twin
        pairs.append((module, twin))
    for module, twin in pairs:
        for key, value in module.__dict__.items():
            twin.__dict__[key] = _copy_attribute(key, value, memo)
    write_forwards(twin for _, twin in pairs)
    result: nn.Module = memo[id(model)]
    return result


def write_forwards(copies: Iterable[nn.Module]) -> None:
    """Give copies of fx's GraphModules a forward: fx makes a class for each, without one."""
    for module in copies:
        if isinstance(module, fx.GraphModule):
            module.graph = module.__dict__["_graph"]


def _copy_attribute(key: str, value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if key in ("_parameters", "_buffers"):
        return dict(value)
    if key == "_modules":
        return {name: None if m is None else memo[id(m)] for name, m in value.items()}
    if isinstance(value, torch.Tensor):
        return value  # not registered: shared, since a non-leaf tensor cannot be copied
    if type(value) in _CONTAINERS and not value:
        return memo.setdefault(id(value), type(value)())
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever a user's attribute may raise, sharing it is what is left
        return value


def copied_mirror(mirrored: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy that shares what cannot be copied, as `mirror` does."""
    if id(mirrored) in memo:
        result: nn.Module = memo[id(mirrored)]
        return result
    twin = mirrored.__class__.__new__(mirrored.__class__)
    memo[id(mirrored)] = twin
    for key, value in mirrored.__dict__.items():
        if key in TABLES:
            twin.__dict__[key] = copy.deepcopy(value, memo)
        else:
            twin.__dict__[key] = _copy_attribute(key, value, memo)
    return twin


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of the model's forward, unbound."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    bound = inspect.signature(model.forward)
    if "self" in bound.parameters:
        own = own.replace(name="self_")
    first = [own.replace(kind=inspect.Parameter.POSITIONAL_ONLY)]
    return bound.replace(parameters=[*first, *bound.parameters.values()])
