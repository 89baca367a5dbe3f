"""Exported models: bytes on disk, and the time of one inference, beside dense ones.

    python -m benchmarks.export_sizes [--models NAME ...] [--sparsity S] [--quick] [--json]

Each form is written by `swatfx.export` and read back by who runs it: `torch`, by
`swatfx.load_program` (eager ops of PyTorch, or ours); `onnxruntime`, and `openvino` if that is
installed, by their own loaders. All run on the same number of threads, in turns. "shrunk" is
another network, of a policy that leaves out whole filters at that sparsity, "2:4" is half sparse.
Beside them, without a file: `swatfx.freeze`, and the strongest dense form of torch, `torch.compile`
of bf16 in channels_last with weights frozen (`torch._inductor.config.freezing`).
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

import swatfx
from benchmarks import common, options
from swatfx import models
from swatfx.timing.steps import failure

BATCHES = (1, 16)
DENSE = "dense fp32, torch"
Run = Callable[[Tensor], Any]


def _forms(sparsity: float) -> dict[str, tuple[str, dict[str, Any]]]:
    """Form -> (policy, options of `swatfx.export`)."""
    ours = f"swat-u:{sparsity:g}"
    return {
        "dense fp32": ("dense", {}),
        "dense bf16": ("dense", {}),
        "zeros stored": (ours, {}),
        "packed": (ours, {"packed": True}),
        "packed bf16": (ours, {"packed": True, "values": "bf16"}),
        "packed int8": (ours, {"packed": True, "values": "int8"}),
        "shrunk": (f"{ours},weight_selector=filter", {"shrink": True}),
        "2:4 packed": ("swat-u:0.5,weight_selector=2:4", {"packed": True}),
        "our kernels, packed": (ours, {"packed": True, "kernels": True}),
    }


FROZEN = "frozen"
COMPILED = "dense bf16, torch.compile"
_ONNX = ("dense fp32", "zeros stored", "packed", "packed int8", "shrunk")


def _torch(path: pathlib.Path, dtype: torch.dtype) -> Run:
    module = swatfx.load_program(path)
    return lambda x: module(x.to(dtype))


def _onnxruntime(path: pathlib.Path, dtype: torch.dtype) -> Run:
    import onnxruntime

    told = onnxruntime.SessionOptions()
    told.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), told)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def _openvino(path: pathlib.Path, dtype: torch.dtype) -> Run:
    import onnx
    import onnx.inliner
    import openvino

    # It reads no functions of a file.
    plain = onnx.inliner.inline_local_functions(onnx.load(path))
    path = path.with_name(f"inlined-{path.name}")
    onnx.save(plain, path)
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(str(path), "CPU", threads)
    return lambda x: model(x.numpy())


_RUNTIMES: dict[str, tuple[str, Callable[[pathlib.Path, torch.dtype], Run]]] = {
    "torch": (".pt2", _torch),
    "onnxruntime": (".onnx", _onnxruntime),
    "openvino": (".onnx", _openvino),
}


def _written(
    model: nn.Module, form: str, told: tuple[str, dict[str, Any]], path: pathlib.Path, x: Tensor
) -> None:
    policy, rest = told
    gm = swatfx.compile(model, policy, kernels="sparse")
    if form == "dense bf16":
        gm, x = gm.bfloat16(), x.bfloat16()
    swatfx.export(gm, path, (x,), **rest)


def _without_files(name: str, sparsity: float, compiled: bool) -> dict[str, Run]:
    """What runs as it is, in this process."""
    torch.manual_seed(0)
    model = models.create(name)
    gm = swatfx.compile(model, f"swat-u:{sparsity:g}", kernels="sparse")
    runs: dict[str, Run] = {FROZEN: swatfx.freeze(gm)}
    half = swatfx.freeze(gm.bfloat16())
    runs[f"{FROZEN} bf16"] = lambda x: half(x.bfloat16())
    if compiled:
        last = torch.channels_last
        plain = models.create(name).eval().bfloat16().to(memory_format=last)
        dense = torch.compile(plain)

        def run(x: Tensor) -> Any:
            with torch._inductor.config.patch(freezing=True):
                return dense(x.to(torch.bfloat16, memory_format=last))

        x = torch.randn(2, *models.default_input_shape(name))
        with torch.no_grad():
            if failure(lambda: run(x)) is None:
                runs[COMPILED] = run
    return runs


def _side(run: Run, x: Tensor) -> common.Side:
    def side() -> dict[str, float]:
        start = time.perf_counter()
        with torch.no_grad():
            run(x)
        return {"seconds": time.perf_counter() - start}

    return side


def measure_network(
    name: str, sparsity: float, repeats: int, runtimes: list[str], *, compiled: bool
) -> dict[str, Any]:
    """All forms of one network."""
    shape = models.default_input_shape(name)
    sizes: dict[str, int] = {}
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, told in _forms(sparsity).items():
            dtype = torch.bfloat16 if form == "dense bf16" else torch.float32
            files: dict[str, pathlib.Path] = {}
            for runtime in runtimes:
                suffix, load = _RUNTIMES[runtime]
                if suffix == ".onnx" and form not in _ONNX:
                    continue
                if suffix not in files:
                    torch.manual_seed(0)
                    model = models.create(name)
                    files[suffix] = pathlib.Path(folder) / f"{len(runs)}{suffix}"
                    _written(model, form, told, files[suffix], torch.randn(2, *shape))
                side = f"{form}, {runtime}"
                sizes[side] = files[suffix].stat().st_size
                runs[side] = load(files[suffix], dtype)
    runs |= _without_files(name, sparsity, compiled)
    batches = {}
    for batch in BATCHES:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        sides = {side: _side(run, x) for side, run in runs.items()}
        rounds = common.alternate(sides, repeats, warmup=1)
        batches[str(batch)] = {
            "sides": common.summary(rounds),
            "dense_over": {s: common.ratio(rounds, DENSE, s) for s in sides},
        }
    return {"network": name, "input_shape": list(shape), "bytes": sizes, "batches": batches}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All networks."""
    names = args.models or (["digits/cnn"] if args.quick else ["resnet50"])
    repeats = args.repeats or (2 if args.quick else 9)
    there = [one for one in _RUNTIMES if importlib.util.find_spec(one)]
    runtimes = [one for one in args.runtimes or there if one in there]
    if "torch" not in runtimes:
        runtimes = ["torch", *runtimes]  # what the others are compared with
    told = (args.sparsity, repeats, runtimes)
    found = [measure_network(name, *told, compiled=not args.quick) for name in names]
    return {"sparsity": args.sparsity, "networks": found}


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a form and runtime."""
    headers = ["network", "form, runtime", "MB", "of dense"]
    headers += [f"batch {b}: {what}" for b in BATCHES for what in ("ms", "times as fast as dense")]
    rows: list[common.Row] = []
    for result in measured["networks"]:
        sizes = result["bytes"]
        for side in result["batches"][str(BATCHES[0])]["sides"]:
            size = sizes.get(side)
            row: common.Row = [result["network"], side, None, None]
            if size is not None:
                row[2:] = size / 1e6, size / sizes[DENSE]
            for batch in result["batches"].values():
                seconds = batch["sides"][side]["seconds"]["median"]
                row += [seconds * 1e3, common.with_spread(batch["dense_over"][side])]
            rows.append(row)
    return headers, rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", type=options.given, nargs="+", metavar="NAME", help="default: resnet50"
    )
    parser.add_argument("--sparsity", type=options.sparsity, default=0.9, help="of the weights")
    parser.add_argument(
        "--runtimes", nargs="+", choices=tuple(_RUNTIMES), help="default: those installed"
    )


BENCHMARK = common.Benchmark(
    "export_sizes",
    "exported models: bytes on disk, and latency at batch 1 and 16, over dense fp32 in torch",
    _add_arguments,
    measure,
    table,
    notes=(
        "weights are as they are initialised: neither bytes nor times depend on their values",
        "times as fast: dense fp32 in torch over the row, round by round; above 1 is faster",
    ),
    allocator="tuned",
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
