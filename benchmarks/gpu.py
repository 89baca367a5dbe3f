"""What a GPU makes of every policy: the same numbers as a CPU, at what time and memory a step.

    python -m benchmarks.gpu [--model NAME[:BATCH[:SIDE]]] [--device cuda] [--quick] [--json]

Two parts. *Agreement*: some steps of every policy in float64, on the device and on the CPU, from
the same weights and batches; in float64 no ReLU and no Top-K stands on a rounding's edge, so that
what differs is wrong. *Steps*: a training step of the dense model in its forms and of SWAT, sides
taking turns, with the device's own peak of allocated memory. `--device cpu` tries the runner out.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from benchmarks import common, options
from benchmarks.sides import Network, as_form, parse_network
from swatfx import models
from swatfx.errors import SwatError
from swatfx.timing.steps import autocast, failure

STEPS = 3
WARMUP = 2
LARGEST_DIFFERENCE = 1e-8  # of a gradient in float64, over its norm
_SCHEDULE = {"steps_per_epoch": 2, "total_steps": 10}
_SELECTORS = ("chw", "hw", "random", "channel", "channel-per-filter", "filter", "input-channel")
POLICIES = (
    *("dense", "swat-u:0.9", "swat-u:0.9,period=2", "swat-erk:0.9", "swat-er:0.9", "swat-m:0.9"),
    *("saw:0.9", "forward-weights:0.5", "forward-activations:0.5", "swat-active-update:0.9"),
    *("swat-frozen:0.9,hold_from_epoch=1", "meprop:0.5", "static:0.9", "set:0.9,update_every=2"),
    *(f"{name}:0.9,update_every=2" for name in ("rigl", "snfs", "dsr", "gradual-magnitude")),
    *("dst:1e-4", "soft-filter:0.3,update_every=2", "ssc,g=4,p=8"),
    *(f"swat-u:0.75,weight_selector={name}" for name in _SELECTORS),
    *(f"swat-u:0.9,activation_selector={name}" for name in _SELECTORS[:3]),
    "swat-u:0.5,weight_selector=2:4",
)


@dataclass(frozen=True)
class Side:
    """One way to make a step: memory format or torch.compile, autocast's dtype, policy."""

    form: str = "channels_last"
    dtype: torch.dtype | None = None
    policy: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def step_sides(policy: str) -> dict[str, Side]:
    """What takes turns, by name."""
    half = torch.bfloat16
    sides = {
        "dense fp32": Side(),
        "dense bf16": Side(dtype=half),
        "dense bf16 compiled": Side("compiled", half),
    }
    for period in (1, 1000):
        text = f"{policy},period={period}"
        sides[f"{text} fp32"] = Side(policy=text)
        sides[f"{text} bf16"] = Side(dtype=half, policy=text)
        sides[f"{text} bf16, int8 norms"] = Side(
            "channels_last", half, text, {"norm_saves": "int8"}
        )
    return sides


def train(network: Network, policy: str, device: torch.device) -> dict[str, Any]:
    """Float64 steps on `device`: losses, first gradients, output in evaluation, on the host."""
    torch.manual_seed(0)
    gm = swatfx.compile(models.create(network.name).double().to(device), policy)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
    swatfx.attach(gm, optimizer, **_SCHEDULE)
    generator = torch.Generator().manual_seed(1)
    gradients: dict[str, Tensor] = {}
    losses = []
    for index in range(STEPS):
        x = torch.randn(network.shape, generator=generator, dtype=torch.float64).to(device)
        y = torch.randint(network.classes, (network.batch,), generator=generator).to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(gm(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.item()))
        if index == 0:
            found = ((name, p.grad) for name, p in gm.named_parameters())
            gradients = {name: g.detach().cpu().clone() for name, g in found if g is not None}
        optimizer.step()
    with torch.no_grad():
        output = gm.eval()(x).cpu()
    return {"losses": losses, "gradients": gradients, "output": output}


def compare(network: Network, policy: str, device: torch.device) -> dict[str, Any]:
    """How far the device's numbers are from the CPU's, relative; seconds on each."""
    seconds, results = [], []
    for place in (torch.device("cpu"), device):
        start = time.perf_counter()
        try:
            results.append(train(network, policy, place))
        except (SwatError, RuntimeError) as error:
            return {"error": f"on {place}: {type(error).__name__}: {str(error).splitlines()[0]}"}
        seconds.append(time.perf_counter() - start)
    ours, theirs = results[1], results[0]
    pairs = [(ours["gradients"][name], g) for name, g in theirs["gradients"].items()]
    gradient = max(_off(a, b) for a, b in pairs)
    output = _off(ours["output"], theirs["output"])
    return {
        "gradient": gradient,
        "output": output,
        "loss": max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)),
        "seconds_cpu": seconds[0],
        "seconds": seconds[1],
        "agrees": max(gradient, output) <= LARGEST_DIFFERENCE,
    }


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


