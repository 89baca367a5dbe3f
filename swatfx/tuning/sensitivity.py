"""How much is lost, layer by layer, where a layer keeps fewer of its weights and activations.

A first-order estimate from a few batches. Dropping weights moves a layer's weight w by some delta,
and the loss of a batch by <g, delta>, g being its gradient. Two things are made of that.

How much a layer matters: a delta of relative power r, spread over the weights as they are and of
random signs, moves the loss by <g, delta>, of mean square r * sum(E[g^2] * w^2). That sum is the
layer's *importance*; the mean E is over batches, so that directions which cancel out in the mean
gradient count.

How large the relative power is at density d: Top-K keeps a share e(d) of the sum of w^2. What is
left of the layer's signal is scaled up again, by the norm that follows or by training, and what was
dropped stands against it as noise of relative power 1/e - 1. So the loss of a layer at density d is

    importance * (1 / e(d) - 1)

It is 0 for a dense layer and grows without bound as a layer starves. The sum of squared Taylor
terms over the dropped weights, importance * (1 - e), does not: a search over it lets layers
vanish, which no training from scratch makes up for.

Activations that are dropped change the weight gradient, not the loss. Their noise-to-signal ratio
is of the same form, and counts as much as that of the weight itself: measured on a network trained
from scratch, equal densities of weights and activations were then best, as the paper has them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from swatfx import kernels, selectors
from swatfx.compiled import (
    ActivationThreshold,
    SparseLayer,
    SwatModule,
    WeightThreshold,
    sparse_layers,
)
from swatfx.density import DENSE, Density
from swatfx.errors import InputError, SwatError
from swatfx.selectors import Axes

Floats = npt.NDArray[np.float64]
LossFunction = Callable[..., Tensor]

_SAMPLE = 1 << 16  # elements of an activation that its curve is read off


@dataclass(frozen=True)
class Sensitivity:
    """What a layer loses, at each density of a grid.

    Attributes:
        grid: densities, rising to 1.
        importance: layer -> mean squared first-order change of the loss under noise in its weight,
            a unit of relative power.
        weight_energy: layer -> share of the sum of squared weights that is kept, on the grid.
        activation_energy: layer -> likewise of its input.
    """

    grid: tuple[float, ...]
    importance: Mapping[str, float]
    weight_energy: Mapping[str, Floats]
    activation_energy: Mapping[str, Floats]

    def weight_loss(self, layer: str) -> Floats:
        """Loss by dropped weights, on the grid; falling, 0 where all are kept."""
        return self.importance[layer] * _noise(self.weight_energy[layer])

    def activation_loss(self, layer: str) -> Floats:
        """Loss by dropped activations, on the grid; counts as much."""
        return self.importance[layer] * _noise(self.activation_energy[layer])


def _noise(energy: Floats) -> Floats:
    """Noise over signal; falling along the grid."""
    ratio = 1 / np.clip(energy, 1e-12, 1.0) - 1
    return np.minimum.accumulate(ratio)


def batches_of(data: Iterable[Any], count: int) -> list[tuple[tuple[Any, ...], Any]]:
    """The first `count` batches as (positional inputs, labels or None).

    Raises:
        InputError: there is none, or one is neither a tensor nor a pair.
    """
    found = []
    for batch in islice(data, count):
        if isinstance(batch, Tensor):
            found.append(((batch,), None))
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            inputs, labels = batch
            found.append((inputs if isinstance(inputs, tuple) else (inputs,), labels))
        else:
            raise InputError(
                "a batch is (inputs, labels), or a tensor of inputs",
                value=type(batch).__name__,
                remedy="several inputs go as ((a, b), labels)",
            )
    if not found:
        raise InputError("the data hold no batch", remedy="an iterator may be used up already")
    return found


def sensitivity(
    gm: SwatModule,
    batches: Sequence[tuple[tuple[Any, ...], Any]],
    loss_fn: LossFunction | None,
    grid: Sequence[float],
    *,
    quiet: bool = False,
) -> Sensitivity:
    """Measure at the weights that `gm` has, all of them active, in training mode.

    Nothing of `gm` changes, nor does the random state: a copy is run.

    Args:
        gm: the compiled model.
        batches: as `batches_of` gives them.
        loss_fn: (output, labels) -> scalar, or output -> scalar where there are no labels; None is
            cross entropy.
        grid: densities, rising to 1.
        quiet: show no progress bar.

    Raises:
        SwatError: a loss is not finite.
        InputError: no layer has a gradient.
    """
    twin = _measured_copy(gm)
    layers = {layer.plan.name: layer for layer in sparse_layers(twin)}
    sources = {name: _activation_threshold(twin, layer) for name, layer in layers.items()}
    squares = dict.fromkeys(layers, 0.0)
    energies: dict[ActivationThreshold, list[Floats]] = {}
    # With all weights active, dense kernels are the fast ones.
    with (
        kernels.reference_only(),
        _random_state_kept(twin),
        _watched(twin, energies, grid) as weights,
    ):
        for index, (inputs, labels) in enumerate(tqdm(batches, "tune", disable=quiet or None)):
            weights.clear()
            twin.zero_grad(set_to_none=True)
            loss = _loss(twin(*inputs), labels, loss_fn)
            if loss.dim() or not math.isfinite(loss.item()):
                raise SwatError(
                    f"the loss of batch {index + 1} is not a finite number",
                    value=loss.item() if not loss.dim() else tuple(loss.shape),
                    remedy="tune a model that trains: after fewer steps, or at a lower rate",
                )
            torch.autograd.backward(loss)
            for name, seen in weights.items():
                squares[name] += _weighted_square(seen)
    if not any(value > 0 for value in squares.values()):
        raise InputError("no layer has a gradient", remedy="train a few steps first")
    count = len(batches)
    dense = np.ones(len(grid))
    return Sensitivity(
        tuple(grid),
        {name: value / count for name, value in squares.items()},
        {name: _weight_energy(layer, grid) for name, layer in layers.items()},
        {
            name: np.mean(energies[source], axis=0) if source in energies else dense
            for name, source in sources.items()
        },
    )


def _loss(output: Any, labels: Any, loss_fn: LossFunction | None) -> Tensor:
    if loss_fn is None and labels is None:
        raise InputError(
            "batches without labels want a loss function", remedy="give loss_fn=..., or labels"
        )
    if labels is None:
        assert loss_fn is not None
        return loss_fn(output)
    return (loss_fn or F.cross_entropy)(output, labels)


def _measured_copy(gm: SwatModule) -> SwatModule:
    """A copy with parameters of its own, in training mode, with all weights active and trained."""
    twin = copy.deepcopy(gm)
    twin.train()
    twin.swat.clock.optimizer_wanted_by = None
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    for _, threshold in twin.swat.thresholds():
        threshold.set_density(DENSE)
        threshold.period = 1  # it takes effect at the next forward
    return twin


@contextmanager
def _random_state_kept(gm: nn.Module) -> Iterator[None]:
    devices = {p.device.index for p in gm.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


@contextmanager
def _watched(
    gm: SwatModule, energies: dict[ActivationThreshold, list[Floats]], grid: Sequence[float]
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the weights that layers run with, and what Top-K would keep of their inputs."""
    weights: dict[str, list[Tensor]] = {}

    def on_weight(module: nn.Module, args: Any) -> None:
        assert isinstance(module, WeightThreshold)
        weight, seen = args[0], weights.setdefault(module.layer, [])
        if weight.requires_grad and not any(weight is other for other in seen):
            weight.retain_grad()
            seen.append(weight)

    def on_activation(module: nn.Module, args: Any) -> None:
        assert isinstance(module, ActivationThreshold)
        energies.setdefault(module, []).append(_activation_energy(args[0].detach(), grid))

    handles = []
    for module in gm.swat.modules():
        if isinstance(module, WeightThreshold):
            handles.append(module.register_forward_pre_hook(on_weight))
        elif isinstance(module, ActivationThreshold):
            handles.append(module.register_forward_pre_hook(on_activation))
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def _activation_threshold(gm: SwatModule, layer: SparseLayer) -> ActivationThreshold | None:
    """The threshold of the layer's input, which may be another layer's; None if it has none."""
    node = layer.node.activation_state
    if node is None:
        return None
    module = gm.swat.get_submodule(str(node.target).removeprefix("swat."))
    assert isinstance(module, ActivationThreshold)
    return module


