"""Command lines that are wrong somewhere, made from the parsers themselves."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator

from swatfx.cli import commands as cli

NUMBERS = ["", "nan", "inf", "-inf", "-1", "0", "1.5", "1e400", "99999999999999999999", "-0.0"]
NUMBERS += ["2147483647", "0x10", "many", "1,2", "½", "٣", "1_000", "+1", " 1 "]
WORDS = ["", " ", "-1", "0", "nan", "None", "[]", "{", "no such", "\udcff", "é", "a\nb", "a" * 5000]
WORDS += [
    ":",
    "a:",
    ":a",
    "a=b",
    "=",
    ",",
    "..",
    "%s",
    "{0}",
    "os:getcwd",
    "json:loads",
    "sys:exit",
]
POLICIES = [
    "swat-u",
    "swat-u:",
    "swat-u:nan",
    "swat-u:inf",
    "swat-u:-1",
    "swat-u:1",
    "swat-u:1e999",
]
POLICIES += [f"swat-u:0.5,{field}" for field in ("period=0", "period=1e3", "period=9" * 9, "x=1")]
POLICIES += [
    "swat-u:0.5,seed=a",
    "swat-u:0.5,seed=[]",
    "swat-u:0.5,drop=none,grow=all",
    "dense:0.5",
]
POLICIES += ["rigl:0.5,update_every=-1", "rigl:0.5,drop_fraction=2", "rigl:0.5,drop_fraction=a"]
POLICIES += [
    "rigl:0.5,update_until=nan",
    "rigl:0.5,hold_from_epoch=1",
    "dst:-1",
    "dst:nan",
    "dst:a",
]
POLICIES += [
    "ssc",
    "ssc,g=0,p=1",
    "ssc,g=a,p=b",
    "ssc,g=[1],p=2",
    "ssc,g=4,p=-8",
    "swat-u:0.5,,,=,",
]
POLICIES += ["swat-u:0.5,weight_selector=", "swat-u:0.5,weight_selector=3:2", "swat-u:0.5,name=x"]
POLICIES += ["swat-u:0.5,activation_selector=filter", "swat-u:0.5,rules=()", "swat-u:0.5,rules=a"]
POLICIES += ["swat-u:0.5,first_dense=2", "swat-u:0.5,ramp=1", "swat-u:0.5,distribution=[]"]
POLICIES += [
    "swat-frozen:0.5,hold_from_epoch=-1",
    "swat-u:0.5,activation_sparsity=a",
    "set:0.5,0.6",
]
POLICIES += ["meprop:0.5,gradient_selector=x", "swat-u:0.5,assumed_activation_density=0", "\udcff"]
SHAPES = ["3", "3,8", "1,8,8,8", "0,8,8", "-1,8,8", "1,8,", "1x8x8x", "1.5,8,8", "a,b,c", ",,,"]
SHAPES += ["1,99999999999,8", "1,2147483647,2147483647", "3,8,8", "1,1,1", "١,8,8"]
SWEEPS = [
    "lookahead",
    "=1",
    "lookahead=",
    "lookahead=3..1",
    "lookahead=a..b",
    "lookahead=1..",
    "x=1",
]
SWEEPS += ["sparsity=2", "sparsity=nan", "samples=0", "seed=a", "batch=0", "batch=-1", "batch=1.5"]
SWEEPS += [
    "word_bytes=0",
    "bandwidth=-1",
    "natural_density=2",
    "json=1",
    "table6=1",
    "lookahead=0.5",
]
SWEEPS += ["lookahead=-1", "lookahead=1..99999999999"]
ACCELERATORS = [
    "scnn:",
    "scnn:x=1",
    "bit-tactical:lookahead=0",
    "bit-tactical:lookahead=a",
    "nothing",
]
ACCELERATORS += ["bit-tactical:lookahead=-1", "bit-tactical:shape=Q", "scnn,scnn", "scnn:=", "SCNN"]
DATA = ["fake/", "fake/1x8x8", "fake/0x8x8/3", "fake/1x8x8/0", "fake/1x8x8/-1", "fake/axbxc/d"]
DATA += [
    "fake/1x8x8/99999999999",
    "fake/1x99999999x99999999/3",
    "imagenet",
    "cifar10",
    "digit",
    "fake/3",
]
DEVICES = [
    "cuda",
    "cuda:0",
    "cuda:99",
    "cuda:-1",
    "mps",
    "xpu",
    "foo",
    "cpu:7",
    "meta",
    "CPU",
    "cpu:",
]
EXTRA = {
    "policy": POLICIES,
    "policies": [*POLICIES, ",", "period=1", "dense,dense"],
    "input_shape": SHAPES,
    "sweep": SWEEPS,
    "accelerator": ACCELERATORS,
    "data": DATA,
    "device": DEVICES,
    "topk_cost": ["1", "1,2,3", "a,b", "0,1", "-1,1", "nan,1", "1,inf", "paperr", ","],
}
PATHS = ("output", "checkpoint", "trace", "data_root", "output_dir")


def base(command: str, folder: pathlib.Path) -> list[str]:
    """A right command line of `command`, quick to run."""
    return {
        "report": ["report", "digits/cnn", "--batch-size", "2"],
        "bench": [
            *("bench", "digits/cnn", "--batch-size", "2", "--dtype", "fp32", "--rounds", "1"),
            *("--seconds", "0.001", "--threads", "1", "--quiet"),
        ],
        "train": [
            *("train", "--model", "digits/cnn", "--data", "fake/1x8x8/3", "--policy", "swat-u:0.5"),
            *("--epochs", "1", "--limit", "16", "--batch-size", "8", "--max-steps", "1"),
            *("--threads", "1", "--device", "cpu", "--quiet"),
        ],
        "compare": ["compare", "digits/cnn", "--policies", "dense", "--batch-size", "2"],
        "compare --train": [
            *("compare", "digits/cnn", "--policies", "dense", "--train", "--data", "fake/1x8x8/3"),
            *("--epochs", "1", "--limit", "16", "--batch-size", "8", "--threads", "1"),
            *("--device", "cpu", "--quiet"),
        ],
        "export": ["export", "digits/cnn", "--output", str(folder / "a.safetensors")],
        "simulate": ["simulate", "digits/cnn", "--accelerator", "ideal"],
        "policies": ["policies"],
        "models": ["models"],
        "demo": ["demo"],
    }[command]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every subcommand's parser by name."""
    for action in cli._parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = dict(action.choices)
            return found | {"compare --train": found["compare"]}
    raise AssertionError("no subcommands")


