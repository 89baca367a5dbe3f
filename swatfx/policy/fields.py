"""The fields of a policy, and what they may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from swatfx.density import check_sparsity
from swatfx.errors import PolicyError

_WORDS: Mapping[str, tuple[str, ...]] = {
    "update": ("all", "active"),
    "zero_inactive": ("never", "updates", "always"),
    "drop_decay": ("constant", "cosine"),
    "ramp": ("none", "cubic"),
}

HELD = "held:"  # before the name of a selector: what it selected once is kept
_INT64 = 2**62  # ops take counts as int64


@dataclass(frozen=True)
class Policy:
    """What is sparse where, and when that changes.

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
        hold_from_epoch: None: the active set is selected anew at every refresh. n: from the start
            of epoch n on it is held; 0 is from the first step, n figure 8's freezing. What is held
            changes by `drop` and `grow` alone.
        zero_inactive: inactive weights of a held mask are set to zero "never", at mask "updates",
            or "always".
        drop: which active weights a mask update drops: a name in `swatfx.masks.DROPS`.
        grow: which weights it makes active: a name in `swatfx.masks.GROWS`.
        grow_share: how the grown weights are shared over layers: a name in `swatfx.masks.SHARES`.
        drop_fraction: of the active weights, dropped by the first update, in [0, 1].
        drop_decay: "constant", or "cosine": from there to 0 at the end of updates.
        update_every: optimizer steps between mask updates; 0 is once an epoch.
        update_until: fraction of training after which masks stay as they are, in (0, 1].
        ramp: "none", or "cubic": densities fall from 1 to their target until the end of updates.
        penalty: of learned thresholds t (DST): weight of the sum of exp(-t).
        assumed_activation_density: what the paper's accounting takes in the weight gradient where
            activations are not sparsified (0.5 for its baselines); None takes 1.
        seed: of random selectors and masks.
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
    hold_from_epoch: int | None = None
    zero_inactive: str = "never"
    drop: str = "none"
    grow: str = "none"
    grow_share: str = "layer"
    drop_fraction: float = 0.0
    drop_decay: str = "constant"
    update_every: int = 0
    update_until: float = 1.0
    ramp: str = "none"
    penalty: float = 0.0
    assumed_activation_density: float | None = None
    seed: int = 0
    rules: tuple[tuple[str, Policy], ...] = ()

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_sparsity(self.gradient_sparsity, "gradient_sparsity")
        if self.activation_sparsity is not None:
            check_sparsity(self.activation_sparsity, "activation_sparsity")
        for field in ("period", "redistribute_every"):
            value = getattr(self, field)
            if not _is_whole(value) or not 1 <= value < _INT64:
                raise PolicyError(
                    f"{field} must be a whole number of iterations, at least 1",
                    value=value,
                    remedy=f"{field}=1 means every iteration",
                )
        if not _is_whole(self.seed) or not -_INT64 <= self.seed < _INT64:
            raise PolicyError("seed must be a whole number of 64 bits", value=self.seed)
        for known in fields(self):
            value = getattr(self, known.name)
            if known.type == "bool" and not isinstance(value, bool):
                raise PolicyError(f"{known.name} must be true or false", value=value)
            if known.type == "str" and not (isinstance(value, str) and value.strip()):
                raise PolicyError(f"{known.name} must be a name", value=value)
        self._check_rules()
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                said = " or ".join(repr(word) for word in words)
                raise PolicyError(f"{name} must be {said}", value=getattr(self, name))
        self._check_schedule()

    def _check_rules(self) -> None:
        pairs = self.rules if isinstance(self.rules, tuple) else (self.rules,)
        for pair in pairs:
            fits = isinstance(pair, tuple) and len(pair) == 2
            if not fits or not isinstance(pair[0], str) or not isinstance(pair[1], Policy):
                raise PolicyError(
                    "rules are a tuple of (layer name pattern, policy)",
                    value=self.rules,
                    remedy="swatfx.per_layer makes them",
                )

    def _check_schedule(self) -> None:
        if self.hold_from_epoch is not None:
            _check_count("hold_from_epoch", self.hold_from_epoch, "0 holds from the first step")
        _check_count("update_every", self.update_every, "0 updates masks once an epoch")
        for name, low in (("drop_fraction", 0.0), ("update_until", 1e-9)):
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= 1:
                raise PolicyError(f"{name} is a fraction of 1", value=value)
        if not _is_number(self.penalty) or not 0 <= self.penalty < float("inf"):
            raise PolicyError("penalty is a number, not negative", value=self.penalty)
        assumed = self.assumed_activation_density
        if assumed is not None and not (_is_number(assumed) and 0 < assumed <= 1):
            raise PolicyError("assumed_activation_density is in (0, 1]", value=assumed)
        if self.weight_selector == "learned" and self.hold_from_epoch is not None:
            raise PolicyError(
                "learned thresholds move at every step, a held mask does not",
                value=f"hold_from_epoch={self.hold_from_epoch}",
                remedy="use another weight_selector, or leave hold_from_epoch out",
            )
        if self.zeroes_inactive and self.hold_from_epoch is None:
            raise PolicyError(
                "only the inactive weights of a held mask can be set to zero: where the active set"
                " is selected anew, zeros would never come back",
                value=f"zero_inactive={self.zero_inactive!r}",
                remedy="say with hold_from_epoch since when it is held, or leave zero_inactive out",
            )
        if self.updates_masks and self.hold_from_epoch != 0:
            raise PolicyError(
                "mask updates change a mask that is held",
                value=f"hold_from_epoch={self.hold_from_epoch}",
                remedy="use hold_from_epoch=0 with drop, grow and ramp",
            )

    @property
    def sees_weight(self) -> bool:
        """Whether any product of a layer sees Top-K weights."""
        return self.forward_weight or self.backward_weight

    @property
    def sees_activation(self) -> bool:
        """Likewise for activations."""
        return self.forward_activation or self.backward_activation

    @property
    def zeroes_inactive(self) -> bool:
        """Whether inactive weights are zero, at least when training ends."""
        return self.zero_inactive != "never"

    @property
    def selector_in_use(self) -> str:
        """Name of the weights' selector: where masks are held, of what holds its choice."""
        held = self.hold_from_epoch is not None
        return HELD + self.weight_selector if held else self.weight_selector

    @property
    def updates_masks(self) -> bool:
        """Whether held masks change: by dropping, by growing, or by a density ramp."""
        return (self.drop, self.grow, self.ramp) != ("none", "none", "none")

    @property
    def moves_densities(self) -> bool:
        """Whether densities of layers change while training."""
        moving = self.distribution == "momentum" or self.grow_share != "layer"
        moving = moving or self.ramp != "none" or self.penalty > 0
        return moving or any(p.moves_densities for _, p in self.rules)

    @property
    def needs_optimizer(self) -> bool:
        """Whether training wants `swatfx.attach(gm, optimizer)`."""
        own = self.distribution == "momentum" or self.updates_masks or self.penalty > 0
        return own or bool(self.hold_from_epoch) or any(p.needs_optimizer for _, p in self.rules)

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
        """Inverse of `to_json`; a field that is not there is at its default.

        Raises:
            PolicyError: a field that is unknown, or holds what it does not take.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
            raise PolicyError("a policy in JSON is an object with a name", value=data)
        known = {f.name for f in fields(Policy)}
        for key in data:
            if key not in known:
                raise PolicyError("unknown policy field", value=key)
        rules = data.get("rules", [])
        pairs = rules if isinstance(rules, (list, tuple)) else [rules]
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise PolicyError("rules are pairs of pattern and policy", value=rules)
        read = tuple((pattern, Policy.from_json(rule)) for pattern, rule in pairs)
        return Policy(**{**data, "rules": read})


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_count(name: str, value: Any, remedy: str) -> None:
    if not _is_whole(value) or not 0 <= value < _INT64:
        raise PolicyError(
            f"{name} must be a whole number, not negative", value=value, remedy=remedy
        )
