"""Compile time: `swatfx.compile` beside `torch.fx.symbolic_trace` and shape propagation.

    python -m benchmarks.compile_cost [--models NAME ...] [--chain-lengths N ...] [--quick] [--json]

The baseline is what any fx user pays for a traced graph with shapes, in three forms that are timed
side by side: ShapeProp under a FakeTensorMode with one fake input (`trace+fake`), ShapeProp given
the FakeTensorMode, which copies the module (`trace+fake-module`), and ShapeProp on a real input
(`trace+real`: batch 1 for networks; it runs the network, which for a chain of 8 x 8 layers is
cheaper than any fake run). `over_fake` is the ratio to the faster of the first two,
`over_fastest` to the fastest of the three.

The first weight thresholds are counted apart: the seconds inside `WeightThreshold.recompute` are
in `threshold_seconds`, and `net_seconds` is the rest. Ratios are of `net_seconds`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

import swatfx
from benchmarks import common, options
from swatfx import models
from swatfx.compiled import Threshold

_MODELS = ("resnet50", "densenet121")
_QUICK_MODELS = ("digits/cnn",)
_LENGTHS = (250, 1000, 4000)
_QUICK_LENGTHS = (10, 20)
_FAKE = ("trace+fake", "trace+fake-module")
_BASES = (*_FAKE, "trace+real")
_POLICY = "swat-u:0.9"


def linear_chain(length: int) -> nn.Module:
    """`length` pairs of Linear(8, 8) and ReLU."""
    return nn.Sequential(*(m for _ in range(length) for m in (nn.Linear(8, 8), nn.ReLU())))


def conv_chain(length: int) -> nn.Module:
    """`length` pairs of a 1x1 convolution of four channels and ReLU."""
    return nn.Sequential(*(m for _ in range(length) for m in (nn.Conv2d(4, 4, 1), nn.ReLU())))


CHAINS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "linear": (linear_chain, (2, 8)),
    "conv": (conv_chain, (2, 4, 4, 4)),
}


def trace_fake(model: nn.Module, x: Tensor) -> None:
    """Trace, then propagate a fake input; parameters turn fake as they are met."""
    gm = fx.symbolic_trace(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        ShapeProp(gm).propagate(mode.from_tensor(x))


def trace_fake_module(model: nn.Module, x: Tensor) -> None:
    """Trace, then let ShapeProp make a fake copy of the module."""
    ShapeProp(fx.symbolic_trace(model), FakeTensorMode()).propagate(x)


def trace_real(model: nn.Module, x: Tensor) -> None:
    """Trace, then run the graph on a real input."""
    ShapeProp(fx.symbolic_trace(model)).propagate(x)


@contextmanager
def threshold_clock() -> Iterator[list[float]]:
    """Collects the seconds spent in first thresholds while it is open: one entry a call."""
    original = Threshold.recompute
    spent: list[float] = []

    def recompute(self: Threshold, x: Tensor) -> None:
        start = time.perf_counter()
        original(self, x)
        spent.append(time.perf_counter() - start)

    Threshold.recompute = recompute  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Threshold.recompute = original  # type: ignore[method-assign]


def _compile_side(model: nn.Module, policy: str) -> common.Side:
    def side() -> dict[str, float]:
        with threshold_clock() as spent:
            start = time.perf_counter()
            swatfx.compile(model, policy)
            seconds = time.perf_counter() - start
        thresholds = sum(spent)
        return {
            "seconds": seconds,
            "threshold_seconds": thresholds,
            "net_seconds": seconds - thresholds,
        }

    return side


def _with_net(side: common.Side) -> common.Side:
    def wrapped() -> dict[str, float]:
        seconds = side()["seconds"]
        return {"seconds": seconds, "net_seconds": seconds}

    return wrapped


def _case(
    name: str, model: nn.Module, shape: Sequence[int], repeats: int, tick: Callable[[], object]
) -> dict[str, Any]:
    """All sides of one model."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    bases = dict(zip(_BASES, (trace_fake, trace_fake_module, trace_real), strict=True))
    sides: dict[str, common.Side] = {}
    for key, function in bases.items():
        # A real run moves the statistics of batch norms: every side has a model of its own.
        twin = copy.deepcopy(model)
        sides[key] = _with_net(common.timed(lambda f=function, m=twin: f(m, x)))  # type: ignore[misc]
    sides["swatfx.compile"] = _compile_side(copy.deepcopy(model), _POLICY)
    sides["swatfx.compile dense"] = _compile_side(copy.deepcopy(model), "dense")
    rounds = common.alternate(sides, repeats, tick=tick)
    fake = common.fastest(rounds, _FAKE)
    fastest = common.fastest(rounds, _BASES)

    def over(base: str) -> dict[str, float]:
        return common.ratio(rounds, "swatfx.compile", base, "net_seconds")

    gm = swatfx.compile(model, _POLICY)
    return {
        "name": name,
        "input_shape": list(shape),
        "layers": sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()),
        "nodes_traced": len(fx.symbolic_trace(model).graph.nodes),
        "nodes_compiled": len(gm.graph.nodes),
        "fastest_fake": fake,
        "fastest": fastest,
        "over_fake": over(fake),
        "over_fastest": over(fastest),
        "sides": common.summary(rounds),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all sides of every model and of every chain."""
    repeats = args.repeats or (1 if args.quick else 7)
    names = args.models if args.models is not None else (_QUICK_MODELS if args.quick else _MODELS)
    lengths = args.chain_lengths
    if lengths is None:
        lengths = _QUICK_LENGTHS if args.quick else _LENGTHS
    cases, chains = [], {}
    calls = (len(names) + len(CHAINS) * len(lengths)) * (repeats + 1) * (len(_BASES) + 2)
    with common.progress(calls, "compile_cost") as bar:
        for name in names:
            shape = (1, *models.default_input_shape(name))
            cases.append(_case(name, models.create(name), shape, repeats, bar.update))
        for kind, (build, shape) in CHAINS.items():
            results = [
                _case(f"chain of {n} {kind}+relu", build(n), shape, repeats, bar.update)
                for n in lengths
            ]
            cases += results
            chains[kind] = _growth(lengths, results)
    return {"policy": _POLICY, "cases": cases, "chain_growth": chains}


def _growth(lengths: Sequence[int], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Growth exponents of every side's time without thresholds over the chain's length."""
    growth: dict[str, Any] = {"lengths": list(lengths)}
    for side in results[0]["sides"] if len(results) > 1 else ():
        medians = [r["sides"][side]["net_seconds"]["median"] for r in results]
        growth[side] = {
            "fitted": common.growth_exponent(lengths, medians),
            "last_step": common.growth_exponent(lengths[-2:], medians[-2:]),
        }
    return growth


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a model or chain, and the growth exponents."""
    headers = ["model", *(f"{base}, ms" for base in _BASES), "compile net, ms", "thresholds, ms"]
    headers += ["over fake", "over fastest"]
    rows: list[common.Row] = []
    for case in measured["cases"]:
        sides = case["sides"]
        row = [case["name"], *(sides[base]["seconds"]["median"] * 1e3 for base in _BASES)]
        for quantity in ("net_seconds", "threshold_seconds"):
            row.append(sides["swatfx.compile"][quantity]["median"] * 1e3)
        ratios = [common.with_spread(case[key]) for key in ("over_fake", "over_fastest")]
        rows.append([*row, *ratios])
    for kind, growth in measured["chain_growth"].items():
        for fit in ("fitted", "last_step") if "swatfx.compile" in growth else ():
            exponents = [growth[side][fit] for side in (*_BASES, "swatfx.compile")]
            rows.append([f"growth exponent, {kind}, {fit}", *exponents, None, None, None])
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="*", type=options.given, metavar="NAME", help="of swatfx.models.create"
    )
    parser.add_argument("--chain-lengths", nargs="*", type=options.positive, metavar="N")


BENCHMARK = common.Benchmark(
    "compile_cost",
    "swatfx.compile with SWAT-U 90% over torch.fx.symbolic_trace and shape propagation",
    _add_arguments,
    measure,
    table,
    (
        "Times are medians; ratios are of compile time without the first weight thresholds,",
        "taken round by round: median [minimum, maximum].",
    ),
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
