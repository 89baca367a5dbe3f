"""Learned thresholds (DST): the parameters below `swat.`, and what they ask of a training step.

A layer whose weight selector is learned keeps the weights whose magnitude reaches a threshold t of
their filter, and t is trained with the weights (`swatfx.ops.learned`). Source: Liu et al., Dynamic
Sparse Training, ICLR 2020. At every optimizer step:

    add_penalty(gm, weight)     # before it: the gradient of weight * sum exp(-t)
    optimizer.step()
    reset_if_empty(gm)          # after it: layers that lost nearly all their weights start anew
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from swatfx.compiled.layers import SparseLayer, sparse_layers, weight_parameters
from swatfx.compiled.module import unwrap
from swatfx.compiled.state import WeightThreshold, initial_state
from swatfx.density import DENSE, Density
from swatfx.errors import AttachError
from swatfx.ops.where import weight_keep

LEAST_DENSITY = 0.01


class LearnedThreshold(WeightThreshold):
    """The thresholds of a layer's filters: the parameter `threshold` (F, 1, ...), zero at first.

    No forward refreshes them. The buffer `density` is what they kept when it was last measured, by
    `recompute` or by `reset_if_empty`: 1 at first.
    """

    def __init__(
        self, layer: str, selector: str, *, state: Tensor, spatial: int, requires_grad: bool = True
    ) -> None:
        super().__init__(
            layer,
            selector,
            DENSE,
            state=state,
            period=1,
            spatial=spatial,
            is_weight=True,
            seed=0,
        )
        del self.threshold
        self.register_parameter("threshold", nn.Parameter(state, requires_grad))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedThreshold:
        # The buffers stay on the host, as every threshold's do.
        buffers, self._buffers = self._buffers, {}
        try:
            nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = buffers
        return self

    def forward(self, weight: Tensor, step: Tensor) -> Tensor:
        """Return the thresholds; a copy where `reset_if_empty` may write before backward."""
        return self.threshold.clone() if torch.is_grad_enabled() else self.threshold

    def state_now(self, weight: Tensor) -> Tensor:
        """The thresholds, whatever the weight."""
        return self.threshold.detach()

    @torch.no_grad()
    def make_room(self, weight: Tensor) -> None:
        """Start anew from zero, for a weight that took another's place."""
        state = initial_state(weight, weight, self.selector, self.spatial, True)
        if state.shape == self.threshold.shape and state.device == self.threshold.device:
            self.threshold.zero_()
        else:
            self.threshold = nn.Parameter(state, self.threshold.requires_grad)

    @torch.no_grad()
    def recompute(self, x: Tensor) -> None:
        """Measure what the thresholds keep of the weight `x`; they stay as they are."""
        if not x.is_meta:
            keep = weight_keep(x, self.threshold, self.selector)
            self.set_density(_density(int(keep.count_nonzero().item()), x))


def _density(kept: int, weight: Tensor) -> Density:
    return Density(kept / weight.numel() if weight.numel() else 1.0)


def learned_thresholds(gm: nn.Module) -> Iterator[LearnedThreshold]:
    """Those of a compiled model, in the order of its parameters."""
    for module in unwrap(gm).swat.modules():
        if isinstance(module, LearnedThreshold):
            yield module


def penalty(gm: nn.Module) -> Tensor:
    """Sum of exp(-t) over all learned thresholds, 0-dim: what a policy's penalty is a weight of.

    Differentiable, but not to be added to the loss where `swatfx.attach` is used: that adds its
    gradient at every optimizer step.
    """
    parts = [torch.exp(-module.threshold).sum() for module in learned_thresholds(gm)]
    if not parts:
        return torch.zeros(())
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


@torch.no_grad()
def add_penalty(
    gm: nn.Module, weight: float | Mapping[str, float], scale: float | Tensor = 1.0
) -> None:
    """Add the gradient of `weight` * sum exp(-t), which is -weight * exp(-t), to t.grad.

    To be called once an optimizer step, however many backwards came before it. A threshold without
    a gradient, because it is frozen or no loss of this step reached it, gets none.

    Args:
        gm: a compiled model.
        weight: of the penalty; or layer name -> weight, 0 where there is none.
        scale: what gradients are multiplied by when the optimizer sees them (a GradScaler whose
            optimizer unscales them itself).
    """
    for module in learned_thresholds(gm):
        factor = weight.get(module.layer, 0.0) if isinstance(weight, Mapping) else weight
        t = module.threshold
        if factor and t.grad is not None:
            t.grad.sub_(torch.exp(-t).mul_(factor * scale))


