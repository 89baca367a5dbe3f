"""Checkpoints: weights, state, plan and optimizer in one file, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swatfx import learned
from swatfx.errors import CheckpointError
from swatfx.graph_module import SwatModule, unwrap
from swatfx.layers import all_plans
from swatfx.pipeline import compile
from swatfx.policy import Policy

_FORMAT = "swatfx-checkpoint"
_VERSION = 1
_REMEDY = "load it into a model built as the one that was saved"


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there.

    What is there and no file (/dev/stdout, a named pipe) is written to, not replaced.

    Raises:
        CheckpointError: the disk is full or the folder is not there; what `path` held is untouched.
    """
    given = Path(path)
    temporary: Path | None = None
    try:
        if given.exists() and not given.is_file():
            write(given)
            return
        target = given.resolve()  # a symbolic link goes on to point where it did
        temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
        # Not tempfile's: what that makes, nobody but the owner may read.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        write(temporary)
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as RuntimeError.
        raise CheckpointError(
            f"cannot write the file: {(str(error).splitlines() or [''])[0]}",
            value=str(path),
            remedy="free some space or choose another folder; the old file, if any, is untouched",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; raises what `write_atomically` raises."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


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
    """
    root = unwrap(gm)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "plan": json.dumps(_plan(root)),
        "state_dict": dict(root.state_dict()),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "extra": dict(extra or {}),
    }
    _check_plain(content, "")
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: Sequence[Any] | None = None,
) -> SwatModule:
    """Compile `model` as the checkpoint was, and put weights, state and optimizer back.

    Args:
        path: what `save` wrote.
        model: the network that was compiled then; its parameters are overwritten.
        optimizer: over the model's parameters; its state is restored.
        example_inputs: what `compile` was given then, if anything.

    Raises:
        CheckpointError: the file is cut short or no checkpoint, or was made for another model;
            names the first layer or tensor that differs. Neither model nor optimizer has changed.
    """
    content = _read(path)
    plan = json.loads(content["plan"])
    gm = compile(
        model,
        Policy.from_json(plan["policy"]),
        example_inputs=example_inputs,
        **plan.get("options", {}),  # a checkpoint of an earlier version has none
    )
    _check_plan(plan, _plan(gm))
    _check_state(content["state_dict"], gm)
    if optimizer is not None:
        if content["optimizer"] is not None:
            groups = content["optimizer"]["param_groups"]
            learned.add_parameters(gm, optimizer, [len(group["params"]) for group in groups])
        _check_optimizer(content["optimizer"], optimizer)
    gm.load_state_dict(content["state_dict"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return gm


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what torch.load would refuse to read back, while there still is something to save."""
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, where)
            _check_plain(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple, set)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}.{index}")
    else:
        raise CheckpointError(
            f"{where} cannot be stored: a checkpoint holds tensors, numbers, strings, and"
            " containers of them",
            value=f"{type(value).__module__}.{type(value).__qualname__}",
            remedy="convert it first, e.g. with float(x)",
        )


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `extra` that `save` was given."""
    return dict(_read(path)["extra"])


def _plan(gm: SwatModule) -> dict[str, Any]:
    # Kernels are chosen anew on the machine that loads.
    layers = {name: replace(p, kernels="").to_json() for name, p in all_plans(gm).items()}
    options = {name: gm.meta[name] for name in ("norm_saves", "value_dtype", "kernels")}
    return {"policy": gm.meta["policy"], "layers": layers, "options": options}


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise CheckpointError("no such checkpoint", value=str(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever unzipping and unpickling raise
        raise CheckpointError(
            f"the file is cut short, or no checkpoint ({type(error).__name__})",
            value=str(path),
            remedy="use the checkpoint before it",
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(
            "not a swatfx checkpoint",
            value=str(path),
            remedy="a state dict of the dense model loads with gm.load_state_dict",
        )
    if content["version"] > _VERSION:
        raise CheckpointError(
            "the checkpoint was written by a newer swatfx",
            value=content["version"],
            remedy="upgrade swatfx",
        )
    return content


def _check_plan(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = saved["layers"], json.loads(json.dumps(now["layers"]))
    for name in [*before, *after]:
        if name not in after or name not in before:
            where = "the checkpoint" if name in before else "the model"
            raise CheckpointError(
                f"made for another model: only {where} has this layer", layer=name, remedy=_REMEDY
            )
    for name in before:
        for field, value in after[name].items():
            # A field that is not there is one that a later version added.
            if before[name].get(field, value) != value:
                raise CheckpointError(
                    f"made for another model: {field} differs",
                    layer=name,
                    value=f"{before[name][field]} saved, {value} now",
                    remedy=_REMEDY,
                )


def _check_state(state: Mapping[str, Any], gm: SwatModule) -> None:
    own = gm.state_dict()
    for name in [*state, *own]:
        if name not in own or name not in state:
            where = "the checkpoint" if name in state else "the model"
            raise CheckpointError(
                f"made for another model: only {where} has {name!r}", remedy=_REMEDY
            )
        if not isinstance(state[name], Tensor) or not isinstance(own[name], Tensor):
            continue  # what a module's get_extra_state gave
        if state[name].shape != own[name].shape:
            raise CheckpointError(
                f"made for another model: shape of {name!r} differs",
                value=f"{tuple(state[name].shape)} saved, {tuple(own[name].shape)} now",
                remedy=_REMEDY,
            )


def _check_optimizer(saved: Mapping[str, Any] | None, optimizer: torch.optim.Optimizer) -> None:
    if saved is None:
        raise CheckpointError(
            "the checkpoint holds no optimizer", remedy="load it without optimizer="
        )
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise CheckpointError(
            "the optimizer's parameter groups differ", value=f"{sizes} saved, {own} now"
        )
    for before, after in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        gone, new = before.keys() - after.keys(), after.keys() - before.keys()
        # Either alone may be another version of torch.
        if gone and new:
            raise CheckpointError(
                "the checkpoint holds the state of another kind of optimizer",
                value=type(optimizer).__name__,
                remedy=f"saved was one with {', '.join(sorted(gone))}",
            )
