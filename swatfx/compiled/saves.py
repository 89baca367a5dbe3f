"""Leaf modules that norms, ReLUs, pools and dropouts of a compiled graph became: they save less.

They hold nothing of their own. A norm's parameters, buffers and flags stay where the model has
them, and are looked up at every call. Where no gradient will be asked for they do what eager does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swatfx import ops
from swatfx.ops import direct
from swatfx.ops.calls import NormCall
from swatfx.ops.norm import EXACT, NOTHING
from swatfx.ops.pool import MOST_CELLS
from swatfx.tensors import layouts

# Which operand of a norm's addition is written, where it was an augmented assignment.
NORM, RESIDUAL = "norm", "residual"
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    if not torch.is_grad_enabled():
        return False
    for one in tensors:
        if one is not None and one.requires_grad:
            return True
    return False


def _ours(x: Tensor) -> bool:
    """Whether torch itself would leave the layout of `x`."""
    return layouts.layout_of(x) == layouts.BATCH_INNERMOST


def _in_rows(x: Tensor) -> bool:
    """Whether `x` are row-major images on the CPU: torch finds maxima at a tenth of our rate."""
    return x.device.type == "cpu" and x.is_contiguous()


class Saver(nn.Module):
    """A leaf whose `plain` does, for the arguments of `forward`, what eager does and keeps."""

    plain: Callable[..., Any]


class Saves(nn.Module):
    """Container of the leaves, below `swat`."""


class Relu(Saver):
    """ReLU."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Keep a bit an element; `inplace` says that nobody else reads `x`."""
        if not wanted(x):
            return F.relu(x, inplace)
        y: Tensor = ops.relu(x)[0]
        return y

    def plain(self, x: Tensor, inplace: bool = False) -> Tensor:
        """As in eager."""
        return F.relu(x)


class MaxPool2d(Saver):
    """Max pooling; arguments as in `F.max_pool2d`, in pairs."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Keep a byte an output."""
        asked, window = wanted(x), args[0][0] * args[0][1]
        if x.dim() != 4 or window > MOST_CELLS or not (asked or _in_rows(x) or _ours(x)):
            return self.plain(x, *args)
        y: Tensor = ops.max_pool2d(x, *args, asked)[0]
        return y

    def plain(self, x: Tensor, *args: Any) -> Tensor:
        """As in eager."""
        y: Tensor = F.max_pool2d(x, *args)
        return y


class AvgPool2d(Saver):
    """Average pooling; arguments as in `F.avg_pool2d`, in pairs."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Keep nothing."""
        if x.dim() != 4 or not (wanted(x) or _ours(x)):
            return self.plain(x, *args)
        y: Tensor = ops.avg_pool2d(x, *args)
        return y

    def plain(self, x: Tensor, *args: Any) -> Tensor:
        """As in eager."""
        return F.avg_pool2d(x, *args)


class Dropout(Saver):
    """Dropout as a function."""

    def forward(self, x: Tensor, p: float, training: bool) -> Tensor:
        """Keep a bit an element, in training."""
        if not (training and 0 < p < 1 and wanted(x)):
            return F.dropout(x, p, training)
        y: Tensor = ops.dropout(x, p)[0]
        return y

    def plain(self, x: Tensor, p: float, training: bool) -> Tensor:
        """As in eager."""
        return F.dropout(x, p, training)


