"""Policy: what is sparse where. One frozen value answers one row of the paper's table 1.

A policy is data. The passes read its fields; no method has a code path of its own. `swat_u`,
`swat_erk`, ... are constructors that fill the fields in, and `parse("swat-u:0.9,period=1000")` is
the same from a string.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from swatfx.density import check_sparsity
from swatfx.errors import PolicyError, UnknownNameError


@dataclass(frozen=True)
class Policy:
    """What is sparse where, and when thresholds are recomputed.

    Attributes:
        name: what reports call it.
        sparsity: target fraction of weights that are inactive, in [0, 1), over all layers that
            take part.
        activation_sparsity: likewise for activations; None means each layer's activation density
            equals its weight density (section 3.3.2).
        distribution: how the budget is shared over layers: a name in `swatfx.distributions`.
        weight_selector: which weights are kept: a name in `swatfx.selectors`.
        activation_selector: which activations are kept; only the unstructured ones and `random`.
        gradient_selector: which output gradients are kept, where `gradient_sparsity` > 0.
        forward_weight: the forward pass sees Top-K weights.
        forward_activation: the forward pass sees Top-K activations.
        backward_weight: the input gradient is computed with Top-K weights.
        backward_activation: the weight gradient is computed with Top-K activations, and only they
            are stored.
        gradient_sparsity: fraction of output gradients dropped (meProp), in [0, 1).
        update: "all" weights receive their gradient, or the "active" ones only (figure 7).
        first_dense: layers between which and a graph input no other layer stands stay dense.
        last_dense: likewise for graph outputs.
        period: thresholds are recomputed every `period` training iterations (section 3.3.3).
        redistribute_every: optimizer steps between redistributions, for distributions that move.
        global_threshold: activation thresholds are taken over all ranks of the default process
            group.
        seed: of random selectors.
        rules: (layer name pattern, policy) pairs of `per_layer`, first match wins.
    """

    name: str
    sparsity: float = 0.0
    activation_sparsity: float | None = None
    distribution: str = "uniform"
    weight_selector: str = "nchw"
    activation_selector: str = "nchw"
    gradient_selector: str = "nchw"
    forward_weight: bool = True
    forward_activation: bool = False
    backward_weight: bool = True
    backward_activation: bool = True
    gradient_sparsity: float = 0.0
    update: str = "all"
    first_dense: bool = False
    last_dense: bool = False
    period: int = 1
    redistribute_every: int = 1
    global_threshold: bool = False
    seed: int = 0
    rules: tuple[tuple[str, Policy], ...] = ()

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_sparsity(self.gradient_sparsity, "gradient_sparsity")
        if self.activation_sparsity is not None:
            check_sparsity(self.activation_sparsity, "activation_sparsity")
        for field in ("period", "redistribute_every"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PolicyError(
                    f"{field} must be a whole number of iterations, at least 1",
                    value=value,
                    remedy=f"{field}=1 means every iteration",
                )
        for known in fields(self):
            value = getattr(self, known.name)
            if known.type == "bool" and not isinstance(value, bool):
                raise PolicyError(f"{known.name} must be true or false", value=value)
        if self.update not in ("all", "active"):
            raise PolicyError("update must be 'all' or 'active'", value=self.update)

    @property
    def needs_optimizer(self) -> bool:
        """Whether training wants `swatfx.attach(gm, optimizer)`."""
        return self.distribution == "momentum" or any(p.needs_optimizer for _, p in self.rules)

    def rule_for(self, layer: str) -> tuple[int, Policy]:
        """(position, policy) of the first rule whose pattern matches; (-1, this one) if none.

        Layers share a budget if they have the position in common.
        """
        for position, (pattern, rule) in enumerate(self.rules):
            if fnmatchcase(layer, pattern):
                return position, rule
        return -1, replace(self, rules=())

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` reads it back."""
        data = asdict(self)
        data["rules"] = [[pattern, rule.to_json()] for pattern, rule in self.rules]
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Policy:
        """Inverse of `to_json`."""
        known = {f.name for f in fields(Policy)}
        rest = {k: v for k, v in data.items() if k in known}
        rest["rules"] = tuple((p, Policy.from_json(rule)) for p, rule in data["rules"])
        return Policy(**rest)


def dense() -> Policy:
    """Nothing is sparse; the graph is left as it was traced."""
    return Policy(
        "dense",
        distribution="dense",
        forward_weight=False,
        backward_weight=False,
        backward_activation=False,
    )


def swat_u(sparsity: float, *, first_dense: bool = True, **options: Any) -> Policy:
    """SWAT with the same density in every layer but the first (paper section 3.3.2, SWAT-U).

    Args:
        sparsity: fraction of weights and activations dropped, in [0, 1).
        first_dense: keep the first layer dense, as the paper does.
        **options: any other field of `Policy`, e.g. `weight_selector="channel"`, `period=1000`.
    """
    return Policy("swat-u", sparsity, first_dense=first_dense, **options)