def odd_paths(folder: pathlib.Path) -> list[str]:
    """Paths that cannot be written, or read; `folder` holds a file, a folder, and a broken link."""
    return [
        *("", " ", str(folder), f"{folder}/file/x", f"{folder}/absent/x", f"{folder}/file"),
        *(
            "/dev/null/x",
            "/proc/none",
            f"{folder}/{'n' * 300}",
            f"{folder}/link",
            "/dev/full",
            "\0",
        ),
    ]


def commands(folder: pathlib.Path) -> Iterator[tuple[str, str, list[str]]]:
    """(subcommand, what is odd, command line) of every option with every odd value for it."""
    for name, parser in parsers().items():
        right = base(name, folder)
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            option = action.option_strings[-1] if action.option_strings else ""
            for value in _values(action, folder):
                if option:
                    line = [*right, f"{option}={value}"]
                else:  # a positional one stands where it stands
                    line = [right[0], f"{value}", *right[2:]]
                yield name, f"{option or action.dest}={value}", line
            if option and action.nargs is None:
                yield name, f"{option} alone", [*right, option]
            if action.required and option:
                without = [word for word in right if word != option]
                yield name, f"no {option}", without
        yield name, "extra", [*right, "extra"]
        yield name, "unknown", [*right, "--unknown"]


def _values(action: argparse.Action, folder: pathlib.Path) -> list[str]:
    if action.nargs == 0:
        return ["", "1", "false"]
    if action.choices is not None:
        return [*WORDS, *(f"{choice}x" for choice in action.choices)]
    if action.dest == "data_root":  # a folder that no other option has made meanwhile
        return [path.replace("absent", "nowhere") for path in odd_paths(folder)]
    if action.dest in PATHS:
        return odd_paths(folder)
    if action.type is None or getattr(action.type, "__name__", "") == "given":
        return [*WORDS, *EXTRA.get(action.dest, [])]
    return NUMBERS
