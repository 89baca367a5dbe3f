"""Whether the kernels that are chosen are the fastest: training steps under each choice.

    python -m benchmarks.kernel_choice [--model NAME[:BATCH[:SIDE]] ...] [--sparsities S ...]

Sides are the kernels that `swatfx.compile` chooses for the shapes ("auto"), sparse ones wherever
they can run, dense ones alone, and the dense model in channels_last, in fp32 and under autocast to
bf16. Where "auto" chooses for every layer what another side runs, that side's times are its own.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from benchmarks import common, options
from benchmarks.sides import Network, parse_network
from swatfx import forecast, models
from swatfx.compiled import all_plans
from swatfx.errors import SwatWarning
from swatfx.timing.rounds import clock
from swatfx.timing.steps import DTYPES, Step, autocast

MOST = 1.05  # of the time of the better choice
_NETWORKS = (
    "mobilenet_v3_large:2:128",
    "mobilenet_v3_large:32:128",
    "efficientnet_b0:2:128",
    "efficientnet_b0:32:128",
    "convnext_tiny:8:160",
    "resnet50:16",
)
_AUTO, _SPARSE, _DENSE = _CHOICES = ("auto", "sparse", "dense")
_METHOD = "{policy}:{sparsity},period=1000"


def _side(step: Step) -> common.Side:
    def run() -> dict[str, float]:
        start = clock()
        step.step()
        return {"seconds": clock() - start}

    return run


def _step(model: nn.Module, x: Tensor, classes: int, dtype: str) -> Step:
    y = torch.arange(len(x)) % classes

    def loss(output: Any) -> Tensor:
        return F.cross_entropy(output.float(), y)

    return Step(model, ((x,), {}), loss, DTYPES[dtype])


def _of_network(network: Network, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = models.create(network.name), torch.randn(network.shape)
    sides: dict[str, common.Side] = {}
    for dtype in args.dtypes:
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        last = x.contiguous(memory_format=torch.channels_last)
        sides[f"plain {dtype}"] = _side(_step(other, last, network.classes, dtype))
    facts: dict[str, dict[str, Any]] = {}
    for dtype in args.dtypes:
        for sparsity in args.sparsities:
            policy = _METHOD.format(policy=args.policy, sparsity=sparsity)
            kernels: dict[tuple[str, ...], str] = {}
            case = f"{dtype} {sparsity:g}"
            facts[case] = {}
            for choice in reversed(_CHOICES):
                with autocast(DTYPES[dtype]):
                    gm = swatfx.compile(
                        copy.deepcopy(model), policy, example_inputs=(x,), kernels=choice
                    )
                plans = all_plans(gm).values()
                chosen = tuple(p.kernels if p.kernels == "sparse" else "" for p in plans)
                if chosen not in kernels:
                    sides[f"{case} {choice}"] = _side(_step(gm, x, network.classes, dtype))
                facts[case][choice] = kernels.setdefault(chosen, choice)
                facts[case][f"{choice} layers"] = sum(map(bool, chosen))
            facts[case]["predicted"] = gm.swat.predicted
    rounds = common.alternate(sides, args.repeats or (1 if args.quick else 4))
    plains = [f"plain {dtype}" for dtype in args.dtypes]
    found = {}
    for case, known in facts.items():
        names = {choice: f"{case} {known[choice]}" for choice in _CHOICES}
        better = common.fastest(rounds, [names[_SPARSE], names[_DENSE]])
        plain = common.fastest(rounds, plains)
        found[case] = {
            **known,
            "better": better,
            "over_better": common.ratio(rounds, names[_AUTO], better),
            "sparse_over_dense": common.ratio(rounds, names[_SPARSE], names[_DENSE]),
            "fastest_plain": plain,
            "over_plain": common.ratio(rounds, names[_AUTO], plain),
            "met": common.ratio(rounds, names[_AUTO], better)["median"] <= MOST,
        }
    return {"cases": found, "seconds": common.summary(rounds)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All networks."""
    networks = args.model or [parse_network(text) for text in _NETWORKS]
    if args.quick:
        networks = args.model or [Network("digits/cnn", 4)]
    constants, source = forecast.read(forecast.this_machine())
    found: dict[str, Any] = {}
    with common.progress(len(networks), "kernel choice") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", SwatWarning)
        for network in networks:
            found[str(network)] = _of_network(network, args)
            bar.update()
    return {
        "policy": args.policy,
        "wanted": MOST,
        "constants": source,
        "median_error": constants.median_error,
        "worst_error": constants.worst_error,
        "networks": found,
    }


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a network, dtype and sparsity."""
    headers = ["network", "dtype, sparsity", "sparse layers", "of", "time over the better choice"]
    headers += ["sparse over dense", "over the plain model", "that is"]
    rows: list[common.Row] = []
    for name, result in measured["networks"].items():
        for case, known in result["cases"].items():
            ratios = (known[key] for key in ("over_better", "sparse_over_dense", "over_plain"))
            counts = [known[f"{choice} layers"] for choice in (_AUTO, _SPARSE)]
            told = [common.with_spread(ratio) for ratio in ratios]
            rows.append([name, case, *counts, *told, known["fastest_plain"]])
    return headers, rows


def _method(text: str) -> str:
    """A policy's name, to which a sparsity is added."""
    options.policy(_METHOD.format(policy=text, sparsity=0.9))
    return text


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=parse_network, nargs="+", metavar="NAME[:BATCH[:SIDE]]")
    parser.add_argument(
        "--sparsities", nargs="+", type=options.sparsity, default=[0.8, 0.9], metavar="S"
    )
    parser.add_argument("--policy", type=_method, default="swat-u", metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))


BENCHMARK = common.Benchmark(
    "kernel_choice",
    "training steps with the kernels that are chosen, beside other choices",
    _add_arguments,
    measure,
    table,
    ("Ratios of times, round by round: median [minimum, maximum]; below 1 is faster.",),
    allocator="tuned",
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