def swat_erk(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """SWAT with Erdos-Renyi-kernel densities over all layers (section 3.3.2, SWAT-ERK)."""
    return Policy("swat-erk", sparsity, distribution="erk", first_dense=first_dense, **options)


def swat_er(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """SWAT with Erdos-Renyi densities: as ERK, without the kernel sizes in the sum."""
    return Policy("swat-er", sparsity, distribution="er", first_dense=first_dense, **options)


def swat_m(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """SWAT whose densities follow each layer's mean momentum (section 3.3.2, SWAT-M).

    Needs `swatfx.attach(gm, optimizer)` before training.
    """
    return Policy("swat-m", sparsity, distribution="momentum", first_dense=first_dense, **options)


def saw(sparsity: float, *, first_dense: bool = True, **options: Any) -> Policy:
    """Sparse weights and activations in backward only (appendix A.7; figure 2's "W+A")."""
    options.setdefault("forward_weight", False)
    return Policy("saw", sparsity, first_dense=first_dense, **options)


def meprop(sparsity: float, *, first_dense: bool = False, **options: Any) -> Policy:
    """Top-K output gradients, everything else dense (meProp; figure 2's "gradient")."""
    return Policy(
        "meprop",
        0.0,
        forward_weight=False,
        backward_weight=False,
        backward_activation=False,
        gradient_sparsity=sparsity,
        first_dense=first_dense,
        **options,
    )


def per_layer(rules: Mapping[str, Policy | str], default: Policy | str = "dense") -> Policy:
    """A policy a layer: fnmatch patterns over layer names, the first that matches wins.

    Each rule's budget is shared over the layers that the rule takes. A pattern that matches no
    layer is an error at compile time.
    """
    base = as_policy(default)
    if base.rules:
        raise PolicyError("per_layer's default is itself per_layer", remedy="put its rules here")
    pairs = tuple((pattern, as_policy(rule)) for pattern, rule in rules.items())
    for pattern, rule in pairs:
        if rule.rules:
            raise PolicyError("per_layer rules do not nest", value=pattern)
    return replace(base, name=f"per-layer({base.name})", rules=pairs)


# The names that the command line and strings such as "swat-u:0.9" know. Add a policy by adding a
# constructor here, or at run time: swatfx.policy.CONSTRUCTORS["mine"] = my_constructor.
CONSTRUCTORS: dict[str, Callable[..., Policy]] = {
    "dense": dense,
    "swat-u": swat_u,
    "swat-erk": swat_erk,
    "swat-er": swat_er,
    "swat-m": swat_m,
    "saw": saw,
    "meprop": meprop,
}


def as_policy(policy: Policy | str) -> Policy:
    """A policy from itself or from its string form."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return parse(policy)
    raise PolicyError(
        "a policy is a swatfx.Policy or a string",
        value=policy,
        remedy='e.g. swatfx.swat_u(0.9) or "swat-u:0.9"',
    )


def parse(text: str) -> Policy:
    """Read `name[:sparsity][,field=value]...`, e.g. "swat-u:0.9,period=1000".

    Raises:
        UnknownNameError: no such policy or field; the message lists the nearest.
        PolicyError: a value that the field does not take.
    """
    head, _, tail = text.strip().partition(",")
    name, _, amount = head.partition(":")
    name = name.strip().replace("_", "-")
    if name not in CONSTRUCTORS:
        raise UnknownNameError("policy", name, CONSTRUCTORS)
    build = CONSTRUCTORS[name]
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        known = {f.name for f in fields(Policy)} - {"name", "rules", "sparsity"}
        if not equals or key not in known:
            raise UnknownNameError("policy field", key, known)
        options[key] = _literal(value.strip())
    takes_sparsity = "sparsity" in inspect.signature(build).parameters
    if takes_sparsity and not amount:
        raise PolicyError(
            f"policy {name!r} wants a sparsity", value=text, remedy=f'write "{name}:0.9"'
        )
    if not takes_sparsity:
        if amount or options:
            raise PolicyError(f"policy {name!r} takes no sparsity or options", value=text)
        return build()
    try:
        sparsity = float(amount)
    except ValueError:
        raise PolicyError(
            "a sparsity is a number in [0, 1)", value=amount, remedy=f'write "{name}:0.9"'
        ) from None
    try:
        return build(sparsity, **options)
    except TypeError as error:
        # The constructor sets one of the fields itself.
        raise PolicyError(
            f"policy {name!r} does not take this: {error}",
            value=text,
            remedy="leave the field out, or build a swatfx.Policy",
        ) from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text
