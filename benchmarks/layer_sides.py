"""The sides of `layers`: one convolution's training work, made in several ways.

Dense sides are `nn.Conv2d` in a memory format, or compiled. Sparse ones are what a compiled graph
holds for one layer: thresholds, a packed activation, the op and its backward. In bf16, activations
and their gradients lie in bfloat16 and weights in float32, which autocast casts in a dense side's
every call, and ours round as they compress it. Every call first scales the weight by almost one, as
an optimizer's step would change it, so that nothing made from it can be kept from the call before.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, options
from swatfx.compiled import ActivationThreshold, Clock, Pack, WeightThreshold, initial_state
from swatfx.density import Density
from swatfx.ops.layout import converted
from swatfx.tensors import layouts
from swatfx.timing.steps import DTYPES, autocast

PARTS = (
    "weight_threshold",
    "activation_threshold",
    "pack",
    "forward",
    "input_gradient",
    "weight_gradient",
)
_CONV = torch.ops.swatfx.conv.default


@dataclass(frozen=True)
class Layer:
    """A square convolution of stride 1 that keeps the image's size."""

    kernel: int
    inputs: int
    outputs: int
    side: int
    batch: int

    def __str__(self) -> str:
        width = (
            str(self.inputs) if self.inputs == self.outputs else f"{self.inputs}->{self.outputs}"
        )
        return f"{self.kernel}x{self.kernel} {width} at {self.side}, batch {self.batch}"

    @property
    def padding(self) -> int:
        """Zeros on each side."""
        return self.kernel // 2


def add_layers(parser: argparse.ArgumentParser, known: Sequence[Layer]) -> None:
    """Let a command line choose some of the `known` layers, by number."""

    def number(text: str) -> int:
        value = options.positive(text)
        if value > len(known):
            raise argparse.ArgumentTypeError(f"there are {len(known)} layers, not {value}")
        return value

    listed = "; ".join(f"{at} {layer}" for at, layer in enumerate(known, 1))
    told = f"which (default: all): {listed}"
    parser.add_argument("--layers", nargs="+", type=number, metavar="NUMBER", help=told)


def chosen_layers(
    args: argparse.Namespace, known: Sequence[Layer], quick: Sequence[Layer]
) -> list[Layer]:
    """The layers that `args` name; else all, or with --quick the `quick` ones."""
    if args.layers:
        return [known[number - 1] for number in args.layers]
    return list(quick if args.quick else known)


def names_a_layout() -> bool:
    """Whether the op can be asked for a layout of its output."""
    return any(argument.name == "layout" for argument in _CONV._schema.arguments)


def graph_layout() -> str:
    """The layout that a compiled graph keeps between its sparse convolutions."""
    return layouts.BATCH_INNERMOST if names_a_layout() else layouts.CHANNELS_LAST


class Data:
    """Input, output gradient and weight of a layer; the first two once a layout and dtype."""

    def __init__(self, layer: Layer) -> None:
        generator = torch.Generator().manual_seed(0)
        image = (layer.side, layer.side)
        x = torch.randn(layer.batch, layer.inputs, *image, generator=generator).relu_()
        grad = torch.randn(layer.batch, layer.outputs, *image, generator=generator)
        shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
        weight = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        self.layer = layer
        self.weight = weight
        self._made = {(layouts.ROW_MAJOR, "fp32"): (x.requires_grad_(), grad)}

    def of(self, layout: str, dtype: str = "fp32") -> tuple[Tensor, Tensor]:
        """(input, a leaf that requires grad; gradient of the output) in `layout` and `dtype`.

        `dtype` is "fp32" or "bf16".
        """
        key = layout, dtype
        if key not in self._made:
            x, grad = self._made[layouts.ROW_MAJOR, "fp32"]
            narrow = DTYPES[dtype] or torch.float32
            again = layouts.as_layout(x.detach().to(narrow), layout).requires_grad_()
            self._made[key] = again, layouts.as_layout(grad.to(narrow), layout)
        return self._made[key]


def dense_side(data: Data, layout: str, *, compiled: bool, dtype: str = "fp32") -> common.Side:
    """Forward and both gradients of a dense convolution, in "bf16" under autocast."""
    layer = data.layer
    conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, padding=layer.padding, bias=False)
    with torch.no_grad():
        conv.weight.copy_(data.weight)
    if layout == layouts.CHANNELS_LAST:
        conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, grad = data.of(layout, dtype)
    call: Callable[[Tensor], Tensor] = torch.compile(conv, dynamic=False) if compiled else conv

    def run() -> dict[str, float]:
        _change(conv.weight)
        x.grad = conv.weight.grad = None
        start = time.perf_counter()
        with autocast(DTYPES[dtype]):
            out = call(x)
        out.backward(grad)
        return {"seconds": time.perf_counter() - start}

    return run


