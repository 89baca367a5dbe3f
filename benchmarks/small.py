"""Training steps on tiny images: what a step costs besides its arithmetic.

    python -m benchmarks.small [--policies POLICY ...] [--quick] [--json]

A step is forward, cross entropy, backward and SGD with momentum, in float32 and NCHW: of the dense
model in eager mode, of the compiled one with the kernels that `swatfx.compile` chooses, and with
sparse kernels wherever they run. `overhead` is the time of a side over that of the dense one, round
by round (below 1x ours is faster), in seconds of the clock, and of the processor: on a shared
machine the latter is what a step takes. "resnet50/8" is ResNet-50's graph at an eighth of its
width, so that next to nothing is left but calls.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import swatfx
from benchmarks import common, options
from swatfx import models
from swatfx.models.resnet import ResNet

DENSE = "dense"
KERNELS = ("auto", "sparse")


def _narrow_resnet50() -> nn.Module:
    return ResNet((3, 4, 6, 3), (32, 64, 128, 256), (1, 3, 1), 8, bias=False)


# Network -> (how it is made, shape of a batch).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50/8": (_narrow_resnet50, (2, 3, 8, 8)),
    "resnet50": (lambda: models.create("resnet50"), (2, 3, 32, 32)),
    "cifar/resnet18": (lambda: models.create("cifar/resnet18"), (1, 3, 32, 32)),
    "mobilenet_v3_small": (lambda: models.create("mobilenet_v3_small"), (2, 3, 32, 32)),
}
_QUICK = ("resnet50/8",)


def _step(model: nn.Module, shape: tuple[int, ...]) -> common.Side:
    """One step of `model`, always on the same batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(shape[0], dtype=torch.int64)

    def side() -> dict[str, float]:
        start, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - used,
        }

    return side


def measure_network(
    name: str, policies: list[str], repeats: int, tick: Callable[[], object]
) -> dict[str, Any]:
    """Steps of one network, all sides in turn."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().train()
    sides = {DENSE: _step(copy.deepcopy(model), shape)}
    for policy in policies:
        for kernels in KERNELS:
            compiled = swatfx.compile(copy.deepcopy(model), policy, kernels=kernels)
            sides[f"{policy} {kernels}"] = _step(compiled.train(), shape)
    rounds = common.alternate(sides, repeats, warmup=3, tick=tick)
    return {
        "network": name,
        "input_shape": list(shape),
        "sides": common.summary(rounds),
        "overhead": {
            quantity: {
                side: common.ratio(rounds, side, DENSE, quantity) for side in sides if side != DENSE
            }
            for quantity in ("seconds", "cpu_seconds")
        },
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All networks."""
    names = _QUICK if args.quick else tuple(NETWORKS)
    repeats = args.repeats or (2 if args.quick else 31)
    calls = (1 + len(KERNELS) * len(args.policies)) * (repeats + 3)
    with common.progress(len(names) * calls, "small") as bar:
        found = [measure_network(name, args.policies, repeats, bar.update) for name in names]
    return {"networks": found}


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a side."""
    headers = ["network", "side", "ms [min, max]", "over dense", "over dense, processor's time"]
    rows: list[common.Row] = []
    for result in measured["networks"]:
        for side, quantities in result["sides"].items():
            seconds = {key: value * 1e3 for key, value in quantities["seconds"].items()}
            over = [
                common.with_spread(ratios[side]) if side in ratios else None
                for ratios in result["overhead"].values()
            ]
            label = f"{result['network']} {tuple(result['input_shape'])}"
            rows.append([label, side, common.with_spread(seconds), *over])
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policies",
        type=options.policy,
        nargs="+",
        default=["swat-u:0.9,period=1000"],
        metavar="POLICY",
        help="what ours is compiled with",
    )


BENCHMARK = common.Benchmark(
    "small",
    "steps on tiny images, ours over dense eager float32",
    _add_arguments,
    measure,
    table,
    notes=("over dense: time over that of the dense model's step, round by round; 1 is as fast",),
    allocator="tuned",
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
