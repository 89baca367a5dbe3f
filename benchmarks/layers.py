"""One convolution's training work: forward, input gradient, weight gradient, SWAT beside dense.

    python -m benchmarks.layers [--layers NUMBER ...] [--sparsities S ...] [--batch N] [--quick]

Dense is NCHW, channels_last, and channels_last under torch.compile, which compiles forward and
backward; a speed-up is the time of the fastest of them over that of the side, round by round.
Inputs are the positive part of normal values. The sparse sides:

- kernels: the convolution, its input gradient and its weight gradient, with thresholds and packed
  activation given;
- period_1: all of a step, with both thresholds searched and the activation packed, its input and
  output in the layout that a compiled graph keeps between its convolutions;
- period_1_converted: the same between neighbours in NCHW or channels_last, whichever is faster:
  input, output and both of their gradients are copied;
- period_1000: as period_1, with thresholds that are kept.

The weight changes before every call, so each has to compress it anew. `parts` breaks period_1 down.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import common, options
from benchmarks.layer_sides import (
    PARTS,
    Data,
    Layer,
    SparseConv,
    add_layers,
    chosen_layers,
    dense_side,
    graph_layout,
)
from swatfx.tensors import layouts
from swatfx.timing.steps import failure

LAYERS = (
    Layer(1, 64, 256, 56, 32),
    Layer(3, 64, 64, 56, 32),
    Layer(3, 128, 128, 28, 32),
    Layer(1, 512, 128, 28, 32),
    Layer(3, 256, 256, 14, 32),
    Layer(1, 1024, 256, 14, 32),
    Layer(3, 512, 512, 7, 32),
    Layer(1, 512, 2048, 7, 32),
    Layer(3, 64, 64, 32, 64),
    Layer(3, 256, 256, 8, 128),
    Layer(3, 512, 512, 4, 128),
)
_QUICK_LAYERS = (Layer(3, 16, 16, 8, 16), Layer(1, 16, 32, 8, 16))
# Geometric means of speed-ups that are aimed at, by sparsity.
TARGETS = {
    "kernels": {0.8: 2.0, 0.9: 3.5, 0.95: 6.0},
    "period_1": {0.8: 1.5, 0.9: 3.0, 0.95: 5.0},
}
SPARSE = ("kernels", "period_1", "period_1_converted", "period_1000")
_OUTER = {"nchw": layouts.ROW_MAJOR, "channels_last": layouts.CHANNELS_LAST}
_WARMUP = 2


def _dense_sides(data: Data, compiled: bool) -> tuple[dict[str, common.Side], dict[str, str]]:
    sides = {
        f"dense {form}": dense_side(data, layout, compiled=False) for form, layout in _OUTER.items()
    }
    if not compiled:
        return sides, {}
    side = dense_side(data, layouts.CHANNELS_LAST, compiled=True)
    if reason := failure(side):
        return sides, {"dense compiled": reason}
    return sides | {"dense compiled": side}, {}


def _sparse_sides(data: Data, sparsity: float) -> dict[str, common.Side]:
    """The sides at one sparsity, named "kernels 0.9" and so on."""
    layout = graph_layout()

    def conv(period: int = 1) -> SparseConv:
        return SparseConv(data, sparsity, period, layout)

    sides = {
        "kernels": conv().kernels_side(),
        "period_1": conv().step_side(layout),
        "period_1000": conv(1000).step_side(layout),
        "parts": conv().parts_side(),
    }
    for form, outer in _OUTER.items():
        sides[f"period_1_from_{form}"] = conv().step_side(outer)
    return {f"{name} {sparsity:g}": side for name, side in sides.items()}


def measure_layer(
    layer: Layer,
    sparsities: Sequence[float],
    repeats: int,
    compiled: bool,
    tick: Callable[[], object],
) -> dict[str, Any]:
    """All sides of one layer, in turn."""
    torch._dynamo.reset()
    data = Data(layer)
    sides, unavailable = _dense_sides(data, compiled)
    dense = list(sides)
    for sparsity in sparsities:
        sides |= _sparse_sides(data, sparsity)
    rounds = common.alternate(sides, repeats, warmup=_WARMUP, tick=tick)
    fastest = common.fastest(rounds, dense)
    summary = common.summary(rounds)
    result: dict[str, Any] = {
        "layer": str(layer),
        "fastest_dense": fastest,
        "unavailable": unavailable,
        "dense": {name: summary[name]["seconds"] for name in dense},
        "sparse": {},
    }
    for sparsity in sparsities:
        outer = common.fastest(rounds, [f"period_1_from_{form} {sparsity:g}" for form in _OUTER])
        names = {name: f"{name} {sparsity:g}" for name in SPARSE} | {"period_1_converted": outer}
        parts = summary[f"parts {sparsity:g}"]
        total = sum(parts[part]["median"] for part in PARTS)
        result["sparse"][f"{sparsity:g}"] = {
            "seconds": {key: summary[name]["seconds"] for key, name in names.items()},
            "speedups": {key: common.ratio(rounds, fastest, name) for key, name in names.items()},
            "converted_from": outer.removeprefix("period_1_from_").split()[0],
            "parts": {
                part: {"seconds": parts[part], "share": parts[part]["median"] / total}
                for part in PARTS
            },
        }
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All layers, and the geometric means of their speed-ups."""
    chosen = chosen_layers(args, LAYERS, _QUICK_LAYERS)
    if args.batch:
        chosen = [replace(layer, batch=args.batch) for layer in chosen]
    compiled = not (args.quick or args.no_compile)
    repeats = args.repeats or (2 if args.quick else 9)
    sides = 2 + compiled + len(args.sparsities) * (len(SPARSE) + 2)
    results = []
    with common.progress(len(chosen) * sides * (repeats + _WARMUP), "layers") as bar:
        for layer in chosen:
            results.append(measure_layer(layer, args.sparsities, repeats, compiled, bar.update))
    means: dict[str, dict[str, Any]] = {}
    for sparsity in args.sparsities:
        key = f"{sparsity:g}"
        means[key] = {}
        for name in SPARSE:
            medians = [r["sparse"][key]["speedups"][name]["median"] for r in results]
            mean = common.geometric_mean(medians)
            wanted = TARGETS.get(name, {}).get(sparsity)
            means[key][name] = {"geometric_mean": mean}
            if wanted is not None:
                means[key][name] |= {"wanted": wanted, "met": mean >= wanted}
    return {"graph_layout": graph_layout(), "layers": results, "geometric_means": means}


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a layer and sparsity, and the geometric means."""
    headers = ["layer", "sparsity", "fastest dense, ms", *SPARSE]
    headers += [f"{part.replace('_', ' ')}, ms" for part in PARTS]
    rows: list[common.Row] = []
    for result in measured["layers"]:
        dense = result["fastest_dense"]
        text = f"{dense.removeprefix('dense ')} {result['dense'][dense]['median'] * 1e3:.3g}"
        for sparsity, sparse in result["sparse"].items():
            row: common.Row = [result["layer"], sparsity, text]
            row += [common.with_spread(sparse["speedups"][name]) for name in SPARSE]
            row += [sparse["parts"][part]["seconds"]["median"] * 1e3 for part in PARTS]
            rows.append(row)
    blank: common.Row = [None] * len(PARTS)
    for sparsity, means in measured["geometric_means"].items():
        values = [means[name]["geometric_mean"] for name in SPARSE]
        rows.append(["geometric mean", sparsity, None, *values, *blank])
        wanted = [means[name].get("wanted") for name in SPARSE]
        rows.append(["  wanted", sparsity, None, *wanted, *blank])
    for result in measured["layers"]:
        for name, reason in result["unavailable"].items():
            rows.append([result["layer"], name, reason, *[None] * len(SPARSE), *blank])
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_layers(parser, LAYERS)
    parser.add_argument("--batch", type=options.positive, help="images, for every layer")
    parser.add_argument(
        "--sparsities", nargs="+", type=options.sparsity, default=[0.8, 0.9, 0.95], metavar="S"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")


BENCHMARK = common.Benchmark(
    "layers",
    "one convolution, forward and both gradients: SWAT over the fastest dense form",
    _add_arguments,
    measure,
    table,
    (
        "Speed-up: seconds of the fastest dense form over those of the side, round by round:",
        "median [minimum, maximum]. Dense forms: NCHW, channels_last, torch.compile of it.",
    ),
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
