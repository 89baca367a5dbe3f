"""The networks of the paper, by name.

The CIFAR networks (``cifar/...``) are written out here, one family a file, because the paper's
tables hold for exact variants of them (3x3 stem, no max-pool, where biases sit); `create` lists
their parameter and convolution counts. ImageNet networks come from torchvision, without pretrained
weights unless the caller asks for them, so that nothing is downloaded by surprise.

Every network of this package is traceable by `torch.fx.symbolic_trace`: what depends on train or
eval mode (dropout, batch norm) is a submodule, and each ReLU is a submodule of its own and not in
place, so that a pass can name and rewrite each activation by itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from swatfx.errors import InputError, SwatError, UnknownNameError
from swatfx.models.densenet import DenseNet
from swatfx.models.digits import DigitsCNN
from swatfx.models.resnet import ResNet
from swatfx.models.resolve import build, build_with_inputs
from swatfx.models.vgg import VGG
from swatfx.models.wide_resnet import WideResNet

__all__ = ["create", "default_input_shape", "names", "resolve", "resolve_on_meta"]
__all__ += ["resolve_with_inputs"]


class _Entry(NamedTuple):
    """One network of this package: its builder and the shape of one input."""

    builder: Callable[..., nn.Module]
    shape: tuple[int, ...] = (3, 32, 32)


def _wide(depth: int, width: int) -> _Entry:
    """Return the entry of WRN-depth-width."""
    return _Entry(functools.partial(WideResNet, depth, width))


def _bottleneck(*blocks: int) -> _Entry:
    """Return the entry of a ResNet of bottleneck blocks."""
    widths = (256, 512, 1024, 2048)
    return _Entry(functools.partial(ResNet, blocks, widths, (1, 3, 1), stem=64, bias=True))


def _basic(*blocks: int, stem: int, bias: bool) -> _Entry:
    """Return the entry of a ResNet of basic blocks whose width doubles at each stage."""
    widths = tuple(stem << stage for stage in range(len(blocks)))
    return _Entry(functools.partial(ResNet, blocks, widths, (3, 3), stem=stem, bias=bias))


_OWN = MappingProxyType(
    {
        "cifar/vgg16": _Entry(VGG),
        "cifar/wrn-16-8": _wide(16, 8),
        "cifar/wrn-28-10": _wide(28, 10),
        "cifar/densenet121": _Entry(functools.partial(DenseNet, (6, 12, 24, 16))),
        "cifar/resnet18": _basic(2, 2, 2, 2, stem=64, bias=True),
        "cifar/resnet50": _bottleneck(3, 4, 6, 3),
        "cifar/resnet101": _bottleneck(3, 4, 23, 3),
        "cifar/resnet20": _basic(3, 3, 3, stem=16, bias=False),
        "cifar/resnet32": _basic(5, 5, 5, stem=16, bias=False),
        "cifar/resnet32x2": _basic(5, 5, 5, stem=32, bias=False),
        "digits/cnn": _Entry(DigitsCNN, (1, 8, 8)),
    }
)


def _torchvision() -> ModuleType:
    """Import torchvision's models late: it takes seconds, and the CIFAR networks do without."""
    from torchvision import models

    module: ModuleType = models
    return module


def _check_torchvision(name: str) -> ModuleType:
    """Return torchvision's models, once `name` is known to be a network there that we take."""
    models = _torchvision()
    segmentation: list[str] = models.list_models(module=models.segmentation)
    known = [*names(), *segmentation]
    if name not in known:
        raise UnknownNameError("model", name, known)
    return models


def names() -> list[str]:
    """Return the networks of this package, then torchvision's classifiers.

    `create` takes torchvision's segmentation networks too; they are not listed, because what they
    return is a dict and not logits.
    """
    models = _torchvision()
    classification: list[str] = models.list_models(module=models)
    return [*_OWN, *classification]


def default_input_shape(name: str) -> tuple[int, ...]:
    """Return the shape of one input of the network `name`, without the batch dimension.

    (3, 32, 32) for ``cifar/...``, (1, 8, 8) for ``digits/cnn``, (3, 299, 299) for ``inception_v3``
    and (3, 224, 224) for the rest of torchvision. Raises UnknownNameError, which gives the nearest
    names, where there is no such network.
    """
    if name in _OWN:
        return _OWN[name].shape
    _check_torchvision(name)
    side = 299 if name == "inception_v3" else 224
    return (3, side, side)