@torch.no_grad()
def reset_if_empty(
    gm: nn.Module, least: float = LEAST_DENSITY, layers: Iterable[SparseLayer] | None = None
) -> list[str]:
    """Measure the layers' densities; where one is below `least`, set the thresholds to zero.

    To be called after every optimizer step. Parameters and buffers change in place.

    Args:
        gm: a compiled model.
        least: density below which a layer counts as lost, 1 % in the paper's code.
        layers: to look at, with their weights as they are now; all that take part if None.

    Returns:
        The names of the layers that were reset.
    """
    found = [
        (layer, threshold)
        for layer in (sparse_layers(unwrap(gm)) if layers is None else layers)
        if isinstance(threshold := layer.weight_threshold, LearnedThreshold)
        and not layer.weight.is_meta
    ]
    if not found:
        return []
    device = found[0][0].weight.device
    counts = torch.stack([layer.keep().count_nonzero().to(device) for layer, _ in found])
    reset = []
    # The counts of all layers at once: on a GPU, each transfer would wait for the step to end.
    for (layer, module), kept in zip(found, counts.tolist(), strict=True):
        density = _density(kept, layer.weight)
        if density.value < least:
            module.threshold.zero_()
            density = DENSE
            reset.append(layer.plan.name)
        module.set_density(density)
    return reset


def parameters_to_add(
    gm: nn.Module, optimizer: torch.optim.Optimizer, *, own: bool = False
) -> list[nn.Parameter]:
    """The learned thresholds that `optimizer` does not hold, in the order of gm.parameters().

    All of them if it was made before the model was compiled.

    Args:
        gm: a compiled model.
        optimizer: over its parameters.
        own: only those of layers whose weight it holds, or what the weight is computed from.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = {x.plan.name: x for x in sparse_layers(unwrap(gm))} if own else {}
    found: list[nn.Parameter] = []
    for module in learned_thresholds(gm):
        assert isinstance(module.threshold, nn.Parameter)
        if id(module.threshold) in held:
            continue
        if not own or held & {id(p) for p in weight_parameters(layers[module.layer])}:
            found.append(module.threshold)
    return found


def check_parameters(gm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise AttachError where a learning-rate scheduler keeps thresholds from being added."""
    if parameters_to_add(gm, optimizer, own=True) and _is_scheduled(optimizer):
        raise AttachError(
            "learned thresholds are a parameter group that the scheduler does not know",
            remedy="call swatfx.attach before the learning-rate scheduler is made",
        )


def _is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def add_parameters(
    gm: nn.Module, optimizer: torch.optim.Optimizer, sizes: Sequence[int] | None = None
) -> None:
    """Let `optimizer` train the learned thresholds of its layers that it does not hold yet.

    They become its last parameter group, with the options of the first but without weight decay,
    which would pull them back to zero.

    Args:
        gm: a compiled model.
        optimizer: over the model's parameters.
        sizes: of the parameter groups in a checkpoint that is about to be loaded: where they say
            that the thresholds were no group of their own but the last ones of another (the
            optimizer was made from gm.parameters()), they go there; where they say that it held
            none, nothing is added.

    Raises:
        AttachError: a learning-rate scheduler watches the optimizer, and would not know the group.
    """
    missing = parameters_to_add(gm, optimizer, own=True)
    groups = optimizer.param_groups
    own = [len(group["params"]) for group in groups]
    if sizes is not None and list(sizes) != [*own, len(missing)]:
        # A checkpoint of an earlier version: thresholds of weights that it did not train, too.
        missing = parameters_to_add(gm, optimizer)
    if not missing:
        return
    if sizes is not None and list(sizes) != [*own, len(missing)]:
        for group, now, then in zip(groups, own, sizes, strict=False):
            if len(sizes) == len(own) and then == now + len(missing):
                group["params"].extend(missing)
        return
    check_parameters(gm, optimizer)
    options = {k: v for k, v in groups[0].items() if k not in ("params", "initial_lr")}
    options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    optimizer.add_param_group({"params": missing, **options})
