"""A training step and its memory: dense forms, the policy `dense`, and SWAT-U 90%.

    python -m benchmarks.step_cost [--networks NAME:BATCH[:SIDE] ...] [--quick] [--json]

A step is forward, loss, backward and SGD with momentum, fp32. The dense model runs in three forms
(NCHW, channels_last, torch.compile of channels_last); the fastest is what SWAT is compared with.
`dense` policy is compared with the untouched model in the same form. SWAT runs on the reference
kernels, with thresholds recomputed every step (P=1) or every 1,000 steps, and once more with
torch.topk as the threshold search.

Peak memory is of a process of its own a side (peak resident set over the steps after the first);
bytes saved for backward are the distinct storages that autograd keeps, parameters excluded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.step_sides import DENSE, POLICY_DENSE, SIDES, SWAT, Network, Trainer, memory
from swatfx import models

_NETWORKS = (Network("resnet50", 8), Network("cifar/resnet18", 32))
_QUICK_NETWORKS = (Network("resnet18", 2, 64),)
_REFERENCE = "swat-u 90% P=1"
_BY_TOPK = "swat-u 90% P=1, torch.topk"


def parse_network(text: str) -> Network:
    """NAME:BATCH or NAME:BATCH:SIDE."""
    parts = text.split(":")
    try:
        name, batch, side = parts[0], int(parts[1]), int(parts[2]) if len(parts) == 3 else None
        if len(parts) > 3 or batch < 1:
            raise ValueError(text)
    except (IndexError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:BATCH or NAME:BATCH:SIDE") from None
    return Network(name, batch, side)


def _time(
    network: Network, names: Sequence[str], repeats: int, tick: Callable[[], object]
) -> dict[str, Any]:
    """Step times of all sides, and the ratios that matter."""
    model = models.create(network.name)
    trainers = {name: Trainer(network, SIDES[name], model) for name in names}
    del model
    sides = {name: common.timed(trainer.step) for name, trainer in trainers.items()}
    rounds = common.alternate(sides, repeats, warmup=2, tick=tick)
    fastest = common.fastest(rounds, [name for name in names if name in DENSE])
    result: dict[str, Any] = {"fastest_dense": fastest, "sides": common.summary(rounds)}
    result["over_fastest_dense"] = {
        name: common.ratio(rounds, name, fastest) for name in names if name != fastest
    }
    result["over_same_form"] = {
        name: common.ratio(rounds, name, same)
        for name in names
        if name in POLICY_DENSE and (same := _untouched(name)) in names
    }
    if _REFERENCE in names and _BY_TOPK in names:
        result["reference_over_torch_topk"] = common.ratio(rounds, _REFERENCE, _BY_TOPK)
    return result


def _untouched(name: str) -> str:
    """The side of the untouched model in the form of the side `name`."""
    return f"model, {SIDES[name].form}"


def _memory_of(network: Network, name: str) -> dict[str, Any]:
    """`memory` in a process of its own, under this process's allocator."""
    text = f"{network.name}:{network.batch}" + (f":{network.side}" if network.side else "")
    words = [sys.executable, "-m", "benchmarks.step_cost", "--networks", text, "--worker"]
    words += ["--memory-of", name]
    done = subprocess.run(words, cwd=common.ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {name!r} failed, see above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of every side of every network."""
    networks = args.networks or (_QUICK_NETWORKS if args.quick else _NETWORKS)
    if args.memory_of:
        return memory(networks[0], args.memory_of, steps=3)
    repeats = args.repeats or (2 if args.quick else 9)
    skipped = {"model, compiled"} if args.quick else set()
    names = args.sides or [name for name in SIDES if name not in skipped]
    if not any(name in DENSE for name in names):
        raise SystemExit(f"--sides wants a dense side at least: {', '.join(map(repr, DENSE))}")
    weighed = names if args.memory_sides is None else args.memory_sides
    calls = len(networks) * (len(names) * (repeats + 2) + len(weighed))
    results = []
    with common.progress(calls, "step_cost") as bar:
        for network in networks:
            weights: dict[str, dict[str, Any]] = {}
            for name in weighed:
                weights[name] = _memory_of(network, name)
                bar.update()
            results.append(
                {
                    "network": network.name,
                    "input_shape": list(network.shape),
                    **_time(network, names, repeats, bar.update),
                    "memory": weights,
                    "memory_over_same_form": _memory_ratios(weights),
                }
            )
    return {"networks": results}


def _memory_ratios(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Memory of every rewritten side over the untouched model in the same form."""
    ratios = {}
    for name in weights:
        same = _untouched(name)
        if name not in DENSE and same in weights:
            ratios[name] = {
                key: weights[name][key] / weights[same][key]
                for key in ("peak_rss_bytes", "saved_for_backward_bytes")
            }
    return ratios


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a side."""
    headers = ["network", "side", "step, ms [min, max]", "over fastest dense", "over same form"]
    headers += ["peak, MB", "saved, MB", "saved over same form"]
    rows: list[common.Row] = []
    for result in measured["networks"]:
        network = f"{result['network']} {tuple(result['input_shape'])}"
        for name, quantities in result["sides"].items():
            step = {key: value * 1e3 for key, value in quantities["seconds"].items()}
            over = result["over_fastest_dense"].get(name)
            same = result["over_same_form"].get(name)
            weight = result["memory"].get(name, {})
            ratios = result["memory_over_same_form"].get(name, {})
            rows.append(
                [
                    network,
                    name,
                    common.with_spread(step),
                    "fastest" if over is None else common.with_spread(over),
                    None if same is None else common.with_spread(same),
                    _megabytes(weight.get("peak_rss_bytes")),
                    _megabytes(weight.get("saved_for_backward_bytes")),
                    ratios.get("saved_for_backward_bytes"),
                ]
            )
        if (over := result.get("reference_over_torch_topk")) is not None:
            text = f"P=1: reference search over torch.topk: {common.with_spread(over)}"
            rows.append([network, text, *[None] * 6])
    return headers, rows


def _megabytes(value: int | None) -> str | None:
    return None if value is None else f"{value / 1e6:.1f}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks", nargs="+", type=parse_network, metavar="NAME:BATCH[:SIDE]", help="to train"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="to time")
    parser.add_argument("--memory-sides", nargs="*", choices=SIDES, help="to weigh (default: all)")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)


BENCHMARK = common.Benchmark(
    "step_cost",
    "step time and memory: dense forms, the policy dense, SWAT-U 90% on the reference kernels",
    _add_arguments,
    measure,
    table,
    (
        f"SWAT-U: {', '.join(SWAT)}; channels_last unless its name says nchw.",
        "Times are medians; ratios are taken round by round: median [minimum, maximum].",
    ),
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
