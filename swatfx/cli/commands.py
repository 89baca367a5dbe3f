"""The command line: `swatfx report | bench | train | compare | export | simulate | ...`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from swatfx import models
from swatfx.cli import bench as cli_bench
from swatfx.cli import compare as cli_compare
from swatfx.cli import demo
from swatfx.cli import policies as cli_policies
from swatfx.cli import simulate as cli_simulate
from swatfx.cli import train as cli_train
from swatfx.cli.arguments import (
    LARGEST,
    MOST_CLASSES,
    add_compile_options,
    compile_options,
    file,
    given,
    number,
    refuse_given,
    whole,
)
from swatfx.cli.output import add_formats, check_output, show
from swatfx.cli.subject import DEFAULT_POLICY, allocated, compiled, read_policy
from swatfx.compiled import evaluation_mode
from swatfx.costs import report
from swatfx.errors import InputError, SwatError
from swatfx.exporting import VALUES, export
from swatfx.pipeline import compile as compile_model
from swatfx.tables import Page, Table
from swatfx.version import __version__

_EPILOG = """examples:
  swatfx report resnet50 --policy swat-u:0.8
  swatfx report cifar/vgg16 --policy swat-erk --sparsity 0.95 --json
  swatfx report mypackage.nets:build --input-shape 3,64,64 --policy swat-u:0.9,period=100
  swatfx bench cifar/resnet18 --policy swat-u:0.9 --batch-size 128
  swatfx train --model cifar/resnet18 --data cifar10 --data-root DIR --policy swat-u:0.9 --epochs 30
  swatfx compare resnet50 --policies swat-u:0.8,swat-erk:0.8,rigl:0.8,dense
  swatfx export resnet50 --policy swat-u:0.8 --output resnet50.pt2

