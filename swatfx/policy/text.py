"""Policies from strings, and a policy a layer."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from swatfx.errors import PolicyError, UnknownNameError
from swatfx.policy import rivals, swat
from swatfx.policy.fields import Policy

# The names that the command line and strings such as "swat-u:0.9" know. Add a policy by adding a
# constructor here, or at run time: swatfx.policy.CONSTRUCTORS["mine"] = my_constructor.
CONSTRUCTORS: dict[str, Callable[..., Policy]] = {
    "dense": swat.dense,
    "swat-u": swat.swat_u,
    "swat-erk": swat.swat_erk,
    "swat-er": swat.swat_er,
    "swat-m": swat.swat_m,
    "saw": swat.saw,
    "forward-weights": swat.forward_weights,
    "forward-activations": swat.forward_activations,
    "swat-active-update": swat.swat_active_update,
    "swat-frozen": swat.swat_frozen,
    "meprop": rivals.meprop,
    "static": rivals.static,
    "set": rivals.set_,
    "rigl": rivals.rigl,
    "snfs": rivals.snfs,
    "dsr": rivals.dsr,
    "dst": rivals.dst,
    "gradual-magnitude": rivals.gradual_magnitude,
    "soft-filter": rivals.soft_filter,
    "ssc": rivals.ssc,
}


def as_policy(policy: Policy | str, argument: str = "policy") -> Policy:
    """A policy from itself or from its string form; `argument` is what errors call it."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return parse(policy)
    raise PolicyError(
        f"a policy is a swatfx.Policy or a string, and {argument} is not",
        value=policy,
        remedy='e.g. swatfx.swat_u(0.9) or "swat-u:0.9"',
    )


def parse(text: str) -> Policy:
    """Read `name[:amount][,option=value]...`, e.g. "swat-u:0.9,period=1000".

    The amount is the constructor's `sparsity`, or DST's `penalty`; an option is any other argument
    of the constructor, or field of Policy.

    Raises:
        UnknownNameError: no such policy or option; the message lists the nearest.
        PolicyError: a value that the field does not take.
    """
    head, _, tail = text.strip().partition(",")
    name, _, amount = head.partition(":")
    name = name.strip().replace("_", "-")
    if name not in CONSTRUCTORS:
        raise UnknownNameError("policy", name, CONSTRUCTORS)
    build = CONSTRUCTORS[name]
    arguments = inspect.signature(build).parameters
    options = _options(tail, arguments)
    if not arguments and (amount or options):
        raise PolicyError(f"policy {name!r} takes no sparsity or options", value=text)
    amounts = [_number(name, amount)] if amount else []
    missing = [
        key
        for key, argument in list(arguments.items())[len(amounts) :]
        if argument.default is argument.empty
        and argument.kind is argument.POSITIONAL_OR_KEYWORD
        and key not in options
    ]
    if missing:
        wanted = f"{name}:0.9" if missing == ["sparsity"] else f"{name},{missing[0]}=..."
        raise PolicyError(
            f"policy {name!r} wants a {missing[0]}", value=text, remedy=f'write "{wanted}"'
        )
    try:
        return build(*amounts, **options)
    except TypeError as error:
        # The constructor sets one of the fields itself.
        raise PolicyError(
            f"policy {name!r} does not take this: {error}",
            value=text,
            remedy="leave the field out, or build a swatfx.Policy",
        ) from error


def _options(tail: str, arguments: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    known = {f.name for f in fields(Policy)} - {"name", "rules", "sparsity"}
    known |= {n for n, a in arguments.items() if a.kind is not a.VAR_KEYWORD} - {"sparsity"}
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if key == "sparsity":
            raise PolicyError(
                "the sparsity stands behind the policy's name, once",
                value=item,
                remedy='write "name:0.9"',
            )
        if key not in known:
            raise UnknownNameError("policy field", key, known)
        if not equals or not value.strip():
            raise PolicyError(
                f"policy field {key!r} is given no value", value=item, remedy=f'write "{key}=..."'
            )
        options[key] = _literal(value.strip())
    return options


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PolicyError(
            "a sparsity is a number in [0, 1)", value=text, remedy=f'write "{name}:0.9"'
        ) from None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text


def per_layer(rules: Mapping[str, Policy | str], default: Policy | str = "dense") -> Policy:
    """A policy a layer: fnmatch patterns over layer names, the first that matches wins.

    Each rule's budget is shared over the layers that the rule takes. A pattern that matches no
    layer is an error at compile time.
    """
    if not isinstance(rules, Mapping) or not all(isinstance(name, str) for name in rules):
        raise PolicyError("rules map layer name patterns to policies", value=rules)
    base = as_policy(default, "default")
    if base.rules:
        raise PolicyError("per_layer's default is itself per_layer", remedy="put its rules here")
    pairs = tuple(
        (pattern, as_policy(rule, f"rules[{pattern!r}]")) for pattern, rule in rules.items()
    )
    for pattern, rule in pairs:
        if rule.rules:
            raise PolicyError("per_layer rules do not nest", value=pattern)
    return replace(base, name=f"per-layer({base.name})", rules=pairs)