def create(name: str, *, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """Build the network `name`, freshly initialised and in training mode.

    The networks of the paper (its section 4.1) map (N, 3, 32, 32) to (N, 10) on CIFAR and
    (N, 3, 224, 224) to (N, 1000) on ImageNet:

    ==================  ==========  ============  ==================================================
    name                parameters  convolutions  variant
    ==================  ==========  ============  ==================================================
    cifar/vgg16         33,646,666            13  biases and batch norm; 512-4096-4096; dropout 0.5
    cifar/wrn-16-8      10,961,370            16  pre-activation; no biases; dropout 0.3
    cifar/wrn-28-10     36,479,194            28  the same
    cifar/densenet121    6,956,298           120  growth 32, compression 1/2; no biases
    cifar/resnet18      11,178,762            20  biases on all convolutions
    cifar/resnet50      23,547,402            53  the same, bottlenecks
    cifar/resnet101     42,565,642           104  the same, bottlenecks
    resnet50            25,557,032            53  torchvision
    wide_resnet50_2     68,883,240            53  torchvision
    ==================  ==========  ============  ==================================================

    Beside them, not in the paper: ``cifar/resnet20`` (272,474 parameters, 21 convolutions without
    biases, the two shortcuts that change shape being projections), ``cifar/resnet32`` (466,906 and
    33) and ``cifar/resnet32x2`` (1,860,522 and 33; twice as wide, what SSC is measured on) of the
    same form, ``digits/cnn`` (65,834 and 4) for scikit-learn's digits, (N, 1, 8, 8) to (N, 10), and
    every classification or segmentation network of torchvision under its name there.

    `num_classes` is the width of the classifier; where None, the network's own default stands (10
    here, 1000 for torchvision's classifiers). `kwargs` go to the builder: `dropout` for
    ``cifar/vgg16`` and ``cifar/wrn-...``, `growth` for ``cifar/densenet121``, `width` for
    ``digits/cnn``, and what torchvision documents for its own (`weights` among them: nothing is
    downloaded unless it is given). Raises UnknownNameError, which gives the nearest names, where
    there is no such network.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if name in _OWN:
        return _OWN[name].builder(**kwargs)
    models = _check_torchvision(name)
    config: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        # its default is a pretrained backbone even where weights is None
        config["weights_backbone"] = None
    if name in ("googlenet", "inception_v3") and kwargs.get("weights") is None:
        # the default, None, warns that it will change; True is what it means today, and torchvision
        # refuses it beside pretrained weights
        config["init_weights"] = True
    model: nn.Module = models.get_model(name, **(config | kwargs))
    return model


def resolve(spec: str, num_classes: int | None = None) -> nn.Module:
    """Build the network `spec`: a name that `create` knows, or ``package.module:callable``.

    Raises UnknownNameError or InputError where there is no such thing, or it cannot be built.
    """
    with _built(spec):
        return _resolve(spec, num_classes)


def resolve_with_inputs(spec: str, num_classes: int | None = None) -> tuple[nn.Module, Any, Any]:
    """As `resolve`, with what a callable returns beside the model: example inputs and a loss.

    A callable returns a model, (model, inputs) or (model, inputs, loss); what is not there is None.
    """
    with _built(spec):
        if ":" in spec:
            return build_with_inputs(spec, num_classes)
        return create(spec, num_classes=num_classes), None, None


@contextlib.contextmanager
def _built(spec: str) -> Iterator[None]:
    """Raise what goes wrong inside as InputError about `spec`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, SwatError):
            raise
        raise InputError(
            f"the model cannot be built: {type(error).__name__}: {error}", value=spec
        ) from error


def _resolve(spec: str, num_classes: int | None) -> nn.Module:
    if ":" in spec:
        return build(spec, num_classes)
    return create(spec, num_classes=num_classes)


def resolve_on_meta(spec: str, num_classes: int | None = None) -> nn.Module:
    """As `resolve`, but on the meta device, where nothing is allocated; raises what it raises.

    Some builders read the values of their weights, which that device does not have; their networks
    are built on the CPU.
    """
    try:
        with torch.device("meta"):
            return _resolve(spec, num_classes)
    except (NotImplementedError, RuntimeError):
        return resolve(spec, num_classes)
