"""Bytes that a training step keeps for backward, as planned for shapes: nothing is computed.

    python -m benchmarks.planned_memory [--model NAME[:BATCH[:SIDE]] ...] [--policy ...] [--json]

Of each network with exact saves and with codes, packed values in bfloat16, over the dense network
of the same dtype; in float32, and with the whole network in bfloat16. Bytes are distinct storages,
parameters excluded; that those predicted are those measured is `tests/costs`' business, and
`python -m benchmarks.memory` weighs a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

import swatfx
from benchmarks import common, options
from benchmarks.sides import Network, parse_network
from swatfx import models
from swatfx.options import NORM_SAVES

_POLICY = "swat-u:0.9,period=1000"
_NETWORKS = (
    "resnet50",
    "convnext_tiny",
    "vit_b_16",
    "efficientnet_b0",
    "mobilenet_v3_large",
    "swin_t",
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def planned(network: Network, policy: str, saves: str, dtype: str) -> dict[str, float]:
    """Bytes that one network keeps, dense and sparse."""
    with torch.device("meta"):
        model = models.create(network.name).to(_DTYPES[dtype])
    gm = swatfx.compile(model, policy, norm_saves=saves, value_dtype="bf16")
    x = torch.empty(network.shape, dtype=_DTYPES[dtype], device="meta")
    totals = swatfx.report(gm, x).totals
    kept, dense = totals["saved_bytes"], totals["dense_saved_bytes"]
    return {"saved_bytes": kept, "dense_saved_bytes": dense, "over_dense": kept / dense}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All networks, dtypes and options."""
    networks = args.model or [Network(name, 16) for name in _NETWORKS]
    if args.quick:
        networks = args.model or [Network("digits/cnn", 4)]
    found: dict[str, Any] = {}
    with common.progress(len(networks), "planned memory") as bar:
        for network in networks:
            found[str(network)] = {
                dtype: {s: planned(network, args.policy, s, dtype) for s in NORM_SAVES}
                for dtype in _DTYPES
            }
            bar.update()
    return {"policy": args.policy, "networks": found}


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a network and dtype."""
    headers = ["network", "dtype", "dense, MB", *(f"{saves}, over dense" for saves in NORM_SAVES)]
    rows: list[common.Row] = []
    for name, dtypes in measured["networks"].items():
        for dtype, sides in dtypes.items():
            dense = sides["exact"]["dense_saved_bytes"] / 1e6
            ratios = [f"{sides[saves]['over_dense']:.3f}" for saves in NORM_SAVES]
            rows.append([name, dtype, f"{dense:.1f}", *ratios])
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=parse_network, nargs="+", metavar="NAME[:BATCH[:SIDE]]")
    parser.add_argument(
        "--policy", type=options.policy, default=_POLICY, help=f"of SWAT (default: {_POLICY})"
    )


BENCHMARK = common.Benchmark(
    "planned_memory",
    "bytes kept for backward as planned for shapes, with exact saves and with codes",
    _add_arguments,
    measure,
    table,
    ("MB are 10^6 bytes: distinct storages, parameters excluded; packed values are bfloat16.",),
    allocator="current",
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
