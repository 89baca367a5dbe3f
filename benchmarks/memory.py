"""Bytes kept for backward and peak memory of a training step, beside what dense PyTorch offers.

    python -m benchmarks.memory [--model NAME[:BATCH[:SIDE]]] [--sides NAME ...] [--quick] [--json]

Every side runs in processes of its own, the sides in turn: dense eager, torch.compile with and
without `activation_memory_budget`, and SWAT with exact saves, with batch norm's input in bytes and
with packed values in bfloat16. Bytes kept are the distinct storages that saved-tensor hooks see
between forward and backward, parameters excluded (and beside it included); what a function of
torch.compile keeps goes through the same hooks. Peak resident memory is that of the steps after
the first ones (which allocate the optimizer's state and, under torch.compile, the compiler's own),
less what was resident once the model was built.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import common, options
from benchmarks.sides import DENSE, Network, StepSide, Trainer, parse_network
from swatfx.timing.steps import failure

_POLICY = "swat-u:0.9,period=1000"
_WARMUP = 2
BASE = "dense channels_last"


def sides(policy: str) -> dict[str, StepSide]:
    """What is weighed, by name; the rivals are torch.compile's."""
    form = "channels_last"
    return {
        **DENSE,
        **{f"dense compiled, budget {b}": StepSide("compiled", budget=b) for b in (0.5, 0.3, 0.1)},
        "exact": StepSide(form, policy),
        "int8 norms": StepSide(form, policy, {"norm_saves": "int8"}),
        "bf16 values": StepSide(form, policy, {"value_dtype": "bf16"}),
        "int8 norms, bf16 values": StepSide(
            form, policy, {"norm_saves": "int8", "value_dtype": "bf16"}
        ),
    }


_SWAT = ("exact", "int8 norms", "bf16 values", "int8 norms, bf16 values")
# Bytes kept over dense eager that are aimed at, at most.
TARGETS = {"exact": 0.60, "int8 norms": 0.22}


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not say."""
    return _status("VmRSS") or 0


def peak_resident_bytes() -> int:
    """Peak resident memory of this process since it started or since `reset_peak`."""
    # ru_maxrss would include what the parent had when it started this process.
    if (peak := _status("VmHWM")) is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int | None:
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    match = re.search(rf"{key}:\s*(\d+) kB", status.read_text())
    return int(match[1]) * 1024 if match else None


def reset_peak() -> bool:
    """Forget the peak so far, such as that of torch.compile's compiler; False if impossible."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Hand back to the system what the allocator holds and nobody uses."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another allocator than glibc's: the figure then includes what it holds


def weigh(network: Network, side: StepSide, steps: int) -> dict[str, Any]:
    """Memory and time of one side, in this process."""
    if reason := side.missing():
        return {"unavailable": reason}
    trainer = Trainer(network, side)
    trim()
    built = resident_bytes()
    if side.form == "compiled" and (reason := failure(trainer.step)):
        return {"unavailable": reason}
    for _ in range(_WARMUP):
        trainer.step()
    saved = trainer.saved_bytes()
    trim()
    idle = resident_bytes()
    reset = reset_peak()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - start)
    peak = peak_resident_bytes()
    return {
        **saved,
        "seconds": statistics.median(seconds),
        "peak_resident_bytes": peak,
        "peak_over_built_bytes": peak - built,
        "peak_over_idle_bytes": peak - idle,
        "peak_covers_first_step": not reset,
    }


