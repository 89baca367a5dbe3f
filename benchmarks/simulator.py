"""What the accelerator models themselves cost: seconds a layer, and growth with layer size.

    python -m benchmarks.simulator [--models NAME ...] [--sparsity S] [--quick] [--json]

These are measured seconds of this machine, one core, after compilation and without the cache of
results. Fourteen layers of ResNet-50's sizes, one sample, random masks, half the activations zero,
the first layer dense. `growth_exponents` are slopes of log(seconds) over log(size): 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import common, options
from swatfx.accelerators import ACCELERATORS, Accelerator, cache_clear, parse

# name, K, C, kernel, H = W, stride, padding
Layer = tuple[str, int, int, int, int, int, int]
_LAYERS: tuple[Layer, ...] = (
    ("7x7 3->64 at 224", 64, 3, 7, 224, 2, 3),
    ("1x1 64->64 at 56", 64, 64, 1, 56, 1, 0),
    ("3x3 64->64 at 56", 64, 64, 3, 56, 1, 1),
    ("1x1 64->256 at 56", 256, 64, 1, 56, 1, 0),
    ("1x1 256->64 at 56", 64, 256, 1, 56, 1, 0),
    ("3x3 128->128 at 28", 128, 128, 3, 28, 1, 1),
    ("1x1 128->512 at 28", 512, 128, 1, 28, 1, 0),
    ("1x1 512->128 at 28", 128, 512, 1, 28, 1, 0),
    ("3x3 256->256 at 14", 256, 256, 3, 14, 1, 1),
    ("1x1 256->1024 at 14", 1024, 256, 1, 14, 1, 0),
    ("1x1 1024->256 at 14", 256, 1024, 1, 14, 1, 0),
    ("3x3 512->512 at 7", 512, 512, 3, 7, 1, 1),
    ("1x1 512->2048 at 7", 2048, 512, 1, 7, 1, 0),
    ("1x1 2048->512 at 7", 512, 2048, 1, 7, 1, 0),
)
_QUICK_LAYERS = (_LAYERS[2], _LAYERS[8], _LAYERS[9])
# Growth: a 3x3 layer with more channels (weights grow with their square), or more pixels
_CHANNELS, _SIDES = (64, 128, 256, 512), (14, 28, 56, 112)
_QUICK_CHANNELS, _QUICK_SIDES = (32, 64, 128), (8, 16, 32)
_PASSES = ("forward", "input gradient", "weight gradient")


def passes(design: Accelerator, layer: Layer, density: float) -> dict[str, Callable[[], object]]:
    """One call for each pass of `layer`, masks drawn beforehand."""
    name, filters, channels, kernel, side, stride, padding = layer
    rng = np.random.default_rng(0)
    weights = rng.random((filters, channels, kernel, kernel)) < (1 if channels == 3 else density)
    activations = rng.random((channels, side, side)) < (1 if channels == 3 else 0.5)
    hw = (side, side)

    def fresh(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            cache_clear()
            return call()

        return run

    calls: tuple[Callable[[], object], ...] = (
        lambda: design.conv_cycles(
            weights, activations, input_hw=hw, stride=stride, padding=padding
        ),
        lambda: design.backward_input(weights, input_hw=hw, stride=stride, padding=padding),
        lambda: design.backward_weight(
            activations, filters=filters, kernel=kernel, input_hw=hw, stride=stride, padding=padding
        ),
    )
    return {key: fresh(call) for key, call in zip(_PASSES, calls, strict=True)}


def _seconds(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Spread of `repeats` calls after one that is not recorded."""
    seconds = []
    for index in range(-1, repeats):
        start = time.perf_counter()
        call()
        if index >= 0:
            seconds.append(time.perf_counter() - start)
    return common.spread(seconds).to_json()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every pass of every layer on every model, and the growth of each model's passes."""
    layers = _QUICK_LAYERS if args.quick else _LAYERS
    repeats = args.repeats or (3 if args.quick else 5)
    density = 1 - args.sparsity
    channels = _QUICK_CHANNELS if args.quick else _CHANNELS
    sides = _QUICK_SIDES if args.quick else _SIDES
    models: dict[str, Any] = {}
    points = len(layers) + len(channels) + len(sides)
    with common.progress(len(args.models) * points * len(_PASSES), "simulator") as bar:

        def timed(design: Accelerator, layer: Layer) -> dict[str, dict[str, float]]:
            found = {}
            for name, call in passes(design, layer, density).items():
                found[name] = _seconds(call, repeats)
                bar.update()
            return found

        for name in args.models:
            design = parse(name)
            times = {layer[0]: timed(design, layer) for layer in layers}
            by_channels = [timed(design, ("", n, n, 3, 14, 1, 1)) for n in channels]
            by_side = [timed(design, ("", 64, 64, 3, n, 1, 1)) for n in sides]
            models[name] = {
                "seconds": times,
                "total_seconds": {
                    key: sum(layer[key]["median"] for layer in times.values()) for key in _PASSES
                },
                "growth_exponents": {
                    "weights": _growth([n * n for n in channels], by_channels),
                    "pixels": _growth([n * n for n in sides], by_side),
                },
            }
    return {"sparsity": args.sparsity, "activation_sparsity": 0.5, "models": models}


def _growth(sizes: list[int], points: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    return {
        key: common.growth_exponent(sizes, [point[key]["median"] for point in points])
        for key in _PASSES
    }


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a model: all layers together, the slowest layer, growth."""
    headers = ["model", *(f"{key}, s" for key in _PASSES), "slowest layer forward, s"]
    headers += [f"growth with {size}, {key}" for size in ("weights", "pixels") for key in _PASSES]
    rows: list[common.Row] = []
    for name, model in measured["models"].items():
        slowest = max(layer["forward"]["median"] for layer in model["seconds"].values())
        growth = model["growth_exponents"]
        row: common.Row = [name, *(model["total_seconds"][key] for key in _PASSES), slowest]
        rows.append(row + [growth[size][key] for size in ("weights", "pixels") for key in _PASSES])
    total = [
        math.fsum(model["total_seconds"][key] for model in measured["models"].values())
        for key in _PASSES
    ]
    return headers, [*rows, ["all", *total, *[None] * 7]]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(ACCELERATORS),
        metavar="NAME",
        default=list(ACCELERATORS),
    )
    parser.add_argument("--sparsity", type=options.sparsity, default=0.8)


BENCHMARK = common.Benchmark(
    "simulator",
    "seconds that the accelerator models take for fourteen layers of ResNet-50's sizes",
    _add_arguments,
    measure,
    table,
    ("measured seconds of the models themselves, not simulated cycles; numba compiled beforehand",),
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