A model is a torchvision name, a cifar/ name (swatfx models lists them), or package.module:callable.
A policy is name:sparsity[,field=value...] (swatfx policies lists names and fields)."""


_MOST_ELEMENTS = 2**40  # of an input: costs still fit what counts them


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as our own errors do, with the nearest names."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message)
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        near: list[str] = []
        asked: argparse.ArgumentParser = self
        if choice:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif unknown:
            asked = self._command()
            name = unknown[1].partition("=")[0]
            near = difflib.get_close_matches(name, asked._option_string_actions)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; see {asked.prog} --help"
        self.exit(2, f"{asked.prog}: {message}{hint}\n")

    def _command(self) -> argparse.ArgumentParser:
        """The parser of the command that was given."""
        known = (a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction))
        found = (choices[word] for choices in known for word in self._given if word in choices)
        return next(found, self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 after an error told on stderr, 130 if broken off.

    Bad usage leaves by SystemExit(2), as argparse does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name, or a sign, that a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    # What torch logs of a shape that does not fit, our error says in one line.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    parser = _parser()
    args = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        with _ended_cleanly():
            code = run(args)
            sys.stdout.flush()
        return code
    except SwatError as error:
        return _fail(args.command, str(error))
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted", 130)
    except BrokenPipeError:
        _give_up_stdout()  # the reader of a pipe left: nothing to say, and nobody to say it to
        return 141
    except OSError as error:
        _give_up_stdout()
        where = f": {error.filename}" if error.filename else ""
        return _fail(args.command, f"{error.strerror or error}{where}")
    except Exception as error:
        if os.environ.get("SWATFX_TRACEBACK"):
            raise
        what = f"{type(error).__name__}: {error}"
        return _fail(args.command, f"{what}. Unexpected: SWATFX_TRACEBACK=1 shows where")


def _fail(command: str, text: str, code: int = 1) -> int:
    print(f"swatfx {command}: {' '.join(text.split())}", file=sys.stderr)
    return code


def _give_up_stdout() -> None:
    """Let the interpreter find nothing left to write to what cannot be written to."""
    if sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Let a termination signal end the command as an interrupt does: no half file is left."""

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="swatfx",
        description="Sparse weight activation training (SWAT) as a torch.fx compiler.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"swatfx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    command = add(
        "report", _report, "count MACs and saved bytes of a training step, layer by layer"
    )
    _add_model(command)
    command.add_argument("--accounting", choices=("paper", "torch", "exact"), default="paper")
    command.add_argument(
        "--activation-floor",
        type=number(below=1),
        default=0.0,
        metavar="F",
        help="natural activation sparsity",
    )
    command.add_argument(
        "--topk-cost",
        type=given,
        metavar="D,K",
        help="ms of your dense step and of a Top-K refresh: what Top-K leaves of the speedup;"
        " 'paper' takes its table 4",
    )
    command.add_argument(
        "--device", type=given, default="cpu", help="whose kernels to tell (default: cpu)"
    )
    add_compile_options(command)
    add_formats(command)

    command = add("bench", _bench, "time your training step on this machine, dense and sparse")
    _add_model(command, optional=True)
    cli_bench.add_arguments(command)

    command = add("train", cli_train.main, "train a model; resumes bit for bit after a kill")
    cli_train.add_arguments(command)

    command = add("compare", _compare, "count what policies cost, and train them, side by side")
    _add_model(command, with_policy=False)
    cli_compare.add_arguments(command)

    command = add("export", _export, "write a model as .pt2, .onnx or .safetensors")
    _add_model(command)
    command.add_argument(
        "--checkpoint", type=file, metavar="FILE", help="weights that swatfx train wrote"
    )
    command.add_argument("--training", action="store_true", help="the training graph (.pt2)")
    command.add_argument("--kernels", action="store_true", help="leave our kernels in it (.pt2)")
    command.add_argument("--shrink", action="store_true", help="without empty filters and channels")
    command.add_argument("--packed", action="store_true", help="sparse weights as bits and values")
    command.add_argument("--values", choices=VALUES, default="exact", help="how weights are stored")
    command.add_argument(
        "--output", required=True, type=file, metavar="FILE", help="its suffix is the format"
    )
    command.add_argument("--json", action="store_true", help="print what was written as JSON")

    command = add("simulate", _simulate, "count a training step's cycles on simulated accelerators")
    _add_model(command, default="resnet50", with_batch=False)
    cli_simulate.add_arguments(command)

    command = add("policies", cli_policies.run, "list policies, or what the fields of one mean")
    cli_policies.add_arguments(command)
    command = add("models", _models, "list model names")
    add_formats(command)

    command = add(
        "demo", _demo, "the paper's ResNet-50 figures, an export, and a small training run"
    )
    command.add_argument(
        "--output-dir", type=file, default="demo", metavar="DIR", help="default: demo"
    )
    command.add_argument("--epochs", type=whole(), default=15, help="of each digits run")
    return parser


def _add_model(
    command: argparse.ArgumentParser,
    default: str | None = None,
    *,
    with_policy: bool = True,
    with_batch: bool = True,
    optional: bool = False,
) -> None:
    text = "e.g. resnet50, cifar/vgg16, package.module:callable"
    if default is None:
        command.add_argument("model", type=given, help=text, nargs="?" if optional else None)
    else:
        help_text = f"{text} ({default})"
        command.add_argument("model", nargs="?", type=given, default=default, help=help_text)
    command.add_argument(
        "--num-classes", type=whole(1, MOST_CLASSES), metavar="N", help="instead of the model's own"
    )
    if with_policy:
        text = f"e.g. swat-u:0.9,period=1000 ({DEFAULT_POLICY})"
        command.add_argument("--policy", type=given, help=text)
        command.add_argument(
            "--sparsity", type=number(below=1), help="instead of the one in --policy"
        )
    if with_batch:
        command.add_argument("--batch-size", type=whole(), metavar="N", help="default: 32")
    else:
        command.set_defaults(batch_size=1)
    command.add_argument(
        "--input-shape",
        type=given,
        metavar="C,H,W",
        help="of one sample; needed for your own models",
    )