class Bound(Saver):
    """Stands in for a module of the model, which may change, or be changed for another, later."""

    def __init__(self, owner: nn.Module, name: str, path: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # a reference, not a child: its parameters have their names
        self.name = name
        self.path = path

    @property
    def module(self) -> Any:
        """The module that it stands in for, as it is now."""
        return getattr(self.__dict__["owner"], self.name)


class DropoutOf(Bound):
    """A dropout module of the model."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep a bit an element, in training."""
        module = self.module
        if is_changed(module, (nn.Dropout,)) or not (0 < module.p < 1 and wanted(x)):
            return self.plain(x)
        if not module.training:
            return x
        y: Tensor = ops.dropout(x, module.p)[0]
        return y

    def plain(self, x: Tensor) -> Tensor:
        """As in eager, but not in place."""
        module = self.module
        if isinstance(module, nn.Dropout) and module.inplace:
            return F.dropout(x, module.p, module.training)
        y: Tensor = module(x)
        return y


def is_changed(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether `module` has become another kind, or was given hooks or another forward."""
    if type(module) not in kinds or "forward" in module.__dict__:
        return True
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Then(NamedTuple):
    """What follows a norm, and is one with it.

    Attributes:
        residual: what is added to the norm's result.
        relu: whether ReLU follows.
        into: where the addition was an augmented assignment, which operand it writes (`NORM` or
            `RESIDUAL`), and so decides dtype and shape. Nobody else reads that.
        inplace: whether the ReLU was one in place; a hook on the norm can tell.
    """

    residual: Tensor | None = None
    relu: bool = False
    into: str | None = None
    inplace: bool = False

    def of(self, y: Tensor) -> Tensor:
        """As in eager, of the norm's result."""
        y = self.sum(y)
        return F.relu(y, self.inplace) if self.relu else y

    def sum(self, y: Tensor) -> Tensor:
        """The addition alone."""
        if self.residual is None or self.into is None:
            return y if self.residual is None else y + self.residual
        return y.add_(self.residual) if self.into == NORM else self.residual.add_(y)

    def fits(self, y: Tensor) -> bool:
        """Whether the sum is of the dtype and shape of `y`."""
        other = self.residual
        return other is None or (y.dtype == other.dtype and y.shape == other.shape)

    def finish(self, y: Tensor) -> Tensor:
        """`of` a norm's own output that nobody else reads and no gradient is for."""
        if self.residual is not None:
            y = y.add_(self.residual) if self.fits(y) else self.sum(y)
        return F.relu(y, True) if self.relu else y


class Norm(Saver):
    """Batch norm as a function, with the addition and the ReLU that follow it."""

    def __init__(self, saves: str) -> None:
        super().__init__()
        self.saves = saves

    def forward(self, x: Tensor, *args: Any, **follows: Any) -> Tensor:
        """`[relu](F.batch_norm(x, *args) [+ residual])`; what `follows` as in `Then`."""
        then = Then(**follows)
        running_mean, running_var, weight, bias, training, momentum, eps = args
        asked = wanted(x, then.residual, weight, bias)
        if not asked and not _ours(x):
            return then.finish(F.batch_norm(x, *args))
        call = NormCall(training, momentum, eps, then.relu, self.saves)
        return _norm(call, x, then, weight, bias, (running_mean, running_var))

    def plain(self, x: Tensor, *args: Any, **follows: Any) -> Tensor:
        """As in eager."""
        return Then(**follows).of(F.batch_norm(x, *args))


class NormOf(Bound):
    """A batch norm module of the model, with the addition and the ReLU that follow it."""

    def __init__(self, owner: nn.Module, name: str, path: str, saves: str) -> None:
        super().__init__(owner, name, path)
        self.saves = saves

    def forward(self, x: Tensor, **follows: Any) -> Tensor:
        """`[relu](norm(x) [+ residual])`, in the mode of the norm; what `follows` as in `Then`."""
        then, norm = Then(**follows), self.module
        if is_changed(norm, NORMS):
            return then.of(norm(x))
        weight, bias = norm.weight, norm.bias  # looked up by Python, each time that they are read
        if not _ours(x) and not wanted(x, then.residual, weight, bias):
            return then.finish(norm(x))
        norm._check_input_dim(x)
        momentum, tracks = norm.momentum, norm.track_running_stats
        statistics = (norm.running_mean, norm.running_var)
        if norm.training:
            count = norm.num_batches_tracked if tracks else None
            if count is not None:
                count.add_(1)
                if momentum is None:
                    momentum = 1.0 / float(count)
            if not tracks:
                statistics = (None, None)
        training = norm.training or statistics == (None, None)
        momentum = 0.0 if momentum is None else momentum
        call = NormCall.of((training, momentum, norm.eps, then.relu, self.saves))
        return _norm(call, x, then, weight, bias, statistics)

    def plain(self, x: Tensor, **follows: Any) -> Tensor:
        """As in eager."""
        return Then(**follows).of(self.module(x))


def _norm(
    call: NormCall,
    x: Tensor,
    then: Then,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Run the op, and write the running statistics."""
    mean, var = statistics
    if (mean is not None and mean.requires_grad) or (var is not None and var.requires_grad):
        # Eager has no gradient for these, and says so where it is asked for one.
        y = F.batch_norm(x, *statistics, weight, bias, call.training, call.momentum, call.eps)
        return then.of(y)
    if call.training and (x.numel() == x.shape[1] or not call.eps > 0):
        # One value a channel, or an eps that may divide by zero: eager's own error tells it.
        F.batch_norm(x, None, None, weight, bias, True, call.momentum, call.eps)
    if not then.fits(x):
        y = then.sum(_norm(replace(call, relu=False), x, Then(), weight, bias, statistics))
        return _relu(y) if call.relu else y
    trains_weight = weight is not None and weight.requires_grad
    if not wanted(x, then.residual, weight, bias):
        call = replace(call, saves=NOTHING)
    elif call.saves != EXACT and not call.training and not trains_weight:
        call = replace(call, saves=EXACT)  # a frozen norm needs nothing of its input
    args = (x, then.residual, weight, bias, *statistics)
    try:
        y, _, _, *new, _ = direct.call(ops.batch_norm, *args, *call.options)
    except Exception:
        # Recomputation under checkpoints ends by an exception where the last tensor is kept; eager
        # has moved the statistics by then.
        if call.training and not torch.compiler.is_compiling():
            with torch.no_grad(), suppress(Exception):
                _, _, _, *new, _ = ops.batch_norm(*args, *replace(call, saves=NOTHING).options)
                _move(statistics, new)
        raise
    if call.training:
        _move(statistics, new)
    result: Tensor = y
    return result


def _move(statistics: tuple[Tensor | None, Tensor | None], new: Sequence[Tensor]) -> None:
    for running, moved in zip(statistics, new, strict=True):
        if running is not None:
            running.copy_(moved)


def _relu(x: Tensor) -> Tensor:
    y: Tensor = ops.relu(x)[0] if wanted(x) else F.relu(x)
    return y
