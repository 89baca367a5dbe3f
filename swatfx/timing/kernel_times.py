"""Constants of `swatfx.forecast` for this machine: layers measured alone, on all sides in turn.

A layer stands four times side by side in one graph, so that what a call of the graph itself costs
counts a quarter. A side's time is the least of its turns: what disturbs a measurement adds to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swatfx import forecast, kernels
from swatfx.compiled import SwatModule, saves
from swatfx.errors import InputError, SwatWarning
from swatfx.forecast.constants import DTYPES as NAMES
from swatfx.forecast.fitting import summary
from swatfx.forecast.work import CONVERSION, DENSE, NORM, PLAIN, SPARSE
from swatfx.ops.layout import converted, laid_out
from swatfx.ops.norm import EXACT
from swatfx.pipeline import compile as compile_model
from swatfx.policy import parse
from swatfx.tables import Shown, Table
from swatfx.tensors import layouts
from swatfx.timing.machine import today
from swatfx.timing.rounds import clock
from swatfx.timing.steps import DTYPES, autocast

TURNS = 5
_COPIES = 4
_LONG, _FEW = 0.3, 2  # seconds of a turn; turns
_POLICY = "{method}:{sparsity},period=1000000,first_dense=false,last_dense=false"


@dataclass(frozen=True)
class Shape:
    """A layer to measure: a square convolution (kernel > 0), or a linear layer of `batch` rows."""

    batch: int
    inputs: int
    outputs: int
    side: int = 1
    kernel: int = 0
    stride: int = 1
    groups: int = 1

    def layer(self) -> nn.Module:
        """A new one."""
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs)
        return nn.Conv2d(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.kernel // 2,
            groups=self.groups,
            bias=False,
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(N, C, H, W) or (rows, in)."""
        if not self.kernel:
            return self.batch, self.inputs
        return self.batch, self.inputs, self.side, self.side


def _pointwise() -> Iterator[Shape]:
    for batch, inputs, outputs, side in (
        *((2, 16, 16, 64), (2, 64, 24, 32), (2, 112, 672, 8), (2, 960, 160, 4), (2, 120, 32, 1)),
        *((32, 16, 64, 32), (32, 112, 672, 8), (32, 160, 960, 4), (32, 960, 240, 1)),
        *((32, 32, 120, 1), (8, 256, 64, 28), (16, 64, 256, 28), (16, 512, 128, 14)),
        *((16, 512, 2048, 7), (4, 1024, 256, 14), (1, 960, 160, 7)),
    ):
        yield Shape(batch, inputs, outputs, side, 1)


def _spatial() -> Iterator[Shape]:
    for batch, inputs, side in (
        *((2, 16, 32), (2, 64, 28), (2, 256, 7), (8, 64, 28), (16, 128, 14), (8, 256, 14)),
        *((8, 512, 7), (32, 32, 16), (2, 64, 56), (64, 64, 8), (1, 128, 28), (5, 48, 20)),
    ):
        yield Shape(batch, inputs, inputs, side, 3)


def _strided() -> Iterator[Shape]:
    for batch, inputs, outputs, side, kernel in (
        *((2, 64, 128, 28, 3), (16, 128, 128, 28, 3), (16, 256, 512, 14, 1)),
        *((8, 256, 256, 14, 3), (2, 256, 512, 14, 1), (32, 32, 64, 32, 3), (8, 96, 192, 20, 2)),
        *((4, 512, 512, 14, 3),),
    ):
        yield Shape(batch, inputs, outputs, side, kernel, 2)


def _depthwise() -> Iterator[Shape]:
    for batch, inputs, side, kernel, stride in (
        *((2, 64, 32, 3, 1), (2, 672, 8, 5, 1), (2, 960, 4, 5, 1), (2, 72, 32, 5, 2)),
        *((32, 64, 32, 3, 1), (32, 240, 8, 3, 1), (32, 672, 8, 5, 1), (32, 72, 32, 5, 2)),
        *((8, 96, 40, 7, 1), (8, 384, 10, 7, 1), (16, 144, 28, 3, 1), (16, 480, 14, 5, 2)),
    ):
        yield Shape(batch, inputs, inputs, side, kernel, stride, inputs)


def _linear() -> Iterator[Shape]:
    for rows, inputs, outputs in (
        *((394, 768, 768), (197, 768, 3072), (197, 3072, 768), (128, 512, 512), (32, 960, 1280)),
        *((16, 2048, 1000), (3200, 96, 384), (3200, 384, 96), (800, 768, 192), (64, 4096, 256)),
    ):
        yield Shape(rows, inputs, outputs)


