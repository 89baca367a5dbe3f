"""What a checkpoint has to hold, field by field; what is odd is refused by the field's name."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from swatfx.compiled import SwatModule, saved_policy
from swatfx.errors import CheckpointError, SwatError
from swatfx.options import OPTION_NAMES, CompileOptions
from swatfx.policy import Policy

FORMAT = "swatfx-checkpoint"
VERSION = 3  # 1 had no checksum; until 2, masks ended in a byte, and stamps said what is held
_FIELDS = ("format", "version", "plan", "state_dict", "optimizer", "extra")
_OTHER_MODEL = "load it into a model built as the one that was saved"
_OTHER_OPTIMIZER = "make the optimizer as it was made then, over the same parameters in that order"
_DAMAGED = "use the checkpoint before it"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# Of optimizers in torch.optim, those whose state is not shaped as the parameters are.
_OTHER_SHAPES = ("Adafactor", "LBFGS", "SparseAdam")


def refuse(field: str, why: str, value: object = None) -> NoReturn:
    """Raise the CheckpointError that names `field`."""
    raise CheckpointError(
        f"field {field!r} of the checkpoint {why}", value=value, remedy=_DAMAGED
    ) from None


@dataclass(frozen=True)
class Content:
    """A checkpoint whose fields are of the right kinds.

    Attributes:
        policy: that the model was compiled with.
        layers: name -> LayerPlan as JSON.
        options: of `compile`; a default where version 1 has none.
        state_dict: of the compiled model.
        optimizer: its state dict, if one was saved.
        extra: what `save` was given.
        sound: its checksum was right, or it is of version 1 and has none.
    """

    policy: Policy
    layers: dict[str, dict[str, Any]]
    options: CompileOptions
    state_dict: dict[str, Any]
    optimizer: dict[str, Any] | None
    extra: dict[str, Any]
    sound: bool

    def check_sound(self) -> None:
        """Raise CheckpointError if the checksum is gone; after all that can say what is odd."""
        if not self.sound:
            raise CheckpointError(
                "the checkpoint has lost its checksum: it was cut or changed after it was written",
                remedy=_DAMAGED,
            )


def read_content(content: Any, checked: bool) -> Content:
    """The fields of what a file held; `checked`: its checksum was right.

    Raises:
        CheckpointError: no checkpoint of ours, of a newer version, or with a field that is missing
            or odd, which is named.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            "not a swatfx checkpoint: field 'format' says otherwise",
            remedy="a state dict of the dense model loads with gm.load_state_dict",
        )
    version = content.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        refuse("version", "is no version number", version)
    if version > VERSION:
        raise CheckpointError(
            "field 'version': the checkpoint was written by a newer swatfx",
            value=version,
            remedy="upgrade swatfx",
        )
    for name in _FIELDS:
        if name not in content:
            refuse(name, "is missing")
    for name in content:
        if name not in _FIELDS:
            refuse(str(name), "is none that this version knows")
    for name in ("state_dict", "extra"):
        _names(name, content[name])
    optimizer = content["optimizer"]
    if optimizer is not None:
        _check_optimizer_fields(optimizer)
    policy, layers, options = _read_plan(content["plan"], version)
    sound = checked or version == 1
    rest = content["state_dict"], optimizer, content["extra"], sound
    return Content(policy, layers, options, *rest)


def _names(field: str, value: Any) -> None:
    """Refuse what is no dict by string."""
    if not isinstance(value, dict):
        refuse(field, "is no dict", type(value).__name__)
    for key in value:
        if not isinstance(key, str):
            refuse(field, "has a key that is no string", key)


def _read_plan(text: Any, version: int) -> tuple[Policy, dict[str, Any], CompileOptions]:
    if not isinstance(text, str):
        refuse("plan", "is no JSON text", type(text).__name__)
    try:
        plan = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse("plan", f"is no JSON: {error}")
    _names("plan", plan)
    for name in ("policy", "layers", "options"):
        if name not in plan and (name != "options" or version > 1):
            refuse(f"plan.{name}", "is missing")
        _names(f"plan.{name}", plan.get(name, {}))
    for name, layer in plan["layers"].items():
        _names(f"plan.layers.{name}", layer)
    options = _read_options(plan.get("options", {}), version)
    try:
        policy = Policy.from_json(plan["policy"])
    except SwatError as error:
        refuse("plan.policy", f"is no policy: {error}")
    return policy, plan["layers"], options


def _read_options(found: Mapping[str, Any], version: int) -> CompileOptions:
    for name, value in found.items():
        if name not in OPTION_NAMES:
            refuse(f"plan.options.{name}", "is none that this version knows")
        try:
            CompileOptions(**{name: value})
        except SwatError:
            refuse(f"plan.options.{name}", "is none that compile takes", value)
    for name in OPTION_NAMES if version > 1 else ():
        if name not in found:
            refuse(f"plan.options.{name}", "is missing")
    return CompileOptions(**found)


