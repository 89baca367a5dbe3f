"""Training recipes of the paper as presets (appendix A.10, tables 5 to 7), and one of ours.

A recipe says what stands beside the sparsity policy: epochs, batch size, the learning rate over
the epochs, momentum, decay, label smoothing, and the Top-K period.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from swatfx.errors import InputError, UnknownNameError

__all__ = ["RECIPES", "Recipe", "learning_rate", "make_optimizer", "recipe_for", "recipe_named"]


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one kind of training run, all with SGD and cross entropy.

    ``learning_rates`` holds (last epoch, rate) pairs in rising order, epochs counted from 1 as
    in the paper's tables: ((50, 0.1), (100, 0.01)) is 0.1 for epochs 1-50, 0.01 for 51-100.
    ``warmup_epochs`` is the length of a linear warm-up from zero. ``norm_weight_decay`` says
    whether weight decay acts on the parameters of normalisation layers. ``period`` is the
    number of training iterations between two Top-K computations. ``source`` says where the
    numbers come from.
    """

    name: str
    epochs: int
    batch_size: int
    learning_rates: tuple[tuple[int, float], ...]
    momentum: float
    nesterov: bool
    weight_decay: float
    norm_weight_decay: bool
    label_smoothing: float
    warmup_epochs: int
    period: int
    source: str

    def __post_init__(self) -> None:
        """Raise :class:`InputError` unless the learning rates cover exactly the epochs."""
        last = [epoch for epoch, _ in self.learning_rates]
        if not last or last != sorted(set(last)) or last[-1] != self.epochs or last[0] < 1:
            raise InputError(
                f"the learning rates of recipe {self.name} do not cover its epochs",
                value=self.learning_rates,
                remedy=f"give rising last epochs, the last of them {self.epochs}",
            )

    def with_base_rate(self, rate: float) -> Recipe:
        """Return the recipe with every learning rate scaled so that the first is ``rate``."""
        if not (math.isfinite(rate) and rate > 0):
            raise InputError("a learning rate must be positive and finite", value=rate)
        first = self.learning_rates[0][1]
        rates = tuple((last, rate * (value / first)) for last, value in self.learning_rates)
        return replace(self, learning_rates=rates)


_CIFAR = Recipe(
    name="cifar-resnet",
    epochs=150,
    batch_size=128,
    learning_rates=((50, 0.1), (100, 0.01), (150, 0.001)),
    momentum=0.9,
    nesterov=False,
    weight_decay=5e-4,
    norm_weight_decay=True,  # table 5 exempts nothing, unlike table 7
    label_smoothing=0.0,
    warmup_epochs=0,
    period=1,
    source="appendix table 5, ResNet-18, 50, 101",
)
_IMAGENET = Recipe(
    name="imagenet",
    epochs=90,
    batch_size=256,
    learning_rates=((30, 0.1), (60, 0.01), (80, 0.001), (90, 0.0001)),
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-4,
    norm_weight_decay=False,
    label_smoothing=0.1,
    warmup_epochs=5,
    period=1000,
    source="appendix table 7, unstructured (policies with scope nchw)",
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _CIFAR,
        replace(_CIFAR, name="cifar-vgg", source="appendix table 5, VGG-16"),
        replace(
            _CIFAR, name="cifar-densenet", batch_size=64, source="appendix table 5, DenseNet-121"
        ),
        replace(
            _CIFAR,
            name="cifar-wrn",
            epochs=200,
            learning_rates=((60, 0.1), (120, 0.02), (160, 0.004), (200, 0.0008)),
            nesterov=True,
            source="appendix table 6, WRN-28-10; its dropout of 0.3 belongs to the model",
        ),
        _IMAGENET,
        replace(
            _IMAGENET,
            name="imagenet-structured",
            source="appendix table 7, structured (policies with scope channel)",
        ),
        Recipe(
            name="digits",
            epochs=15,
            batch_size=64,
            learning_rates=((10, 0.1), (13, 0.02), (15, 0.004)),
            momentum=0.9,
            nesterov=False,
            weight_decay=5e-4,
            norm_weight_decay=True,
            label_smoothing=0.0,
            warmup_epochs=0,
            period=1,
            source="of this project: scikit-learn's digits in seconds on a CPU",
        ),
    )
}
"""Every preset by name."""


def recipe_named(name: str) -> Recipe:
    """Return the preset ``name``; raise :class:`UnknownNameError` if there is none."""
    try:
        return RECIPES[name]
    except KeyError:
        raise UnknownNameError("recipe", name, RECIPES) from None


def recipe_for(model_name: str, data_name: str) -> Recipe:
    """Return the paper's recipe for training ``model_name`` on ``data_name``.

    The data set decides between ``imagenet``, ``digits`` and the CIFAR tables, the network's
    name between the columns of those; what neither names (fake data, a network of one's own)
    gets ``cifar-resnet``. ``imagenet-structured`` is never chosen: ask for it by name.
    """
    if data_name in ("imagenet", "digits"):
        return RECIPES[data_name]
    model = model_name.lower()
    for part, name in (
        ("vgg", "cifar-vgg"),
        ("densenet", "cifar-densenet"),
        ("wrn", "cifar-wrn"),
        ("wide", "cifar-wrn"),
    ):
        if part in model:
            return RECIPES[name]
    return RECIPES["cifar-resnet"]


def learning_rate(recipe: Recipe, epoch: int, progress_in_epoch: float, total_epochs: int) -> float:
    """Return the learning rate at a point of a run of ``total_epochs`` epochs.

    ``epoch`` counts from 0; ``progress_in_epoch`` is the fraction of it that is done, in
    [0, 1). A run longer or shorter than the recipe stretches or shrinks the whole schedule,
    warm-up included; a rate may then change within an epoch.
    """
    if total_epochs < 1:
        raise InputError("a run needs at least one epoch", value=total_epochs)
    position = (epoch + progress_in_epoch) * recipe.epochs / total_epochs
    if position < recipe.warmup_epochs:
        return recipe.learning_rates[0][1] * position / recipe.warmup_epochs
    for last, rate in recipe.learning_rates:
        # Without the slack, 1/3 of 150 epochs done may round to just under 50.
        if position < last - 1e-9:
            return rate
    return recipe.learning_rates[-1][1]


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.SGD:
    """Return SGD over the parameters of ``model`` as the recipe asks, at its first rate.

    Without ``norm_weight_decay``, the parameters of batch, instance, group and layer
    normalisation form a second parameter group that does not decay (appendix table 7).
    """
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    exempt: set[nn.Parameter] = set()
    if not recipe.norm_weight_decay:
        for module in model.modules():
            if isinstance(module, norms):
                exempt.update(module.parameters(recurse=False))
    decayed = [parameter for parameter in model.parameters() if parameter not in exempt]
    spared = [parameter for parameter in model.parameters() if parameter in exempt]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return torch.optim.SGD(
        groups,
        lr=recipe.learning_rates[0][1],
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
