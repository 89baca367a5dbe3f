"""The policy that a state dict was saved with, as a tensor in it, and what another one is told.

Densities, masks and thresholds belong to a policy: under another they would be used as its own. The
key is the `_extra_state` of the child `swat`; states of earlier versions have none, and are held
against the model's densities where no density moves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from swatfx.errors import CheckpointError, SwatError
from swatfx.policy import Policy

KEY = "_extra_state"  # of `swat`, where torch keeps what is neither parameter nor buffer
_REMEDY = (
    "compile the model with the policy that was saved, or load the weights alone:"
    " gm.load_state_dict(swatfx.dense_state_dict(other))"
)


def as_tensor(policy: Policy) -> Tensor:
    """uint8 [n]: the policy as JSON."""
    text = json.dumps(policy.to_json(), sort_keys=True).encode()
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def check(policy: Policy, state: Mapping[str, Any], prefix: str, own: Mapping[str, Tensor]) -> None:
    """Refuse `state` if it was saved under another policy.

    Args:
        policy: of the model that is to load it.
        state: all or part of a state dict.
        prefix: of the keys of the child `swat` in it.
        own: the model's buffers below `swat`.

    Raises:
        CheckpointError: names both policies and what differs.
    """
    saved = state.get(prefix + KEY)
    if saved is not None:
        _check_same(_read(saved), policy)
    elif not policy.moves_densities:
        for name, value in own.items():
            before = state.get(prefix + name)
            if not name.endswith(".density") or not isinstance(before, Tensor) or before.is_meta:
                continue
            if before.numel() == 1 and abs(float(before) - float(value)) > 1e-9:
                raise CheckpointError(
                    "the state was saved under another policy: the density differs",
                    layer=name.partition(".")[0],
                    value=f"swat density {float(before):g} saved, {float(value):g} here",
                    remedy=_REMEDY,
                )


def _read(saved: Any) -> Policy:
    try:
        return Policy.from_json(json.loads(bytes(saved.tolist())))
    except (AttributeError, TypeError, ValueError, SwatError) as error:
        raise CheckpointError(
            "the policy in the state cannot be read",
            value=type(saved).__name__,
            remedy="load the weights alone, without the keys that begin with 'swat.'",
        ) from error


def _check_same(saved: Policy, here: Policy) -> None:
    if saved == here:
        return
    differences = [
        f"{field.name} {getattr(saved, field.name)!r} saved, {getattr(here, field.name)!r} here"
        for field in fields(Policy)
        if getattr(saved, field.name) != getattr(here, field.name) and field.name != "rules"
    ]
    if saved.rules != here.rules:
        differences.append("the rules of its layers")
    raise CheckpointError(
        f"the state was saved under policy '{_short(saved)}', the model is compiled for"
        f" '{_short(here)}': {'; '.join(differences)}",
        remedy=_REMEDY,
    )


def _short(policy: Policy) -> str:
    return f"{policy.name}:{policy.sparsity:g}"
