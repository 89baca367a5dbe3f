"""What training keeps, every so many steps: densities, churn, dead filters, thresholds."""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swatfx.arguments import COUNT, checked, instance
from swatfx.compiled import Pack, SparseLayer, SwatModule, WeightThreshold, sparse_layers, unwrap
from swatfx.compiled.observing import active, stored_share, watching
from swatfx.errors import InputError, SwatWarning
from swatfx.tensors import bits

Scalars = dict[str, float]
# Of a record, by layer; "mean" is over all weights, or over layers where no weights are counted.
WEIGHTS = ("weight_density", "planned_weight_density", "churn", "dead_filters", "dead_channels")
ACTIVATIONS = ("activation_density", "planned_activation_density")


class _Board(Protocol):
    """As `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


_Teller = Callable[[Scalars, int], object]
Target = str | os.PathLike[str] | _Board | _Teller


class TrainingObserver:
    """What `observe_training` returns: watches until `remove()`, or the end of a `with` block."""

    def __init__(
        self, gm: SwatModule, tell: Sequence[Callable[[Scalars, int], object]], every: int
    ):
        self._gm, self._tell, self._every = gm, tell, every
        self._layers = {layer.plan.name: layer for layer in sparse_layers(gm)}
        self._before: dict[str, Tensor] = {}  # bits of the masks at the last record
        self._warned: set[str] = set()
        self._found: Scalars = {}
        self._watched = ExitStack()
        self._handles = [
            gm.register_forward_pre_hook(self._begin),
            gm.register_forward_hook(self._end),
        ]

    def remove(self) -> None:
        """Watch no longer."""
        self._watched.close()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> TrainingObserver:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._watched.close()  # of a forward that failed
        self._found = {}
        trains = module.training and torch.is_grad_enabled()
        if not trains or int(self._gm.swat.clock.iteration) % self._every:
            return
        self._watched.enter_context(watching(self._gm, self._on_weight, self._on_pack))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        found, self._found = self._found, {}
        self._watched.close()
        if not found:
            return
        for name in (*WEIGHTS[:3], *ACTIVATIONS):
            sizes = {n: self._layers[n].plan.parameters for n in self._layers}
            of = {n: v for n in sizes if (v := found.get(f"{name}/{n}")) is not None}
            if of:
                total = sum(sizes[n] for n in of)
                found[f"{name}/mean"] = sum(sizes[n] * v for n, v in of.items()) / total
        step = int(self._gm.swat.clock.iteration) - 1
        for tell in self._tell:
            tell(dict(found), step)

    def _on_weight(self, threshold: WeightThreshold, weight: Tensor, state: Tensor) -> None:
        layer = self._layers.get(threshold.layer)
        if layer is None or not weight.numel():
            return
        name, mask = threshold.layer, active(threshold, weight, state)
        self._found[f"weight_density/{name}"] = float(mask.double().mean())
        self._found[f"planned_weight_density/{name}"] = threshold.density_now.value
        if state.numel() == 1 and state.is_floating_point():
            self._found[f"threshold/{name}"] = float(state)
        packed = bits.mask_to_bits(mask)
        before = self._before.get(name)
        if before is not None and before.shape == packed.shape:
            new = bits.bits_to_mask(packed & ~before, mask.numel()).sum()
            self._found[f"churn/{name}"] = int(new) / max(int(mask.sum()), 1)
        self._before[name] = packed
        filters, channels = dead(mask, _groups(layer))
        self._found[f"dead_filters/{name}"] = float(filters)
        self._found[f"dead_channels/{name}"] = float(channels)
        if filters and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"layer {name!r}: {filters} of {len(mask)} filters have no active weight",
                SwatWarning,
                stacklevel=2,
            )

    def _on_pack(self, pack: Pack, x: Tensor, packed: Tensor) -> None:
        if pack.layer in self._layers:
            name = pack.layer
            self._found[f"activation_density/{name}"] = stored_share(x, packed)
            planned = self._layers[name].node.densities_now.get("activation")
            if planned is not None:
                self._found[f"planned_activation_density/{name}"] = planned


def _groups(layer: SparseLayer) -> int:
    call = layer.node.record.call
    return 1 if call is None else max(call.groups, 1)


def dead(mask: Tensor, groups: int = 1) -> tuple[int, int]:
    """(filters without an active weight, input channels that no active weight reads).

    Args:
        mask: bool, (F, C / groups, *kernel).
        groups: as of the convolution.
    """
    whole = mask.flatten(2).any(2) if mask.dim() > 2 else mask
    filters = ~whole.any(1)
    channels = ~whole.view(groups, -1, whole.shape[1]).any(1)
    return int(filters.sum()), int(channels.sum())


@checked(gm=instance(nn.Module), every=COUNT)
def observe_training(
    gm: nn.Module, to: Target | Sequence[Target], *, every: int = 1
) -> TrainingObserver:
    """Tell, every so many training forwards, what the forward kept.

    By layer: `weight_density` and `activation_density`, realised and `planned_...` (fractions);
    `threshold`, where it is one number; `churn`, the share of the active weights that were not
    active at the last record; `dead_filters` without an active weight and `dead_channels` that no
    active weight reads (numbers). Scalars are called ``quantity/layer``; ``quantity/mean`` is over
    weights. A layer with dead filters is warned of once. Training goes on as it would, bit for bit;
    steps that are not recorded cost nothing, one that is a few passes over all weights. Forwards of
    `torch.compile(gm)` are not seen: call `gm` itself at steps to be recorded.

    Args:
        gm: a compiled model, or one wrapped by DistributedDataParallel.
        to: a path (a line of JSON a record, appended), a TensorBoard SummaryWriter, a callable of
            the scalars and the step (``wandb.log``, ``lambda s, step: mlflow.log_metrics(s,
            step)``), or several of these.
        every: steps from one record to the next. Steps are training forwards, counted by the clock
            that checkpoints remember.

    Returns:
        The observer, whose `remove()` ends it; also a context manager.

    Raises:
        InputError: `to` is none of these, or a folder that is not there.
        SwatWarning: (warned) some filters of a layer have no active weight.
    """
    targets = list(to) if isinstance(to, (list, tuple)) else [to]
    return TrainingObserver(unwrap(gm), [_teller(target) for target in targets], every)


def _teller(target: Any) -> _Teller:
    if isinstance(target, (str, os.PathLike)):
        path = pathlib.Path(target)
        if not str(target) or not path.parent.is_dir() or path.is_dir():
            raise InputError(
                "records cannot be written there",
                value=str(target),
                remedy="name a file in a folder that exists",
            )
        return lambda scalars, step: _append(path, scalars, step)
    if hasattr(target, "add_scalar"):
        return lambda scalars, step: _add_scalars(target, scalars, step)
    if callable(target):
        told: _Teller = target
        return told
    raise InputError(
        "nobody to tell", value=type(target).__name__, remedy="pass a path, a writer or a callable"
    )


def _append(path: pathlib.Path, scalars: Mapping[str, float], step: int) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **scalars}) + "\n")


def _add_scalars(board: _Board, scalars: Mapping[str, float], step: int) -> None:
    for name, value in scalars.items():
        board.add_scalar(name, value, step)
