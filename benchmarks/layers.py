"""One convolution's training work: forward, input gradient, weight gradient, SWAT beside dense.

    python -m benchmarks.layers [--layers NUMBER ...] [--sparsities S ...] [--dtypes DTYPE ...]
                                [--batch N] [--quick]

Dense is NCHW, channels_last, and both under torch.compile, which compiles forward and backward, in
fp32 and under bf16 autocast; a speed-up is the time of the fastest of them, whatever its dtype,
over that of the side, round by round; `same_dtype` is over the fastest of the side's own. Inputs
are the positive part of normal values. The sparse sides, in each dtype:

- kernels: the convolution, its input gradient and its weight gradient, with thresholds and packed
  activation given;
- period_1: all of a step, with both thresholds searched and the activation packed, its input and
  output in the layout that a compiled graph keeps between its convolutions;
- period_1_converted: the same between neighbours in NCHW or channels_last, whichever is faster:
  input, output and both of their gradients are copied;
- period_1000: as period_1, with thresholds that are kept.

The weight changes before every call, so each has to compress it anew. `parts` breaks period_1 down,
and `bounds` say of each product what it cannot be faster than, and how near it comes
([what they mean](README.md#bounds-of-a-convolution)).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import common, options
from benchmarks.bounds import BOUNDS, Kept, amounts, counted, reached
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
from benchmarks.rates import NoProbeError, Rates, measured_rates
from swatfx.tensors import layouts
from swatfx.timing.steps import DTYPES, failure

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
# Geometric means of speed-ups that are aimed at, by sparsity: of fp32 over dense fp32.
TARGETS = {
    "kernels": {0.8: 2.0, 0.9: 3.5, 0.95: 6.0},
    "period_1": {0.8: 1.5, 0.9: 3.0, 0.95: 5.0},
}
SPARSE = ("kernels", "period_1", "period_1_converted", "period_1000")
_OUTER = {"nchw": layouts.ROW_MAJOR, "channels_last": layouts.CHANNELS_LAST}
_WARMUP = 2


def _dense_sides(
    data: Data, dtypes: Sequence[str], compiled: bool
) -> tuple[dict[str, common.Side], dict[str, str]]:
    """(sides, why the others are not there), by names such as "dense nchw fp32"."""
    sides, unavailable = {}, {}
    for dtype in dtypes:
        for form, layout in _OUTER.items():
            eager = dense_side(data, layout, compiled=False, dtype=dtype)
            sides[f"dense {form} {dtype}"] = eager
            if not compiled:
                continue
            name, side = (
                f"dense compiled_{form} {dtype}",
                dense_side(data, layout, compiled=True, dtype=dtype),
            )
            if reason := failure(side):
                unavailable[name] = reason
            else:
                sides[name] = side
    return sides, unavailable


def _sparse_sides(data: Data, sparsity: float, dtype: str) -> tuple[dict[str, common.Side], Kept]:
    """(the sides at one sparsity, named "kernels 0.9 fp32" and so on; what their masks keep)."""
    layout = graph_layout()

    def conv(period: int = 1) -> SparseConv:
        return SparseConv(data, sparsity, period, layout, dtype)

    sides = {
        "kernels": conv().kernels_side(),
        "period_1": conv().step_side(layout),
        "period_1000": conv(1000).step_side(layout),
        "parts": conv().parts_side(),
    }
    for form, outer in _OUTER.items():
        sides[f"period_1_from_{form}"] = conv().step_side(outer)
    return {_name(name, sparsity, dtype): side for name, side in sides.items()}, counted(conv())


def _name(side: str, sparsity: float, dtype: str) -> str:
    return f"{side} {sparsity:g} {dtype}"


def measure_layer(
    layer: Layer,
    args: argparse.Namespace,
    repeats: int,
    rates: Rates | None,
    tick: Callable[[], object],
) -> dict[str, Any]:
    """All sides of one layer, in turn.

    Args:
        layer: which.
        args: `sparsities`, `dtypes`, and whether `compiled` forms are measured.
        repeats: rounds.
        rates: of the machine; None leaves bounds out.
        tick: called after each call of a side.
    """
    torch._dynamo.reset()
    data = Data(layer)
    sides, unavailable = _dense_sides(data, args.dtypes, args.compiled)
    dense = list(sides)
    kept: dict[tuple[float, str], Kept] = {}
    for sparsity in args.sparsities:
        for dtype in args.dtypes:
            made, kept[sparsity, dtype] = _sparse_sides(data, sparsity, dtype)
            sides |= made
    rounds = common.alternate(sides, repeats, warmup=_WARMUP, tick=tick)
    fastest = {"any": common.fastest(rounds, dense)} | {
        dtype: common.fastest(rounds, [name for name in dense if name.endswith(dtype)])
        for dtype in args.dtypes
    }
    result: dict[str, Any] = {
        "layer": str(layer),
        "fastest_dense": fastest,
        "unavailable": unavailable,
        "dense": {name: common.spread(rounds[name]["seconds"]).to_json() for name in dense},
        "sparse": {},
    }
    for (sparsity, dtype), counts in kept.items():
        found = _compared(rounds, fastest, sparsity, dtype)
        if rates is not None:
            found["bounds"] = {
                product: reached(done, rates, dtype, found["parts"][product]["seconds"])
                for product, done in amounts(layer, dtype, counts).items()
            }
        found["kept"] = {"weights": counts.weights, "activations": counts.activations}
        result["sparse"].setdefault(f"{sparsity:g}", {})[dtype] = found
    return result


def _compared(
    rounds: common.Rounds, fastest: Mapping[str, str], sparsity: float, dtype: str
) -> dict[str, Any]:
    """Times of the sides of one sparsity and dtype, and what they gain over the dense ones."""
    froms = [_name(f"period_1_from_{form}", sparsity, dtype) for form in _OUTER]
    outer = common.fastest(rounds, froms)
    names = {name: _name(name, sparsity, dtype) for name in SPARSE} | {"period_1_converted": outer}
    laps = rounds[_name("parts", sparsity, dtype)]
    parts = {part: common.spread(laps[part]).to_json() for part in PARTS}
    total = sum(seconds["median"] for seconds in parts.values())
    return {
        "seconds": {
            key: common.spread(rounds[name]["seconds"]).to_json() for key, name in names.items()
        },
        "speedups": {k: common.ratio(rounds, fastest["any"], n) for k, n in names.items()},
        "same_dtype": {k: common.ratio(rounds, fastest[dtype], n) for k, n in names.items()},
        "converted_from": outer.removeprefix("period_1_from_").split()[0],
        "parts": {
            part: {"seconds": seconds, "share": seconds["median"] / total}
            for part, seconds in parts.items()
        },
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All layers, and the geometric means of their speed-ups."""
    chosen = chosen_layers(args, LAYERS, _QUICK_LAYERS)
    if args.batch:
        chosen = [replace(layer, batch=args.batch) for layer in chosen]
    args.dtypes = list(dict.fromkeys(args.dtypes))
    args.sparsities = list(dict.fromkeys(args.sparsities))
    args.compiled = not (args.quick or args.no_compile)
    repeats = args.repeats or (2 if args.quick else 7)
    rates, why = None, None
    try:
        rates = measured_rates()
    except NoProbeError as error:
        why = str(error)
        print(f"no bounds: {why}", file=sys.stderr)
    per = len(_OUTER) * (1 + args.compiled) + len(args.sparsities) * (len(SPARSE) + 2)
    total = len(chosen) * len(args.dtypes) * per * (repeats + _WARMUP)
    with common.progress(total, "layers") as bar:
        results = [measure_layer(layer, args, repeats, rates, bar.update) for layer in chosen]
    return {
        "graph_layout": graph_layout(),
        "rates": None if rates is None else rates.to_json(),
        "no_rates": why,
        "layers": results,
        "geometric_means": _means(results, args),
    }