def _weighted_square(weights: Sequence[Tensor]) -> float:
    """Sum of (g w)^2 over a weight; one that is computed anew at each call has several tensors."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients:
        return 0.0
    gradient = torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]
    return float((gradient * weights[0].detach()).double().square().sum().item())


@torch.no_grad()
def _weight_energy(layer: SparseLayer, grid: Sequence[float]) -> Floats:
    """Share of the sum of squared weights that the layer's selector keeps, on the grid."""
    weight = layer.weight.detach()
    chosen = selectors.get(layer.plan.weight_selector)
    if chosen.ranks_magnitudes and not chosen.groups:
        return _magnitude_energy(weight.reshape(-1), grid)
    axes, squares = Axes.of(weight.dim(), weight.dim() - 2, True), weight.double().square()
    kept = []
    for value in grid:
        state = chosen.state(weight, Density(value), axes, layer.plan.rule.seed)
        kept.append(float((squares * chosen.keep(weight, state, axes)).sum().item()))
    return np.asarray(kept) / max(float(squares.sum().item()), 1e-300)


def _activation_energy(x: Tensor, grid: Sequence[float]) -> Floats:
    """Likewise of an activation under one threshold, read off a part of it if it is large."""
    flat = x.reshape(-1)
    # An odd step, so that it visits all positions of the powers of two that shapes are made of.
    return _magnitude_energy(flat[:: flat.numel() // _SAMPLE | 1], grid)


def _magnitude_energy(flat: Tensor, grid: Sequence[float]) -> Floats:
    """Share of the sum of squares that the largest elements of a vector hold, on the grid."""
    sums = flat.double().square().sort(descending=True).values.cumsum(0)
    if not flat.numel() or not float(sums[-1].item()):
        return np.ones(len(grid))
    counts = torch.tensor([Density(value).count(flat.numel()) for value in grid])
    kept = sums[(counts - 1).to(sums.device)] / sums[-1]
    result: Floats = kept.cpu().numpy()
    return result
