"""The model of a case in plain PyTorch, and its twin in float64 whose layers are the oracle's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.cases import LayerCase
from tests.fuzz.methods import Method
from tests.fuzz.plain import NOW, Layer, Op, WeightMemory, sum_magnitudes
from tests.fuzz.tensors import draw, seen

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Functional(nn.Module):
    """A module's weights, used by F.conv2d and the like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = module.weight, module.bias
        self.options = self.convolve = None
        if not isinstance(module, nn.Linear):
            self.options = (module.stride, module.padding, module.dilation, module.groups)
            self.convolve = FUNCTIONS[module.weight.dim() - 2]

    def forward(self, x: Tensor) -> Tensor:
        if self.options is None:
            return F.linear(x, self.weight, self.bias)
        return self.convolve(x, self.weight, self.bias, *self.options)


def activate(name: str, x: Tensor) -> Tensor:
    """An elementwise step; decisions on computed values are noted for the oracle."""
    if NOW.moment.absolute:  # magnitudes are asked for: no step makes them small
        return x * 2 if name else x
    if name.startswith(("relu", "hardswish", "clamp")) and x.dtype is torch.float64:
        edges = {"r": (0.0,), "h": (-3.0, 3.0), "c": (-1.0, 1.0)}[name[0]]
        for edge in edges:
            NOW.moment.decides(x - edge, x)
    if name == "relu_":
        return F.relu(x, inplace=True)
    if name == "relu":
        return F.relu(x)
    if name == "hardswish_":
        return F.hardswish(x, inplace=True)
    if name == "add_":
        return x.add_(1)
    if name == "mul_":
        return x.mul_(2)
    if name == "clamp_":
        return x.clamp_(-1, 1)
    return x


class LayerModel(nn.Module):
    """What a `LayerCase` describes; called on what `tensors.seen` makes its input of, or that."""

    def __init__(self, case: LayerCase) -> None:
        super().__init__()
        self.case = case
        self.stem = self.other = None
        if case.stem:
            self.stem = _pointwise(case)
        self.layer = _layer(case)
        if case.calls == "shared":
            self.other = _layer(case)
            self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        case = self.case
        if case.inside:
            x = seen(x, self.shape, case.order, case.seed)
        if self.stem is not None:
            x = self.stem(x)
        if case.before:
            x = activate("relu", x)
        y = activate(case.after, self.layer(x))
        if case.calls == "once":
            return y
        second = self.layer if self.other is None else self.other
        z = second(x if case.calls == "same" else x * 2)
        return y, activate(case.after, z)

    def at(self, shape: Sequence[int]) -> LayerModel:
        """This model, told what shape its input is seen in."""
        self.shape = tuple(shape)
        return self


def _layer(case: LayerCase) -> nn.Module:
    if not case.spatial:
        module: nn.Module = nn.Linear(case.inputs, case.outputs, case.bias)
    elif case.transposed:
        module = TRANSPOSED[case.spatial](
            case.inputs, case.outputs, case.kernel, case.stride, case.padding, bias=case.bias
        )
    else:
        module = CONVS[case.spatial](
            case.inputs,
            case.outputs,
            case.kernel,
            case.stride,
            case.padding,
            case.dilation,
            case.groups,
            case.bias,
            case.pad_mode,
        )
    return Functional(module) if case.functional and not case.transposed else module


def _pointwise(case: LayerCase) -> nn.Module:
    if not case.spatial:
        return nn.Linear(case.inputs, case.inputs)
    return CONVS[case.spatial](case.inputs, case.inputs, 1)


def fill(model: nn.Module, seed: int, grid: bool, dtype: torch.dtype) -> None:
    """New parameters, in place."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(draw(p.shape, seed + 31 * i, grid, dtype) * (1 if grid or p.dim() < 2 else 0.3))


def twin(
    model: nn.Module, method: Method, value_dtype: torch.dtype | None, dense: Sequence[str] = ()
) -> nn.Module:
    """A copy in float64 whose layers follow the method; those named in `dense` stay torch's."""
    plain = copy.deepcopy(model).double()
    found: list[tuple[str, nn.Module]] = []
    for name, module in plain.named_modules(remove_duplicate=True):
        if (isinstance(module, (*LAYERS, Functional))) and name not in dense:
            found.append((name, module))
        elif name in dense:
            module.register_forward_hook(sum_magnitudes)
    weights = {id(m.weight): tuple(m.weight.shape) for _, m in found}
    rules = dict(zip(weights, method.rules(list(weights.values()), value_dtype), strict=True))
    memories = {key: WeightMemory(rule) for key, rule in rules.items()}
    for name, module in found:
        op, low = product(module)
        key = id(module.weight)
        spatial = module.weight.dim() - 2
        args = (module.weight, module.bias, op, spatial, rules[key], memories[key], low)
        layer = Layer(*args)
        with torch.no_grad():
            memories[key].keep_first(module.weight)
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, layer)
    return plain


def product(module: nn.Module) -> tuple[Op, tuple[int, ...]]:
    """(a, w) -> the module's product without bias; what swatfx pads by before its op."""
    if isinstance(module, nn.Linear) or getattr(module, "options", 0) is None:
        return F.linear, ()
    if isinstance(module, Functional):
        stride, padding, dilation, groups = module.options
        mode = "zeros"
    else:
        stride, padding, dilation = module.stride, module.padding, module.dilation
        groups, mode = module.groups, module.padding_mode
    spatial = module.weight.dim() - 2
    kernel = module.weight.shape[2:]
    convolve: Callable[..., Tensor] = FUNCTIONS[spatial]
    if isinstance(padding, str):
        total = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, kernel, strict=True)]
        both = [(t // 2, t - t // 2) for t in total]
    else:
        each = (padding,) * spatial if isinstance(padding, int) else padding
        both = [(p, p) for p in each]
    pads = [n for low_high in reversed(both) for n in low_high]

    def op(a: Tensor, w: Tensor) -> Tensor:
        batched = a if a.dim() == spatial + 2 else a.unsqueeze(0)
        if any(pads):
            batched = F.pad(batched, pads, "constant" if mode == "zeros" else mode)
        y = convolve(batched, w, None, stride, 0, dilation, groups)
        return y if a.dim() == spatial + 2 else y.squeeze(0)

    even = isinstance(padding, str) and any(low != high for low, high in both)
    low = tuple(0 if mode == "zeros" else low for low, _ in both)
    return op, low if mode != "zeros" or even else ()
