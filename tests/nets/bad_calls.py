"""Calls of the public API that are wrong somewhere, made from its signatures."""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import nn

import swatfx
from swatfx.policy import Policy


class _Thing:
    """Of no use anywhere."""

    def __repr__(self) -> str:
        return "a thing"


def odd_values() -> list[tuple[str, Any]]:
    """(what it is called, value)."""
    return [
        ("None", None),
        ("True", True),
        ("-1", -1),
        ("0", 0),
        ("1.5", 1.5),
        ("nan", float("nan")),
        ("inf", float("inf")),
        ("2**70", 2**70),
        ("empty string", ""),
        ("string", "odd"),
        ("bytes", b"odd"),
        ("empty list", []),
        ("empty dict", {}),
        ("list", [1, None]),
        ("dict", {"odd": 1}),
        ("thing", _Thing()),
        ("tensor", torch.full((2,), float("nan"))),
        ("class", nn.ReLU),
    ]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def right(folder: pathlib.Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Arguments by function, made anew at each call; every parameter has one."""

    def compiled(policy: str = "swat-u:0.5") -> Any:
        return swatfx.compile(net(), policy)

    def saved() -> dict[str, Any]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        swatfx.save(swatfx.compile(model, "swat-u:0.5"), folder / "a.ckpt", optimizer=optimizer)
        twin = net()
        rest = {"optimizer": torch.optim.SGD(twin.parameters(), 0.1), "example_inputs": None}
        return {"path": folder / "a.ckpt", "model": twin, **rest}

    def exported() -> dict[str, Any]:
        swatfx.export(compiled(), folder / "b.safetensors")
        return {"path": folder / "b.safetensors"}

    def program() -> dict[str, Any]:
        swatfx.export(compiled(), folder / "d.pt2", x)
        return {"path": folder / "d.pt2"}

    def attached() -> dict[str, Any]:
        gm = compiled("rigl:0.5,update_every=2,first_dense=false")
        optimizer = torch.optim.SGD(gm.parameters(), 0.1)
        return {"gm": gm, "optimizer": optimizer, "steps_per_epoch": 2, "total_steps": 4}

    x = torch.ones(2, 4)
    return {
        "compile": lambda: {"model": net(), "policy": "swat-u:0.5"},
        "report": lambda: {"gm": compiled(), "example_inputs": x},
        "bench": lambda: {"model": net(), "example_inputs": x, "seconds": 0.01},
        "compare": lambda: {"model": net, "policies": ["dense"], "example_inputs": x},
        "export": lambda: {"gm": compiled(), "path": folder / "a.safetensors", "example_inputs": x},
        "load_program": program,
        "load_sparse": exported,
        "shrink": lambda: {"gm": compiled(), "example_inputs": x},
        "save": lambda: {"gm": compiled(), "path": folder / "c.ckpt"},
        "load": saved,
        "attach": attached,
        "refresh": lambda: {"gm": compiled()},
        "dense_state_dict": lambda: {"gm": compiled()},
        "freeze": lambda: {"gm": compiled()},
        "observe": lambda: {"gm": compiled()},
        "observe_training": lambda: {"gm": compiled(), "to": print},
        "to_networkx": lambda: {"gm": compiled()},
        "tune": lambda: {
            "gm": compiled(),
            "data": [(x, torch.zeros(2, dtype=torch.int64))],
            "budget": 0.9,
        },
        "per_layer": lambda: {"rules": {"0": "dense"}, "default": "dense"},
    }


def calls(folder: pathlib.Path) -> Iterator[tuple[str, str, str, Callable[[], Any]]]:
    """(function, argument, value, call) of every parameter with every odd value."""
    arguments = right(folder)
    for name in swatfx.__all__:
        function = getattr(swatfx, name)
        if not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters
        for key, parameter in parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            for label, value in odd_values():
                yield name, key, label, _call(function, arguments.get(name), key, value)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and name == "swat_u":
            for field in fields(Policy):
                if field.name not in ("name", "sparsity", "first_dense", "distribution"):
                    for label, value in odd_values():
                        yield name, field.name, label, _call(function, None, field.name, value)
    for field in fields(Policy):
        for label, value in odd_values():
            yield "Policy", field.name, label, _policy(field.name, value)


def _call(
    function: Callable[..., Any], make: Callable[[], dict[str, Any]] | None, key: str, value: Any
) -> Callable[[], Any]:
    def call() -> Any:
        given = make() if make else {}
        if make is None and "sparsity" in inspect.signature(function).parameters:
            given = {"sparsity": 0.5}
        if function is swatfx.ssc:
            given = {"g": 2, "p": 2}
        result = function(**{**given, key: value})
        if function is swatfx.observe:
            with result:
                pass
        return result

    return call


def _policy(key: str, value: Any) -> Callable[[], Any]:
    def call() -> Any:
        policy = Policy(**{"name": "own", "sparsity": 0.5, key: value})
        return swatfx.compile(net(), policy)  # names of selectors are looked up here

    return call
