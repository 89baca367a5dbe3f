"""Structured weights beside unstructured ones of equal density: products of layers, whole steps.

    python -m benchmarks.patterns [--selectors NAME ...] [--sparsity S] [--layers NUMBER ...]
                                  [--model NAME[:BATCH[:SIDE]] ...] [--dtypes DTYPE ...]

Of each layer the forward product and the input gradient run sparse kernels on weights that each
selector chose, masks included; of each network a whole training step, thresholds kept. The sides
of a layer, or of a network, take turns in one process, on one thread, whose own processor time is
taken: a busy machine lengthens it little. A figure is the time under `nchw` over that under the
selector, round by round. Weights are random: what patterns cost in accuracy, `python -m
benchmarks.accuracy --policies` tells.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import common, options
from benchmarks.layer_sides import Data, Layer, add_layers, chosen_layers
from benchmarks.sides import Network, StepSide, Trainer, parse_network
from swatfx import selectors
from swatfx.density import Density
from swatfx.ops.calls import ConvCall
from swatfx.selectors import Axes
from swatfx.tensors import layouts
from swatfx.timing.steps import DTYPES

LAYERS = (
    Layer(3, 64, 64, 56, 16),
    Layer(3, 128, 128, 28, 32),
    Layer(1, 512, 128, 28, 32),
    Layer(3, 256, 256, 14, 32),
    Layer(1, 1024, 256, 14, 32),
    Layer(3, 512, 512, 4, 128),
)
_QUICK_LAYERS = (Layer(3, 16, 16, 8, 16),)
PLAIN = "nchw"
SELECTORS = ("block-1x2", "block-1x4", "block-4x1", "block-4x4")
PRODUCTS = ("forward", "input_gradient")
_OPS = torch.ops.swatfx
_WARMUP = 1


def _timed(call: Callable[[], object]) -> common.Side:
    """Seconds of processor time of this thread."""

    def run() -> dict[str, float]:
        start = time.thread_time()
        call()
        return {"seconds": time.thread_time() - start}

    return run


def product_sides(
    data: Data, selector: str, density: Density, dtype: str
) -> dict[str, common.Side]:
    """Forward and input gradient of a layer, by name."""
    layer, weight = data.layer, data.weight
    x, grad = (t.detach().to(DTYPES[dtype] or t.dtype) for t in data.of(layouts.BATCH_INNERMOST))
    state = selectors.get(selector).state(weight, density, Axes(0, 1), 0)
    call = ConvCall(
        *((1, 1), [layer.padding] * 2, (1, 1), 1),
        weight_selector=selector,
        layout=layouts.BATCH_INNERMOST,
    )
    rest = (weight, state, list(x.shape), [True, False, False])

    def forward() -> None:
        _OPS.conv(x, weight, None, state, None, *call.options)

    def input_gradient() -> None:
        _OPS.conv_backward(grad, None, None, *rest, *call.options)

    return {"forward": _timed(forward), "input_gradient": _timed(input_gradient)}


def step_side(network: Network, selector: str, sparsity: float, dtype: str) -> common.Side:
    """A training step, thresholds kept."""
    policy = f"swat-u:{sparsity:g},period=1000,weight_selector={selector}"
    trainer = Trainer(network, StepSide("channels_last", policy, dtype=DTYPES[dtype]))
    return _timed(trainer.step)


def _compared(
    sides: dict[str, common.Side], chosen: list[str], repeats: int, tick: Callable[[], object]
) -> dict[str, Any]:
    """Seconds of each side, and how much faster than the plain one it is."""
    rounds = common.alternate(sides, repeats, warmup=_WARMUP, tick=tick)
    summary = common.summary(rounds)
    return {
        name: {
            "seconds": summary[name]["seconds"],
            "speedup": common.ratio(rounds, PLAIN, name),
        }
        for name in chosen
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All layers and networks, in each dtype."""
    layers = chosen_layers(args, LAYERS, _QUICK_LAYERS)
    networks: list[Network] = args.model or [parse_network("cifar/resnet20:32")] * args.quick
    chosen = [PLAIN, *args.selectors]
    density = Density.from_sparsity(args.sparsity)
    repeats = args.repeats or (2 if args.quick else 9)
    per = len(args.dtypes) * len(chosen) * (repeats + _WARMUP)
    total = (len(layers) * len(PRODUCTS) + len(networks)) * per
    results: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with common.progress(total, "patterns") as bar:
            for dtype in args.dtypes:
                for layer in layers:
                    data = Data(layer)
                    made = {name: product_sides(data, name, density, dtype) for name in chosen}
                    for product in PRODUCTS:
                        sides = {name: made[name][product] for name in chosen}
                        found = _compared(sides, chosen, repeats, bar.update)
                        results.append(_row(str(layer), product, dtype, found))
                for network in networks:
                    sides = {n: step_side(network, n, args.sparsity, dtype) for n in chosen}
                    found = _compared(sides, chosen, repeats, bar.update)
                    results.append(_row(str(network), "step", dtype, found))
    finally:
        torch.set_num_threads(before)
    return {"sparsity": args.sparsity, "selectors": chosen, "results": results}


def _row(of: str, what: str, dtype: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {"of": of, "what": what, "dtype": dtype, "by_selector": found}


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a product of a layer, or a network's step; then geometric means of the products."""
    plain, *others = measured["selectors"]
    headers = ["of", "dtype", "what", f"{plain}, ms", *others]
    rows: list[common.Row] = []
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in measured["results"]:
        by = result["by_selector"]
        row: common.Row = [result["of"], result["dtype"], result["what"].replace("_", " ")]
        row += [by[plain]["seconds"]["median"] * 1e3]
        rows.append(row + [common.with_spread(by[name]["speedup"]) for name in others])
        kinds.setdefault((result["dtype"], result["what"]), []).append(by)
    for (dtype, what), found in kinds.items():
        means = [
            common.geometric_mean([by[name]["speedup"]["median"] for by in found])
            for name in others
        ]
        rows.append(["geometric mean", dtype, what.replace("_", " "), None, *means])
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_layers(parser, LAYERS)
    add = parser.add_argument
    add("--selectors", nargs="+", type=options.selector, default=list(SELECTORS), metavar="NAME")
    add("--sparsity", type=options.sparsity, default=0.9, metavar="S")
    add("--model", nargs="+", type=parse_network, metavar="NAME", help="networks, too")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"])


BENCHMARK = common.Benchmark(
    "patterns",
    "structured weights beside unstructured ones of equal density",
    _add_arguments,
    measure,
    table,
    (
        "Figures: processor time with unstructured weights (nchw) over that with the pattern,",
        "round by round: median [minimum, maximum]. One thread. Masks are formed in every call.",
    ),
    allocator="tuned",
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
