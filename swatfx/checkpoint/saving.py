"""Checkpoints: weights, state, plan and optimizer in one file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from swatfx.checkpoint.checks import (
    FORMAT,
    VERSION,
    Content,
    check_optimizer,
    check_plain,
    check_plan,
    check_state,
    read_content,
)
from swatfx.checkpoint.file import read_file, write_file
from swatfx.compiled import HeldThreshold, SwatModule, all_plans, learned, unwrap
from swatfx.errors import CheckpointError, InputError, SwatError
from swatfx.files.atomic import as_path, write_atomically
from swatfx.pipeline import compile


def save(
    gm: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint from which `load` resumes bit for bit, in the middle of a period too.

    Args:
        gm: a compiled model, possibly wrapped by DistributedDataParallel or torch.compile.
        path: file to write; it is replaced in one move.
        optimizer: its state is stored as well.
        extra: tensors, numbers, strings and containers of them; `read_extra` gives them back.

    Raises:
        CheckpointError: the file cannot be written, or `load` could not read it; what was there is
            untouched.
        InputError: an argument is not what it has to be.
    """
    root = unwrap(gm)
    _check_optimizer_of(root, optimizer)
    if extra is not None and not (
        isinstance(extra, Mapping) and all(isinstance(key, str) for key in extra)
    ):
        raise InputError("extra is a mapping with strings as keys", value=extra)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "plan": json.dumps(_plan(root)),
        "state_dict": dict(root.state_dict()),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "extra": dict(extra or {}),
    }
    check_plain(content, "")
    write_atomically(path, lambda temporary: write_file(content, temporary))


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> SwatModule:
    """Compile `model` as the checkpoint was, and put weights, state and optimizer back.

    Args:
        path: what `save` wrote.
        model: the network that was compiled then; its parameters are overwritten.
        optimizer: over the model's parameters; its state is restored.
        example_inputs: what `compile` was given then, if anything.

    Raises:
        CheckpointError: the file is damaged or no checkpoint, holds an odd field, or was made for
            another model; names the field, or the first layer or tensor that differs. Neither
            model nor optimizer has changed.
        InputError: an argument is not what it has to be.
    """
    if not isinstance(model, nn.Module):
        raise InputError("model has to be a torch.nn.Module", value=type(model).__name__)
    if any(isinstance(module, SwatModule) for module in model.modules()):
        raise InputError(
            "load wants the network itself and compiles it; this one is compiled already",
            value=type(model).__name__,
            remedy="gm = swatfx.load(path, model), with the model that it was made from",
        )
    _check_optimizer_of(model, optimizer)
    content = _read(path)
    with _all_or_nothing(model, optimizer):
        try:
            options: Any = content.options.to_json()
            gm = compile(model, content.policy, example_inputs=example_inputs, **options)
        except SwatError as error:
            raise CheckpointError(
                f"the model cannot be compiled as field 'plan' of the checkpoint says: {error}"
            ) from error
        check_plan(content.layers, _plan(gm)["layers"])
        for path, threshold in gm.swat.thresholds():
            if isinstance(threshold, HeldThreshold):  # in the form of version 2, maybe
                threshold.upgrade(content.state_dict, f"swat.{path}.")
        check_state(content.state_dict, gm)
        if optimizer is not None:
            if content.optimizer is not None:
                groups = content.optimizer["param_groups"]
                learned.add_parameters(gm, optimizer, [len(group["params"]) for group in groups])
            check_optimizer(content.optimizer, optimizer, content.state_dict)
        content.check_sound()
        gm.load_state_dict(content.state_dict)
        if optimizer is not None and content.optimizer is not None:
            optimizer.load_state_dict(content.optimizer)
    return gm


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `extra` that `save` was given."""
    content = _read(path)
    content.check_sound()
    return content.extra


def _read(path: str | os.PathLike[str]) -> Content:
    file = as_path(path)
    content, checked = read_file(file)
    try:
        return read_content(content, checked)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _check_optimizer_of(model: nn.Module, optimizer: Any) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            "optimizer has to be a torch.optim.Optimizer",
            value=type(optimizer).__name__,
            remedy="of several, save one here and the state dicts of the others in extra",
        )
    own = {id(p) for p in model.parameters()}
    given = [p for group in optimizer.param_groups for p in group["params"]]
    if own and not any(id(p) in own for p in given):
        raise InputError(
            "the optimizer has none of the model's parameters",
            value=f"{type(optimizer).__name__} of {len(given)} tensors",
            remedy="make it from the parameters of this model",
        )


@contextmanager
def _all_or_nothing(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Put model and optimizer back as they were if what is done inside fails.

    Compiling may zero weights and adds thresholds to an optimizer before a checkpoint is known to
    fit.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(t, t.detach().clone()) for t in tensors if not t.is_meta and not is_lazy(t)]
    groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
    state: dict[Tensor, Any] = {}
    if optimizer is not None:
        groups = [(g, {**g, "params": list(g["params"])}) for g in optimizer.param_groups]
        state = dict(optimizer.state)
    try:
        yield
    except BaseException as error:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        if optimizer is not None:
            for group, content in groups:
                group.clear()
                group.update(content)
            optimizer.param_groups[:] = [group for group, _ in groups]
            optimizer.state.clear()
            optimizer.state.update(state)
        if isinstance(error, SwatError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"the checkpoint cannot be loaded: {type(error).__name__}: {error}",
            remedy="load it into a model built as the one that was saved",
        ) from error


def _plan(gm: SwatModule) -> dict[str, Any]:
    # Kernels are chosen anew on the machine that loads.
    layers = {name: replace(p, kernels="").to_json() for name, p in all_plans(gm).items()}
    options = gm.swat.options.to_json()
    return {"policy": gm.swat.policy.to_json(), "layers": layers, "options": options}
