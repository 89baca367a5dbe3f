"""Top-K of a tensor: threshold search, packing and unpacking, in copies of that tensor.

    python -m benchmarks.topk [--sizes N ...] [--densities D ...] [--data KIND ...] [--json]

The unit is `copy_` into a warm buffer, timed in turn with everything else. The threshold includes
the search for NaN, as a refresh does; packing keeps what is not below it; unpacking gives the
dense tensor back. Beside them stand the plain-torch definitions, and torch.topk and torch.kthvalue,
which are given the magnitudes and look for no NaN. `growth_exponent` is the slope of log(seconds)
over log(n) from a million elements on: 1 is O(n).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, options
from swatfx import kernels, ops
from swatfx.density import Density
from swatfx.ops.state import compute_state
from swatfx.tensors import bits

_SIZES = (10**5, 10**6, 6 * 10**6, 25 * 10**6)
_QUICK_SIZES = (10**4, 2 * 10**5)
_LEAST_ELEMENTS = 2 * 10**6  # per timed call, so that the clock's grain does not matter
_ASYMPTOTIC = 10**6
UNIT = "copy_"
REFERENCE = ", reference"
BOTH = "threshold + pack"
# At most so many copies, aimed at for 25 million elements at densities 0.1 and 0.2.
TARGETS = {BOTH: 10.0, "pack": 4.0, "unpack": 3.0}
_TARGET_SIZE = 25 * 10**6


def threshold(x: Tensor, density: Density) -> Tensor:
    """The threshold of a layer's input, as a refresh computes it."""
    return compute_state(x, density, "nchw", layer="benchmark", spatial=0, is_weight=False)


def pack(x: Tensor, state: Tensor) -> Tensor:
    """The packed Top-K of `x`."""
    packed: Tensor = ops.pack(x, state, 0, "nchw", x.dtype)
    return packed


def by_topk(scores: Tensor, density: Density) -> Tensor:
    """The threshold by torch.topk."""
    flat = scores.reshape(-1)
    return flat.topk(density.count(flat.numel())).values.min()


def by_kthvalue(scores: Tensor, density: Density) -> Tensor:
    """The threshold by torch.kthvalue."""
    flat = scores.reshape(-1)
    return flat.kthvalue(flat.numel() - density.count(flat.numel()) + 1).values


def make_values(kind: str, size: int, seed: int = 0) -> Tensor:
    """Normal values, their positive part, as behind a ReLU, or all one."""
    if kind == "equal":
        return torch.ones(size)
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values.relu() if kind == "relu" else values


def _plain(function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with kernels.reference_only():
            function()

    return run


def calls(x: Tensor, density: Density) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    buffer, scores = x.clone(), x.abs()
    state = threshold(x, density)
    packed = pack(x, state)
    ours: dict[str, Callable[[], object]] = {
        "threshold": lambda: threshold(x, density),
        "pack": lambda: pack(x, state),
        "unpack": lambda: bits.unpack(packed, x.numel(), x.dtype),
    }
    return {
        UNIT: lambda: buffer.copy_(x),
        **ours,
        BOTH: lambda: pack(x, threshold(x, density)),
        **{name + REFERENCE: _plain(call) for name, call in ours.items()},
        "torch.topk": lambda: by_topk(scores, density),
        "torch.kthvalue": lambda: by_kthvalue(scores, density),
    }


def _side(call: Callable[[], object], elements: int) -> common.Side:
    repeats = max(1, _LEAST_ELEMENTS // elements)

    def side() -> dict[str, float]:
        call()  # threads that slept since the last side are awake by now
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return {"seconds": (time.perf_counter() - start) / repeats}

    return side


def check(x: Tensor, density: Density) -> None:
    """Stop if any two of the searches, or of the packings, disagree."""
    state = threshold(x, density)
    packed = pack(x, state)
    with kernels.reference_only():
        same = torch.equal(threshold(x, density), state) and torch.equal(pack(x, state), packed)
    same &= torch.equal(by_topk(x.abs(), density), state)
    same &= torch.equal(by_kthvalue(x.abs(), density), state)
    kept = torch.where(x.abs() < state, 0, x)
    if not same or not torch.equal(bits.unpack(packed, x.numel(), x.dtype), kept):
        raise SystemExit(f"the results disagree at n = {x.numel()}, density {density.value:g}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every side at every size, density and kind of data."""
    sizes = args.sizes or (_QUICK_SIZES if args.quick else _SIZES)
    repeats = args.repeats or (2 if args.quick else 9)
    densities = args.densities or [0.1, 0.2]
    kinds = args.data or ["normal", "relu"]
    cases = []
    sides = len(calls(torch.ones(2), Density(0.5)))
    total = len(sizes) * len(densities) * len(kinds) * sides * (repeats + 1)
    with common.progress(total, "topk") as bar:
        for size in sizes:
            for kind in kinds:
                x = make_values(kind, size)
                for value in densities:
                    density = Density(value)
                    check(x, density)
                    timed = {n: _side(c, size) for n, c in calls(x, density).items()}
                    rounds = common.alternate(timed, repeats, tick=bar.update)
                    over = {name: common.ratio(rounds, name, UNIT) for name in timed}
                    case = {"n": size, "data": kind, "density": value, "over_copy": over}
                    cases.append(case | {"sides": common.summary(rounds)})
    return {"cases": cases, "growth_exponents": _growth(cases), "targets": _targets(cases)}


def _growth(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Exponent of each side over the large sizes, in the first kind of data and density."""
    first = [c for c in cases if all(c[k] == cases[0][k] for k in ("data", "density"))]
    large = [c for c in first if c["n"] >= _ASYMPTOTIC]
    if len(large) < 2:
        return {}
    sizes = [c["n"] for c in large]
    return {
        name: common.growth_exponent(sizes, [c["sides"][name]["seconds"]["median"] for c in large])
        for name in large[0]["sides"]
    }


def _targets(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is aimed at beside what was measured, where its size was."""
    return [
        {
            **{key: case[key] for key in ("n", "data", "density")},
            "side": name,
            "at_most": most,
            "measured": case["over_copy"][name]["median"],
            "met": case["over_copy"][name]["median"] <= most,
        }
        for case in cases
        if case["n"] == _TARGET_SIZE
        for name, most in TARGETS.items()
    ]


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a case and side, then the growth exponents."""
    headers = ["n", "data", "density", "side", "ms", "ns/element", "copies", "at most"]
    wanted = {
        (t["n"], t["data"], t["density"], t["side"]): t["at_most"] for t in measured["targets"]
    }
    rows: list[common.Row] = []
    for case in measured["cases"]:
        key = (case["n"], case["data"], case["density"])
        for name, side in case["sides"].items():
            seconds = side["seconds"]["median"]
            copies = common.with_spread(case["over_copy"][name])
            times = [seconds * 1e3, seconds * 1e9 / case["n"]]
            rows.append([*key, name, *times, copies, wanted.get((*key, name))])
    for name, exponent in measured["growth_exponents"].items():
        rows.append([f"n^{exponent:.3g}", None, None, name, None, None, None, None])
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", type=options.positive, metavar="N")
    parser.add_argument("--densities", nargs="+", type=options.sparsity, metavar="D")
    parser.add_argument("--data", nargs="+", choices=("normal", "relu", "equal"))


BENCHMARK = common.Benchmark(
    "topk",
    "threshold, pack and unpack of n float32, in copies into a warm buffer",
    _add_arguments,
    measure,
    table,
    notes=(
        "copies: seconds over those of copy_ of the same tensor into a warm buffer, round by round",
    ),
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