def check_plan(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse layers, as JSON by name, that are not those of the model; names the first."""
    after = json.loads(json.dumps(after))
    for name in [*before, *after]:
        if name not in after or name not in before:
            where = "the checkpoint" if name in before else "the model"
            raise CheckpointError(
                f"made for another model: only {where} has this layer",
                layer=name,
                remedy=_OTHER_MODEL,
            )
    for name in before:
        for field, value in after[name].items():
            # A field that is not there is one that a later version added.
            if before[name].get(field, value) != value:
                raise CheckpointError(
                    f"made for another model: {field} differs",
                    layer=name,
                    value=f"{before[name][field]} saved, {value} now",
                    remedy=_OTHER_MODEL,
                )


def check_state(state: Mapping[str, Any], gm: SwatModule) -> None:
    """Refuse a state dict that `gm` cannot take as it is; names the first key that differs."""
    own = gm.state_dict()
    policy = f"swat.{saved_policy.KEY}"  # the plan says it, too; earlier versions had no such key
    spare = {f"swat.{key}" for key in gm.swat.spare_keys()}
    for name in [*state, *own]:
        if name == policy or (name in spare and name not in state):
            continue
        if name not in own or name not in state:
            where = "the checkpoint" if name in state else "the model"
            raise CheckpointError(
                f"made for another model: only {where} has {name!r}", remedy=_OTHER_MODEL
            )
        saved, now = state[name], own[name]
        if not isinstance(now, Tensor):
            continue  # what a module's get_extra_state gave
        if not isinstance(saved, Tensor) or saved.is_meta:
            refuse(f"state_dict.{name}", "holds no values", type(saved).__name__)
        for what in ("shape", "dtype", "layout"):
            if getattr(saved, what) != getattr(now, what):
                old, new = (
                    tuple(t.shape) if what == "shape" else getattr(t, what) for t in (saved, now)
                )
                raise CheckpointError(
                    f"made for another model: {what} of {name!r} differs",
                    value=f"{old} saved, {new} now",
                    remedy=_OTHER_MODEL,
                )
    _check_counters(state, gm)


def _check_counters(state: Mapping[str, Any], gm: SwatModule) -> None:
    """Refuse numbers under `swat.` that no training leaves there."""
    for name in ("iteration", "updates"):
        key = f"swat.clock.{name}"
        if key in state and state[key].item() < 0:
            refuse(f"state_dict.{key}", "counts below zero", state[key].item())
    for path, module in gm.swat.thresholds():
        prefix = f"swat.{path}"
        if module.is_spare and f"{prefix}.stamp" not in state:
            continue
        held = {n: state[f"{prefix}.{n}"] for n in ("density", "fraction", "stamp", "threshold")}
        density = float(held["density"])
        if not 0 <= density <= 1:
            refuse(f"state_dict.{prefix}.density", "is outside [0, 1]", density)
        numerator, denominator = held["fraction"].tolist()
        exact = denominator and numerator / denominator
        # Without a denominator it is no exact fraction, but a held mask's number of weights.
        counts = denominator == 0 and numerator >= 0
        if not counts and not (0 < numerator <= denominator and math.isclose(exact, density)):
            refuse(f"state_dict.{prefix}.fraction", "is not the density", (numerator, denominator))
        if held["stamp"].item() < -1:
            refuse(f"state_dict.{prefix}.stamp", "is no iteration", held["stamp"].item())
        for name in ("held", "open"):
            flag = state.get(f"{prefix}.{name}")
            if flag is not None and flag.item() not in (0, 1):
                refuse(f"state_dict.{prefix}.{name}", "is neither 0 nor 1", flag.item())
        if held["threshold"].is_floating_point() and held["threshold"].isnan().any():
            refuse(f"state_dict.{prefix}.threshold", "holds NaN", module.layer)
        later = state.get(f"{prefix}.later")
        if later is not None and later.is_floating_point() and later.isnan().any():
            refuse(f"state_dict.{prefix}.later", "holds NaN", module.layer)
        stamps = state.get(f"{prefix}.later_stamps")
        if stamps is not None and (stamps < -1).any():
            refuse(f"state_dict.{prefix}.later_stamps", "is no iteration", stamps.tolist())
    memory = state.get("swat.memory")
    if isinstance(memory, Tensor) and not memory.isfinite().all():
        refuse("state_dict.swat.memory", "is not finite", memory.tolist())


def _check_optimizer_fields(saved: Any) -> None:
    """Refuse what cannot be the state dict of an optimizer."""
    _names("optimizer", saved)
    for name in ("state", "param_groups"):
        if name not in saved:
            refuse(f"optimizer.{name}", "is missing")
    groups, state = saved["param_groups"], saved["state"]
    if not isinstance(groups, list):
        refuse("optimizer.param_groups", "is no list", type(groups).__name__)
    numbers: list[int] = []
    for index, group in enumerate(groups):
        where = f"optimizer.param_groups.{index}"
        _names(where, group)
        params = group.get("params")
        if not isinstance(params, list) or not all(type(p) is int for p in params):
            refuse(f"{where}.params", "is no list of parameter numbers", params)
        numbers += params
        for key, value in group.items():
            if isinstance(value, float) and math.isnan(value):
                refuse(f"{where}.{key}", "is NaN")
    if len(set(numbers)) < len(numbers):
        refuse("optimizer.param_groups", "names a parameter twice")
    if not isinstance(state, dict):
        refuse("optimizer.state", "is no dict", type(state).__name__)
    for key, entry in state.items():
        if key not in numbers or isinstance(key, bool):
            refuse("optimizer.state", "has an entry of no parameter", key)
        _names(f"optimizer.state.{key}", entry)


def check_optimizer(
    saved: Mapping[str, Any] | None, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Refuse the state of another optimizer, or over other parameters; names what differs.

    `state` is the checkpoint's own state dict.
    """
    if saved is None:
        raise CheckpointError(
            "the checkpoint holds no optimizer", remedy="load it without optimizer="
        )
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise CheckpointError(
            "the optimizer's parameter groups differ",
            value=f"{sizes} saved, {own} now",
            remedy=_OTHER_OPTIMIZER,
        )
    numbered: dict[int, Tensor] = {}
    for index, (before, after) in enumerate(
        zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ):
        gone, new = before.keys() - after.keys(), after.keys() - before.keys()
        # Either alone may be another version of torch.
        if gone and new:
            raise CheckpointError(
                "the checkpoint holds the state of another kind of optimizer",
                value=type(optimizer).__name__,
                remedy=f"saved was one with {', '.join(sorted(gone))}",
            )
        for key in (before.keys() & after.keys()) - {"params"}:
            if _kind(before[key]) != _kind(after[key]) and None not in (before[key], after[key]):
                refuse(f"optimizer.param_groups.{index}.{key}", "is of another kind", before[key])
        numbered |= dict(zip(before["params"], after["params"], strict=True))
    own_shapes = type(optimizer).__name__ in _OTHER_SHAPES
    if own_shapes or not type(optimizer).__module__.startswith("torch.optim."):
        return
    fits = _state_fits(saved, state)
    for number, entry in saved["state"].items():
        for key, value in entry.items():
            where, shape = f"optimizer.state.{number}.{key}", numbered[number].shape
            if isinstance(value, Tensor):
                odd = value.dim() > 0 and value.shape != shape
                if odd and fits and not value.is_meta:
                    raise CheckpointError(
                        "the optimizer given holds other parameters than the one that was saved,"
                        f" or in another order: {where!r} is of another shape than its parameter"
                        f" {number} now",
                        value=f"{tuple(value.shape)} saved, {tuple(shape)} now",
                        remedy=_OTHER_OPTIMIZER,
                    )
                if odd or value.is_meta:
                    refuse(where, f"is not shaped as its parameter, {tuple(shape)}", value.shape)
            elif not isinstance(value, (int, float, type(None))):
                refuse(where, "is neither tensor nor number", type(value).__name__)


def _state_fits(saved: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether each entry of a saved optimizer can be of a weight saved beside it, by its shape.

    The checkpoint does not say which is of which; where each finds one of its own, nothing says
    that the checkpoint is damaged.
    """
    there = Counter(tuple(v.shape) for v in state.values() if isinstance(v, Tensor))
    wanted: Counter[tuple[int, ...]] = Counter()
    for entry in saved["state"].values():
        shapes = {tuple(v.shape) for v in entry.values() if isinstance(v, Tensor) and v.dim()}
        if len(shapes) > 1:
            return False
        wanted.update(shapes)
    return wanted <= there


def _kind(value: Any) -> str:
    """What an option of an optimizer is, with numbers and their tensors as one kind."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return "number"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_kind(v) for v in value)})"
    return type(value).__name__


def check_plain(value: Any, where: str) -> None:
    """Refuse what torch.load would refuse to read back, while there still is something to save."""
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, where)
            check_plain(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple, set)):
        for index, item in enumerate(value):
            check_plain(item, f"{where}.{index}")
    else:
        raise CheckpointError(
            f"{where} cannot be stored: a checkpoint holds tensors, numbers, strings, and"
            " containers of them",
            value=f"{type(value).__module__}.{type(value).__qualname__}",
            remedy="convert it first, e.g. with float(x)",
        )