def read_shape(args: argparse.Namespace) -> tuple[int, ...]:
    """The input shape with its batch.

    Raises:
        InputError: not a list of positive numbers, or missing for a model of the user's own.
    """
    batch = 32 if args.batch_size is None else args.batch_size
    if args.input_shape is None:
        if ":" in args.model:
            raise InputError(
                "your own model wants an input shape",
                remedy="add --input-shape 3,224,224: of one sample, without the batch",
            )
        return (batch, *models.default_input_shape(args.model))
    shape: tuple[int, ...] = ()
    if re.fullmatch(r"[0-9]{1,10}([,x][0-9]{1,10})*", args.input_shape):
        shape = tuple(int(extent) for extent in re.split("[,x]", args.input_shape))
    if not shape or min(shape) < 1 or max(shape) > LARGEST:
        raise InputError(
            "--input-shape is a list of positive numbers",
            value=args.input_shape,
            remedy="write it as 3,224,224",
        )
    if batch * math.prod(shape) > _MOST_ELEMENTS:
        raise InputError(
            "--batch-size and --input-shape make an input of too many elements",
            value=(batch, *shape),
        )
    return (batch, *shape)


def _report(args: argparse.Namespace) -> int:
    check_output(args)
    chosen = read_policy(args.policy, args.sparsity)
    model = models.resolve_on_meta(args.model, args.num_classes)  # a wrong name is told first
    shape = read_shape(args)
    inputs = (torch.empty(shape, device="meta"),)
    gm = compile_model(
        model,
        chosen,
        example_inputs=inputs,
        **compile_options(args),
    )
    cost = args.topk_cost
    result = report(
        gm,
        inputs,
        accounting=args.accounting,
        activation_floor=args.activation_floor,
        topk_cost=cost if cost in (None, "paper") else tuple(cost.split(",")),
        device=args.device,
    )
    return show(result, args)


def _bench(args: argparse.Namespace) -> int:
    return cli_bench.run(args, read_shape)


def _export(args: argparse.Namespace) -> int:
    if Path(args.output).suffix == ".safetensors":
        refuse_given(
            args, ["batch_size"], "weights alone have no batch: this has no effect on .safetensors"
        )
    model = models.resolve(args.model, args.num_classes)
    inputs = allocated(torch.zeros, read_shape(args))
    _check_takes(model, inputs[:1])
    gm = compiled(args, model)
    given = {name: getattr(args, name) for name in ("training", "kernels", "shrink", "packed")}
    export(gm, args.output, (inputs,), **given, values=args.values)
    size = Path(args.output).stat().st_size
    if args.json:
        print(json.dumps({"path": args.output, "bytes": size}))
    else:
        print(f"{args.output}: {size:,} bytes")
    return 0


def _check_takes(model: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Raise InputError unless `model` runs on `inputs`; some formats would not ask it to."""
    with evaluation_mode(model), torch.no_grad():
        try:
            model(inputs)
        except Exception as error:  # of the user's own code, too
            raise InputError(
                f"the model cannot take an input of this shape: {type(error).__name__}: {error}",
                value=tuple(inputs.shape),
                remedy="check --input-shape",
            ) from error


def _compare(args: argparse.Namespace) -> int:
    return cli_compare.run(args, read_shape)


def _simulate(args: argparse.Namespace) -> int:
    return cli_simulate.run(args, read_policy(args.policy, args.sparsity), read_shape)


def _models(args: argparse.Namespace) -> int:
    names = models.names()
    return show(Page(tuple(names), Table.of({"model": names}), names), args)


def _demo(args: argparse.Namespace) -> int:
    demo.run(Path(args.output_dir), args.epochs)
    return 0


__all__ = ["main", "read_shape"]