def _means(results: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """By sparsity, dtype, and what is compared with which dense form."""
    means: dict[str, dict[str, Any]] = {}
    for sparsity in args.sparsities:
        key = f"{sparsity:g}"
        for dtype in args.dtypes:
            found = means.setdefault(key, {}).setdefault(dtype, {})
            for over in ("speedups", "same_dtype"):
                found[over] = {}
                for name in SPARSE:
                    mean = common.geometric_mean(
                        [r["sparse"][key][dtype][over][name]["median"] for r in results]
                    )
                    found[over][name] = {"geometric_mean": mean}
                    wanted = TARGETS.get(name, {}).get(sparsity)
                    if wanted is not None and (over, dtype) == ("same_dtype", "fp32"):
                        found[over][name] |= {"wanted": wanted, "met": mean >= wanted}
    return means


def _runs(
    measured: Mapping[str, Any],
) -> Iterator[tuple[Mapping[str, Any], str, str, Mapping[str, Any]]]:
    """(the layer's result, its name, sparsity and dtype, what was measured of these), in turn."""
    for result in measured["layers"]:
        name = result["layer"].replace(", batch ", " x")
        for sparsity, by_dtype in result["sparse"].items():
            for dtype, found in by_dtype.items():
                yield result, name, f"{sparsity} {dtype}", found


def _mean_runs(measured: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for sparsity, by_dtype in measured["geometric_means"].items():
        for dtype, found in by_dtype.items():
            yield f"{sparsity} {dtype}", found


def _number(value: float) -> str:
    """Three digits, but no more than two behind the point: columns stay narrow."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _spread(values: Mapping[str, float]) -> str:
    """Median, and minimum to maximum."""
    low, high = values["minimum"], values["maximum"]
    return f"{_number(values['median'])} [{_number(low)}, {_number(high)}]"


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a layer, sparsity and dtype, over the fastest dense form; the geometric means."""
    headers = ["layer", "side", *SPARSE]
    rows: list[common.Row] = []
    for _, name, run, found in _runs(measured):
        rows.append([name, run, *(_spread(found["speedups"][side]) for side in SPARSE)])
    for run, means in _mean_runs(measured):
        values = [means["speedups"][side]["geometric_mean"] for side in SPARSE]
        rows.append(["geometric mean", run, *values])
    return headers, rows


_OWN = ("kernels", "period_1")


def dense_table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """The fastest dense forms by name and time, and what is gained over those of one's dtype."""
    headers = ["layer", "side", "fastest dense, ms", "of this dtype, ms"]
    headers += [f"{name} / it" for name in _OWN]
    rows: list[common.Row] = []

    for result, name, run, found in _runs(measured):
        own = _dense(result, run.split()[1]).replace(f" {run.split()[1]} ", " ")
        gains = [_spread(found["same_dtype"][side]) for side in _OWN]
        rows.append([name, run, _dense(result, "any"), own, *gains])
    for run, means in _mean_runs(measured):
        of = [means["same_dtype"][side] for side in _OWN]
        rows.append(["geometric mean", run, None, None, *(one["geometric_mean"] for one in of)])
        if any("wanted" in one for one in of):
            rows.append(["  wanted", run, None, None, *(one.get("wanted") for one in of)])
    for result in measured["layers"]:
        for form, reason in result["unavailable"].items():
            rows.append([result["layer"], _short(form), reason, None, *[None] * len(_OWN)])
    return headers, rows


def _dense(result: Mapping[str, Any], over: str) -> str:
    """The fastest dense side of a dtype, or of any: its name and milliseconds."""
    name = result["fastest_dense"][over]
    return f"{_short(name)} {_number(result['dense'][name]['median'] * 1e3)}"


def _short(dense: str) -> str:
    """A dense side's name, as tables have it."""
    return dense.removeprefix("dense ").replace("channels_last", "last")


_PART_NAMES = {"weight_threshold": "weight Top-K", "activation_threshold": "input Top-K"}


def bounds_table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """Each part of period_1: its time, and of a product the bounds and how near it comes."""
    headers = ["layer", "side", "part", "ms", *BOUNDS, "reached", "L2"]
    rows: list[common.Row] = []
    for _, name, run, found in _runs(measured):
        for part in PARTS:
            row: common.Row = [name, run, _PART_NAMES.get(part, part.replace("_", " "))]
            row.append(_spread(_milliseconds(found["parts"][part]["seconds"])))
            bound = found.get("bounds", {}).get(part)
            if bound is None:
                rows.append(row + [None] * (len(headers) - len(row)))
                continue
            bounds = _milliseconds(bound["seconds"])
            row += [f"{bounds[kind]:.2g}" for kind in BOUNDS]
            share = f"{bound['largest']} {bound['reached']:.0%}"
            rows.append([*row, share, f"{bounds['load_l2']:.2g}"])
    return headers, rows


def _milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: value * 1e3 for name, value in seconds.items()}


def rates_table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """What the machine does at most."""
    rates = measured["rates"]
    if rates is None:
        return ["no bounds"], [[measured["no_rates"]]]
    headers = ["FMA, 10^9/s", "bf16 dot product", "L1, GB/s", "L2, GB/s", "memory, GB/s"]
    values = [rates[name] for name in ("fma", "dot", "l1", "l2", "memory")]
    return headers, [[None if value is None else _number(value / 1e9) for value in values]]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_layers(parser, LAYERS)
    parser.add_argument("--batch", type=options.positive, help="images, for every layer")
    parser.add_argument(
        "--sparsities", nargs="+", type=options.sparsity, default=[0.8, 0.9, 0.95], metavar="S"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="of all sides"
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
        "median [minimum, maximum]. Dense forms: NCHW, channels_last ('last'), torch.compile of",
        "both, in each dtype. Bounds are milliseconds from rates of this run, `reached` is the",
        "largest one over the median time; L2: the load bound if all come from that cache.",
    ),
    further=(dense_table, bounds_table, rates_table),
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