def shapes() -> list[Shape]:
    """What is measured: layers of networks in use, at few images and at many."""
    return [*_pointwise(), *_spatial(), *_strided(), *_depthwise(), *_linear()]


# Methods and densities in turn: SWAT packs activations; under held masks gradients are sampled.
_ASKED = (
    (("swat-u", 0.9), ("static", 0.8), ("swat-u", 0.5)),
    (("swat-u", 0.8), ("static", 0.95), ("swat-u", 0.95)),
    (("swat-u", 0.7), ("static", 0.6), ("swat-u", 0.9)),
)
_ELEMENTS = [
    (batch, channels, side)
    for batch, channels, side in (
        *((2, 16, 64), (2, 64, 32), (2, 672, 8), (2, 960, 4), (16, 64, 56), (16, 256, 28)),
        *((16, 512, 14), (16, 2048, 7), (32, 64, 32), (32, 240, 8), (32, 960, 4), (8, 96, 20)),
    )
]


@dataclass(frozen=True)
class FitResult(Shown):
    """Constants of this machine, and the samples that they were fitted to."""

    constants: forecast.Constants
    samples: tuple[forecast.Sample, ...]

    def data(self) -> dict[str, Any]:
        """The constants, and every sample."""
        return {
            "constants": self.constants.to_json(),
            "samples": [asdict(sample) for sample in self.samples],
        }

    def records(self) -> Table:
        """A row a kind of calls."""
        groups: dict[str, list[forecast.Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.key, []).append(sample)
        rows = []
        for name, group in groups.items():
            missed = forecast.errors(self.constants, group)
            row = (*name.split(), len(group), *(f"{e:.2f}" for e in summary(missed)))
            rows.append(row)
        headers = ("dtype", "kind", "side", "measured", "median error", "worst error")
        return Table(headers, tuple(rows))

    def blocks(self) -> list[Table | str]:
        """The table, and how well calls are predicted that were not fitted to."""
        found = self.constants
        return [
            self.records(),
            f"{found.processor}, threads: {found.threads}, kernels: {found.kernels}",
            f"calls that were not fitted to are predicted with a relative error of"
            f" {found.median_error:.0%} in the median, {found.worst_error:.0%} at worst",
        ]


def fit_kernel_times(
    tell: Callable[[str], object] = lambda text: None, *, turns: int = TURNS
) -> FitResult:
    """Measure this machine with the threads that torch has now: minutes.

    Args:
        tell: called with a line for people before each piece of work.
        turns: of each side.

    Nothing is stored: `swatfx.forecast.write` does.

    Raises:
        InputError: there are no compiled kernels here.
    """
    if not kernels.available():
        raise InputError(
            "there are no compiled kernels to measure",
            remedy="install a C compiler with OpenMP and install swatfx again",
        )
    samples: list[forecast.Sample] = []
    found = shapes()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", SwatWarning)
        for dtype in NAMES:
            for at, shape in enumerate(found):
                tell(f"{dtype} layer {at + 1} of {len(found)}")
                samples += _layer_samples(dtype, shape, _ASKED[at % len(_ASKED)], turns)
            tell(f"{dtype} norms and conversions")
            for elements in _ELEMENTS:
                samples += _tensor_samples(dtype, elements, turns)
    table, missed = forecast.fit(samples)
    median, worst = summary(missed)
    here = forecast.this_machine()
    constants = forecast.Constants(
        table, here.threads, here.kernels, here.processor, today(), median, worst
    )
    return FitResult(constants, tuple(samples))


class _Several(nn.Module):
    """Layers side by side, each with an input of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList([shape.layer() for _ in range(_COPIES)])

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """Results of all."""
        first, second, third, fourth = self.layers
        return first(a), second(b), third(c), fourth(d)


def _layer_samples(
    dtype: str, shape: Shape, asked: tuple[tuple[str, float], ...], turns: int
) -> Iterator[forecast.Sample]:
    plain = [_runner(dtype, shape, _Several(shape), layouts.ROW_MAJOR)]
    if shape.kernel:
        model = _Several(shape).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        plain.append(_runner(dtype, shape, model, layouts.CHANNELS_LAST))
    work = _work(dtype, shape)
    yield forecast.Sample(work, PLAIN, min(_least(plain, turns)) / _COPIES)
    for method, sparsity in asked:
        policy = parse(_POLICY.format(method=method, sparsity=sparsity))
        sides = [
            _runner(dtype, shape, _compiled(shape, policy, name), layout)
            for name, layout in (
                (SPARSE, layouts.BATCH_INNERMOST if shape.kernel else layouts.ROW_MAJOR),
                (DENSE, layouts.ROW_MAJOR),
            )
        ]
        packed = 1 - sparsity if method == "swat-u" else None
        own = replace(work, weight_density=1 - sparsity, activation_density=packed)
        for side, seconds in zip((SPARSE, DENSE), _least(sides, turns), strict=True):
            yield forecast.Sample(own, side, seconds / _COPIES)


def _work(dtype: str, shape: Shape) -> forecast.Work:
    layer = shape.layer()
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    out = layer.to("meta")(torch.empty(shape.input_shape, device="meta")).shape
    return forecast.Work.of_layer(
        dtype,
        layer.weight.shape,
        shape.input_shape,
        out,
        stride=(shape.stride,) if shape.kernel else (),
        groups=shape.groups,
    )


def _compiled(shape: Shape, policy: Any, which: str) -> SwatModule:
    """Without the conversions at its ends: what comes lies in the order already."""
    gm = compile_model(_Several(shape), policy, kernels=which)
    for node in list(gm.graph.nodes):
        if node.target is laid_out:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _drawn(dtype: str, shape: tuple[int, ...], layout: str) -> Tensor:
    x = torch.randn(shape, dtype=DTYPES[dtype] or torch.float32)
    return layouts.as_layout(x, layout) if len(shape) > 2 else x


def _runner(dtype: str, shape: Shape, model: nn.Module, layout: str) -> Callable[[], float]:
    """Measures seconds of forward and backward of all copies."""
    model.train()
    xs = [_drawn(dtype, shape.input_shape, layout).requires_grad_() for _ in range(_COPIES)]
    outer: list[Tensor] = []

    def run() -> float:
        for tensor in (*xs, *model.parameters()):
            tensor.grad = None
        start = clock()
        with autocast(DTYPES[dtype]):
            results = model(*xs)
        took = clock() - start
        if not outer:
            outer.extend(torch.randn_like(result) for result in results)
        start = clock()
        torch.autograd.backward(results, outer)
        return took + clock() - start

    run()
    return run


def _tensor_samples(
    dtype: str, sizes: tuple[int, int, int], turns: int
) -> Iterator[forecast.Sample]:
    """Of a norm with its ReLU, and of a conversion."""
    batch, channels, side = sizes
    shape = (batch, channels, side, side)
    elements = batch * channels * side * side
    given = [torch.zeros(channels), torch.ones(channels)]
    weights = [torch.ones(channels).requires_grad_(), torch.zeros(channels).requires_grad_()]
    ours = saves.Norm(EXACT)

    def norm(x: Tensor) -> Tensor:
        return ours(x, *given, *weights, True, 0.1, 1e-5, relu=True)  # type: ignore[no-any-return]

    def plain(x: Tensor) -> Tensor:
        mean, variance = given
        weight, bias = weights
        return torch.relu_(F.batch_norm(x, mean, variance, weight, bias, True))

    def convert(x: Tensor) -> Tensor:
        return converted(x, layouts.BATCH_INNERMOST)

    orders = (layouts.BATCH_INNERMOST, layouts.ROW_MAJOR)
    runs = [_run_on(norm, _drawn(dtype, shape, order)) for order in orders]
    runs += [_run_on(plain, _drawn(dtype, shape, o)) for o in (orders[1], layouts.CHANNELS_LAST)]
    runs.append(_run_on(convert, _drawn(dtype, shape, layouts.ROW_MAJOR)))
    sparse, dense, *others, converting = _least(runs, turns)
    work = forecast.Work.of_tensor(NORM, dtype, elements)
    for name, seconds in ((SPARSE, sparse), (DENSE, dense), (PLAIN, min(others))):
        yield forecast.Sample(work, name, seconds)
    yield forecast.Sample(replace(work, kind=CONVERSION), SPARSE, converting)


def _run_on(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], float]:
    x.requires_grad_()
    grad = torch.randn_like(function(x))

    def run() -> float:
        x.grad = None
        start = clock()
        function(x).backward(grad)
        return clock() - start

    return run


def _least(runs: list[Callable[[], float]], turns: int) -> list[float]:
    """The least seconds of each, in turn; fewer turns of what takes long, and so varies less."""
    rounds = [[run() for run in runs]]
    while len(rounds) < (turns if sum(rounds[0]) < _LONG else _FEW):
        rounds.append([run() for run in runs])
    return [min(column) for column in zip(*rounds, strict=True)]