class Stepper:
    """One side: its model, batch and optimizer."""

    def __init__(self, network: Network, side: Side, device: torch.device) -> None:
        torch.manual_seed(0)
        self.side, self.device = side, device
        model: nn.Module = models.create(network.name).to(device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if side.policy is not None:
            model = swatfx.compile(model, side.policy, **side.options)
        self.call = torch.compile(model) if side.form == "compiled" else model
        self.x = as_form(torch.randn(network.shape), side.form).to(device)
        self.y = torch.randint(network.classes, (network.batch,)).to(device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(self) -> dict[str, float]:
        """One step; seconds, and bytes over what was allocated before it: after forward, and peak.

        On a CPU no bytes are known.
        """
        on_gpu = self.device.type == "cuda"
        self.optimizer.zero_grad(set_to_none=True)
        before = kept = peak = 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        with autocast(self.side.dtype, self.device.type):
            loss = F.cross_entropy(self.call(self.x), self.y)
        if on_gpu:
            kept = torch.cuda.memory_allocated() - before
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        seconds = time.perf_counter() - start
        return {"seconds": seconds} | ({"kept_bytes": kept, "peak_bytes": peak} if on_gpu else {})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both parts."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --device cpu tries the runner out")
    small = parse_network("digits/cnn:16" if args.quick else "cifar/resnet20:8")
    large = args.model or parse_network("digits/cnn:16" if args.quick else "resnet50:64")
    policies: Sequence[str] = args.policies or (POLICIES[:3] if args.quick else POLICIES)
    steps = step_sides("swat-u:0.9")
    if args.quick:
        steps = {name: side for name, side in steps.items() if side.form != "compiled"}
    result: dict[str, Any] = {"network": str(small), "step_network": str(large)}
    with common.progress(len(policies), "agreement") as bar:
        result["policies"] = {}
        for policy in policies:
            result["policies"][policy] = compare(small, policy, device)
            bar.update()
    sides, unavailable = {}, {}
    for name, side in steps.items():
        stepper = Stepper(large, side, device)
        if reason := failure(stepper.step):
            unavailable[name] = reason
        else:
            sides[name] = stepper.step
        gc.collect()
    repeats = args.repeats or (1 if args.quick else 10)
    rounds = common.alternate(sides, repeats, warmup=WARMUP)
    dense = common.fastest(rounds, [name for name in sides if name.startswith("dense")])
    return result | {
        "sides": common.summary(rounds),
        "unavailable": unavailable,
        "fastest_dense": dense,
        "seconds_over_fastest_dense": {name: common.ratio(rounds, name, dense) for name in rounds},
    }


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """A row a policy, then a row a side."""
    headers = ["what", "gradient off by", "output off by", "agrees", "step, ms", "kept, MB"]
    headers += ["peak, MB", f"over {measured['fastest_dense']}"]
    rows: list[common.Row] = []
    for name, found in measured["policies"].items():
        if "error" in found:
            rows.append([name, found["error"], *[None] * 6])
        else:
            agrees = "yes" if found["agrees"] else "no"
            rows.append([name, found["gradient"], found["output"], agrees, *[None] * 4])
    for name, side in measured["sides"].items():
        bytes_ = [
            side[k]["median"] / 1e6 if k in side else None for k in ("kept_bytes", "peak_bytes")
        ]
        over = common.with_spread(measured["seconds_over_fastest_dense"][name])
        rows.append([name, None, None, None, side["seconds"]["median"] * 1e3, *bytes_, over])
    rows += [[name, reason, *[None] * 6] for name, reason in measured["unavailable"].items()]
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    default = "cuda"
    parser.add_argument("--model", type=parse_network, metavar="NAME[:BATCH[:SIDE]]")
    parser.add_argument(
        "--device",
        type=options.device,
        default=torch.device(default),  # of text argparse would ask its type
        help=f"(default: {default})",
    )
    parser.add_argument(
        "--policies", nargs="+", type=options.policy, help="to compare (default: one of every kind)"
    )


BENCHMARK = common.Benchmark(
    "gpu",
    "every policy on a GPU against the CPU in float64, and a step's time and memory",
    _add_arguments,
    measure,
    table,
    (
        "MB are 10^6 bytes over what was allocated before the step; kept: after forward.",
        "Differences are relative to a norm: the worst gradient of the first step, and the output",
        f"in evaluation after {STEPS} steps, in float64.",
    ),
    allocator="current",
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