def _in_process(network: Network, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """`weigh` in a process of its own, under this process's allocator."""
    words = [sys.executable, "-m", "benchmarks.memory", "--model", str(network), "--worker"]
    words += ["--weigh", name, "--policy", args.policy, "--steps", str(args.steps)]
    if args.threads:
        words += ["--threads", str(args.threads)]
    done = subprocess.run(words, cwd=common.ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"weighing {name!r} failed, see above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sides, in turn, round by round."""
    network = args.model or (Network("digits/cnn", 4) if args.quick else Network("resnet50", 16))
    if args.weigh:
        return weigh(network, sides(args.policy)[args.weigh], args.steps)
    names = args.sides or [n for n in sides(args.policy) if not (args.quick and "compiled" in n)]
    count = args.repeats or (1 if args.quick else 3)
    rounds: common.Rounds = {}
    unavailable: dict[str, str] = {}
    with common.progress(count * len(names), "memory") as bar:
        for index in range(count):
            for name in names if index % 2 == 0 else names[::-1]:
                weight = {} if name in unavailable else _in_process(network, name, args)
                bar.update()
                if "unavailable" in weight:
                    unavailable[name] = weight["unavailable"]
                for quantity, value in weight.items():
                    if name not in unavailable:
                        rounds.setdefault(name, {}).setdefault(quantity, []).append(float(value))
    return _result(network, args.policy, rounds) | {"unavailable": unavailable}


def _result(network: Network, policy: str, rounds: common.Rounds) -> dict[str, Any]:
    result: dict[str, Any] = {
        "network": network.name,
        "input_shape": list(network.shape),
        "policy": policy,
        "sides": common.summary(rounds),
    }
    dense = [name for name in rounds if name in DENSE]
    if BASE in rounds:
        keys = ["saved_bytes", "saved_bytes_with_parameters"]
        keys += ["peak_over_built_bytes", "peak_over_idle_bytes"]
        result["over_dense_eager"] = {
            name: {key: _over(rounds, name, BASE, key) for key in keys} for name in rounds
        }
        result["targets"] = {
            name: {"at_most": most, "measured": ratio, "met": ratio <= most}
            for name, most in TARGETS.items()
            if name in rounds and (ratio := _over(rounds, name, BASE, "saved_bytes"))
        }
    if dense:
        result["fastest_dense"] = common.fastest(rounds, dense)
        result["seconds_over_fastest_dense"] = {
            name: common.ratio(rounds, name, result["fastest_dense"]) for name in rounds
        }
    return result


def _over(rounds: common.Rounds, name: str, base: str, key: str) -> float:
    return statistics.median(rounds[name][key]) / statistics.median(rounds[base][key])


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a side."""
    headers = ["side", "kept, MB", "over dense eager", "with parameters, MB", "peak, MB"]
    headers += ["peak over dense eager", "over idle, MB", "step, ms", "step over fastest dense"]
    rows: list[common.Row] = []
    for name, quantities in measured["sides"].items():
        over = measured.get("over_dense_eager", {}).get(name, {})
        slower = measured.get("seconds_over_fastest_dense", {}).get(name)
        rows.append(
            [
                name,
                _megabytes(quantities, "saved_bytes"),
                over.get("saved_bytes"),
                _megabytes(quantities, "saved_bytes_with_parameters"),
                _megabytes(quantities, "peak_over_built_bytes"),
                over.get("peak_over_built_bytes"),
                _megabytes(quantities, "peak_over_idle_bytes"),
                quantities["seconds"]["median"] * 1e3,
                None if slower is None else common.with_spread(slower),
            ]
        )
    for name, reason in measured["unavailable"].items():
        rows.append([name, reason, *[None] * 7])
    return headers, rows


def _megabytes(quantities: Mapping[str, Mapping[str, float]], key: str) -> str:
    return f"{quantities[key]['median'] / 1e6:.1f}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    names = list(sides(_POLICY))
    parser.add_argument("--model", type=parse_network, metavar="NAME[:BATCH[:SIDE]]")
    parser.add_argument(
        "--policy", type=options.policy, default=_POLICY, help=f"of SWAT (default: {_POLICY})"
    )
    parser.add_argument("--sides", nargs="+", choices=names, help="to weigh (default: all)")
    parser.add_argument(
        "--steps", type=options.positive, default=5, help="that are timed in each process"
    )
    parser.add_argument("--weigh", choices=names, help=argparse.SUPPRESS)


BENCHMARK = common.Benchmark(
    "memory",
    "bytes kept for backward and peak memory: SWAT, dense eager, torch.compile with budgets",
    _add_arguments,
    measure,
    table,
    (
        "MB are 10^6 bytes. Kept: distinct storages, parameters excluded; peak: of a step, over",
        "what was resident when the model was built, which under torch.compile leaves the compiler",
        "in; over idle: over what is resident between steps. `--repeats` counts processes a side.",
    ),
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
