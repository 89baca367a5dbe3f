"""Threshold search: the reference `kth_magnitude` beside torch.topk and torch.kthvalue.

    python -m benchmarks.topk_cost [--sizes N ...] [--sparsity S] [--data KIND] [--quick] [--json]

All three find the same k-th largest magnitude of n float32 values. `growth_exponent` is the slope
of log(seconds) over log(n): 1 is O(n).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from swatfx import topk
from swatfx.density import Density

_SIZES = (10**4, 10**5, 10**6, 4 * 10**6, 10**7, 25 * 10**6)
_QUICK_SIZES = (10**4, 10**5, 3 * 10**5)
_LEAST_ELEMENTS = 3 * 10**5  # per timed call, so that the clock's grain does not matter
_ASYMPTOTIC = 10**6  # sizes from here on give the growth exponent: below, fixed costs show


def by_topk(scores: Tensor, density: Density, reduce: object = None) -> Tensor:
    """The threshold by torch.topk; a stand-in for `swatfx.topk.kth_magnitude`."""
    flat = scores.reshape(-1)
    k = density.count(flat.numel())
    if k >= flat.numel():
        return scores.new_zeros(())
    return flat.topk(k).values.min()


def by_kthvalue(scores: Tensor, density: Density) -> Tensor:
    """The threshold by torch.kthvalue."""
    flat = scores.reshape(-1)
    return flat.kthvalue(flat.numel() - density.count(flat.numel()) + 1).values


SEARCHES: dict[str, Callable[[Tensor, Density], Tensor]] = {
    "kth_magnitude": topk.kth_magnitude,
    "torch.topk": by_topk,
    "torch.kthvalue": by_kthvalue,
}


def make_scores(kind: str, size: int, seed: int = 0) -> Tensor:
    """Magnitudes to search: of normal values, of their positive part, or all one."""
    if kind == "equal":
        return torch.ones(size)
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values.relu() if kind == "relu" else values.abs()


def _side(search: Callable[[Tensor, Density], Tensor], scores: Tensor, density: Density) -> Any:
    calls = max(1, _LEAST_ELEMENTS // scores.numel())

    def side() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(calls):
            search(scores, density)
        return {"seconds": (time.perf_counter() - start) / calls}

    return side


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every search at every size."""
    sizes = args.sizes or (_QUICK_SIZES if args.quick else _SIZES)
    repeats = args.repeats or (2 if args.quick else 9)
    density = Density.from_sparsity(args.sparsity)
    results = []
    with common.progress(len(sizes) * len(SEARCHES) * (repeats + 1), "topk_cost") as bar:
        for size in sizes:
            scores = make_scores(args.data, size)
            found = {name: search(scores, density).item() for name, search in SEARCHES.items()}
            if len(set(found.values())) != 1:
                raise SystemExit(f"the searches disagree at n = {size}: {found}")
            sides = {name: _side(search, scores, density) for name, search in SEARCHES.items()}
            rounds = common.alternate(sides, repeats, tick=bar.update)
            ratios = {
                name: common.ratio(rounds, "kth_magnitude", name)
                for name in SEARCHES
                if name != "kth_magnitude"
            }
            results.append({"n": size, "sides": common.summary(rounds), "ratios": ratios})
    return {
        "sparsity": args.sparsity,
        "data": args.data,
        "sizes": results,
        "growth_exponents": {name: _growth(results, name) for name in SEARCHES},
    }


def _growth(results: list[dict[str, Any]], side: str) -> dict[str, float | None]:
    """Exponents over all sizes, and over those where fixed costs no longer show."""
    exponents: dict[str, float | None] = {}
    for value in ("median", "minimum"):
        points = [(r["n"], r["sides"][side]["seconds"][value]) for r in results]
        large = [(n, t) for n, t in points if n >= _ASYMPTOTIC]
        for name, chosen in (("all_sizes", points), ("from_1e6", large)):
            sizes, seconds = [n for n, _ in chosen], [t for _, t in chosen]
            exponent = common.growth_exponent(sizes, seconds) if len(chosen) > 1 else None
            exponents[f"{name}_{value}"] = exponent
    return exponents


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a size, and the growth exponents."""
    headers = ["n", *(f"{name}, ms" for name in SEARCHES), "ns/element", "over topk"]
    headers.append("over kthvalue")
    rows: list[common.Row] = []
    for result in measured["sizes"]:
        times = [result["sides"][name]["seconds"]["median"] * 1e3 for name in SEARCHES]
        ratios = [common.with_spread(r) for r in result["ratios"].values()]
        rows.append([result["n"], *times, times[0] * 1e6 / result["n"], *ratios])
    for key in measured["growth_exponents"]["kth_magnitude"]:
        exponents = [measured["growth_exponents"][name][key] for name in SEARCHES]
        rows.append([f"growth exponent, {key}", *exponents, None, None, None])
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", type=common.positive, metavar="N")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--data", choices=("normal", "relu", "equal"), default="normal")


BENCHMARK = common.Benchmark(
    "topk_cost",
    "k-th largest magnitude of n float32: the reference search beside torch.topk and kthvalue",
    _add_arguments,
    measure,
    table,
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
