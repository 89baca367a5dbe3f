"""What `swatfx.attach` asks of optimizers: what they hold, what they remember, what they skip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swatfx.compiled import SparseLayer
from swatfx.errors import AttachError

Optimizer = torch.optim.Optimizer
_SAMPLE = 64  # elements of a parameter that are compared where its version tells nothing


def optimizers_of(given: Any) -> list[Optimizer]:
    """The optimizers whose `step` moves the weights, each once.

    Args:
        given: one, or several in a list, tuple or dict; or wrappers that call the optimizer which
            they hold as `optimizer` (accelerate's, Lightning's).

    Raises:
        AttachError: something else.
    """
    if isinstance(given, Mapping):
        given = list(given.values())
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    found: list[Optimizer] = []
    for one in several:
        inner = _innermost(one)
        if not any(inner is other for other in found):
            found.append(inner)
    if not found:
        raise AttachError("no optimizer was given", remedy="swatfx.attach(gm, optimizer)")
    return found


def _innermost(optimizer: Any) -> Optimizer:
    inner = optimizer
    # A wrapper never made itself step hooks: it did not run Optimizer.__init__.
    while "_optimizer_step_post_hooks" not in getattr(inner, "__dict__", {}):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise AttachError(
                "this is no optimizer, and holds none as .optimizer",
                value=type(optimizer).__name__,
                remedy="hand over the torch.optim.Optimizer, or a list of them",
            )
    assert isinstance(inner, Optimizer)
    return inner


def held_by(optimizer: Optimizer) -> set[int]:
    """The ids of its parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class Owners:
    """Which of several optimizers hold a weight; notices groups that are added later."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self._sizes: list[int] = []
        self._held: list[set[int]] = []

    def look(self) -> None:
        """Look at the parameter groups again, if there are more of them, or longer ones."""
        sizes = [len(group["params"]) for o in self.optimizers for group in o.param_groups]
        if sizes != self._sizes:
            self._sizes, self._held = sizes, [held_by(o) for o in self.optimizers]

    def of(self, weight: Tensor) -> list[Optimizer]:
        """The optimizers that hold it."""
        pairs = zip(self.optimizers, self._held, strict=True)
        return [optimizer for optimizer, held in pairs if id(weight) in held]

    def share(self, optimizer: Optimizer, layers: Iterable[SparseLayer]) -> list[SparseLayer]:
        """Those of the layers whose weight `optimizer` holds."""
        held = next(h for o, h in zip(self.optimizers, self._held, strict=True) if o is optimizer)
        return [layer for layer in layers if id(layer.weight) in held]


def check_momentum(optimizer: Optimizer, policy_name: str) -> None:
    """Raise AttachError if the optimizer's options say that it keeps no momentum."""
    betas = all("betas" in group for group in optimizer.param_groups)
    momentum = all(group.get("momentum", 0) for group in optimizer.param_groups)
    if not (betas or momentum):
        raise AttachError(
            f"{type(optimizer).__name__} keeps no momentum, which policy {policy_name!r} reads",
            remedy="use SGD with momentum > 0, Adam or AdamW",
        )


def momentum_of(optimizers: Iterable[Optimizer], layer: SparseLayer) -> Tensor | None:
    """The momentum of a layer's weight; None if no optimizer has updated it yet.

    Raises:
        AttachError: the one that has keeps none.
    """
    for optimizer in optimizers:
        state = optimizer.state.get(layer.weight)
        if not state:
            continue
        if isinstance(buffer := state.get("momentum_buffer"), Tensor):
            return buffer
        if "exp_avg" in state and "exp_avg_sq" in state:
            first, second = state["exp_avg"], state["exp_avg_sq"]
            return torch.div(first, second.sqrt().add_(1e-8))
        raise AttachError(
            f"{type(optimizer).__name__} keeps no momentum, which the layer's policy reads",
            layer=layer.plan.name,
            remedy="use SGD with momentum > 0, Adam or AdamW",
        )
    return None


def forget(optimizers: Iterable[Optimizer], weight: Tensor, where: Tensor) -> None:
    """Clear what the optimizers remember of the elements of `weight` at the mask `where`."""
    for optimizer in optimizers:
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(where, 0)


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has told an optimizer that unscales itself to leave the step out."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(torch.as_tensor(found).ne(0).any().item())


class StepWatch:
    """Whether an optimizer's step wrote to its parameters, or was left out by a `step` of its own.

    Writing in place moves a parameter's version. An optimizer that has never moved one may write
    through `.data`: then a few values tell, and from there on its steps are believed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._tells: bool | None = None  # whether its writes move versions; None: not known yet
        self._before: list[tuple[Tensor, int]] = []
        self._sample: list[Tensor] = []

    def before(self) -> None:
        """Note how the parameters are."""
        if self._tells is False:
            return
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._before = [(p, p._version) for p in parameters if not p.is_inference()]
        if self._tells is None:
            self._sample = [_sample(p) for p, _ in self._before]

    def moved(self) -> bool:
        """Whether the step since `before` was taken; True where there were no gradients at all."""
        before, self._before = self._before, []
        sample, self._sample = self._sample, []
        if self._tells is False or all(p.grad is None for p, _ in before):
            return True
        if any(p._version != version for p, version in before):
            self._tells = True
            return True
        if self._tells is None:
            pairs = zip(before, sample, strict=True)
            if all(float(group.get("lr", 1)) == 0 for group in self._optimizer.param_groups):
                return True  # the first step of a warm-up moves nothing
            if any(not torch.equal(_sample(p), values) for (p, _), values in pairs):
                self._tells = False
                return True
        return False


def _sample(p: Tensor) -> Tensor:
    return p.detach().flatten()[:_SAMPLE].clone()