def _change(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(1 + 2**-20)


class _Relayout(torch.autograd.Function):
    """A copy into one layout, whose gradient is a copy into another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: str, back: str) -> Tensor:
        ctx.back = back
        return converted(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return converted(grad, ctx.back), None, None


class SparseConv(nn.Module):
    """One sparse convolution as it stands in a compiled graph."""

    def __init__(
        self, data: Data, sparsity: float, period: int, layout: str, dtype: str = "fp32"
    ) -> None:
        super().__init__()
        density = Density.from_sparsity(sparsity)
        self.data = data
        self.layout = layout
        self.dtype = dtype
        self.weight = nn.Parameter(data.weight.clone())
        self.clock = Clock()
        options: dict[str, Any] = {"period": period, "spatial": 2, "seed": 0}
        weight_state = initial_state(self.weight, self.weight, "nchw", 2, True)
        self.weight_threshold = WeightThreshold(
            "layer", "nchw", density, state=weight_state, is_weight=True, **options
        )
        self.weight_threshold.recompute(self.weight)
        state = initial_state(None, self.weight, "nchw", 2, False)
        self.activation_threshold = ActivationThreshold(
            "layer", "nchw", density, state=state, is_weight=False, in_forward=False, **options
        )
        self.pack = Pack("layer", "nchw", 2)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F, H, W), both in the graph's layout."""
        step = self.clock(x)
        weight_state = self.weight_threshold(self.weight, step)
        threshold = self.activation_threshold(x, step, self.weight)
        kept = self.pack(x, threshold, self.weight)
        return self.conv(x, self.weight, weight_state, kept)

    def conv(self, x: Tensor, weight: Tensor, state: Tensor, kept: Tensor | None) -> Tensor:
        """The op."""
        pad = [self.data.layer.padding] * 2
        options = {"layout": self.layout} if names_a_layout() else {}
        out: Tensor = _CONV(x, weight, None, state, kept, [1, 1], pad, [1, 1], 1, **options)
        return out

    def given(self) -> tuple[Tensor, Tensor]:
        """(weight threshold, packed activation), made beforehand."""
        x, _ = self.data.of(self.layout, self.dtype)
        step = self.clock(x)
        threshold = self.activation_threshold(x, step, self.weight)
        kept = self.pack(x, threshold, self.weight)
        return self.weight_threshold(self.weight, step), kept

    def kernels_side(self) -> common.Side:
        """The op and its backward alone: thresholds and packed activation are given."""
        x, grad = self.data.of(self.layout, self.dtype)
        state, kept = self.given()

        def run() -> dict[str, float]:
            self._prepare(x)
            start = time.perf_counter()
            self.conv(x, self.weight, state, kept).backward(grad)
            return {"seconds": time.perf_counter() - start}

        return run

    def step_side(self, outer: str) -> common.Side:
        """All of a training step, between a layer's neighbours that keep layout `outer`."""
        x, grad = self.data.of(outer, self.dtype)

        def run() -> dict[str, float]:
            self._prepare(x)
            start = time.perf_counter()
            if outer == self.layout:
                self(x).backward(grad)
            else:
                inside = _Relayout.apply(x, self.layout, outer)
                _Relayout.apply(self(inside), outer, self.layout).backward(grad)
            return {"seconds": time.perf_counter() - start}

        return run

    def parts_side(self) -> common.Side:
        """The parts of a training step, one after the other."""
        x, grad = self.data.of(self.layout, self.dtype)
        fixed = x.detach()

        def run() -> dict[str, float]:
            self._prepare(x)
            laps = _Laps()
            step = self.clock(x)
            laps.skip()
            state = self.weight_threshold(self.weight, step)
            laps.lap("weight_threshold")
            threshold = self.activation_threshold(x, step, self.weight)
            laps.lap("activation_threshold")
            kept = self.pack(x, threshold, self.weight)
            laps.lap("pack")
            self.conv(x, self.weight, state, kept)
            laps.lap("forward")
            out = self.conv(x, self.weight.detach(), state, None)
            laps.skip()
            out.backward(grad)
            laps.lap("input_gradient")
            out = self.conv(fixed, self.weight, state, kept)
            laps.skip()
            out.backward(grad)
            laps.lap("weight_gradient")
            return laps.seconds

        return run

    def _prepare(self, x: Tensor) -> None:
        _change(self.weight)
        x.grad = self.weight.grad = None


class _Laps:
    """A stop-watch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def skip(self) -> None:
        """Go on from now; what was before does not count."""
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What was since the last look is `name`."""
        self.seconds[name] = time.perf_counter() - self.last
        self.last = time.perf_counter()
