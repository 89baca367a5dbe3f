"""Accelerators: exact cycle models that turn masks into cycles; they know nothing of graphs.

    from swatfx.accelerators import SCNN
    SCNN().conv_cycles(weight_mask, activation_mask, input_hw=(56, 56), padding=1)

A design of your own is a frozen dataclass that derives from `Accelerator` and fills in
`multipliers` and `run`; `register` gives it a name. Cycles are simulated: never mix them with
measured time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from swatfx.accelerators.ampere import Ampere
from swatfx.accelerators.base import Accelerator, Count, Cycles, total
from swatfx.accelerators.bit_tactical import BitTactical
from swatfx.accelerators.cache import cache_clear
from swatfx.accelerators.cambricon_x import CambriconX
from swatfx.accelerators.cnvlutin import Cnvlutin
from swatfx.accelerators.dense import DenseTile
from swatfx.accelerators.geometry import Problem, ceil_div, count_multiplications
from swatfx.accelerators.ideal import Ideal
from swatfx.accelerators.options import SimulationOptions
from swatfx.accelerators.scnn import SCNN
from swatfx.accelerators.systolic import Systolic
from swatfx.accelerators.tensordash import TensorDash
from swatfx.errors import InputError, UnknownNameError

Value = int | bool | str
Builder = Callable[..., Accelerator]

ACCELERATORS: dict[str, Builder] = {
    "dense-tile": DenseTile,
    "bit-tactical": BitTactical,
    "scnn": SCNN,
    "cambricon-x": CambriconX,
    "cnvlutin": Cnvlutin,
    "ampere": Ampere,
    "systolic": Systolic,
    "tensordash": TensorDash,
    "ideal": Ideal,
}


def register(name: str, build: Builder) -> None:
    """Make `get(name)` and `parse(name)` give `build(**options)`; a name in use is an error."""
    if ACCELERATORS.get(name, build) is not build:
        raise InputError(
            "an accelerator of this name is registered", value=name, remedy="Choose another name"
        )
    if not name or set(name) & set(":,= "):
        raise InputError(
            "a name may not be empty or hold ':', ',', '=' or a blank",
            value=name,
            remedy="Use letters and hyphens",
        )
    ACCELERATORS[name] = build


def get(name: str, **options: Value) -> Accelerator:
    """The accelerator registered as `name`, with parameters `options`."""
    if name not in ACCELERATORS:
        raise UnknownNameError("accelerator", name, ACCELERATORS)
    try:
        return ACCELERATORS[name](**options)
    except TypeError as error:
        parameters = inspect.signature(ACCELERATORS[name]).parameters
        own = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
        unknown = [key for key in options if key not in own and len(own) == len(parameters)]
        what = ", ".join(unknown) or f"these parameters: {error}"
        raise InputError(
            f"accelerator {name!r} does not take {what}",
            value=options,
            remedy=f"Its parameters: {', '.join(own) or 'none'}",
        ) from error


def parse(text: str) -> Accelerator:
    """An accelerator from "name" or "name:parameter=value,...", such as "bit-tactical:shape=L"."""
    name, _, rest = text.strip().partition(":")
    options: dict[str, Value] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (key and equals and value):
            raise InputError(
                "an accelerator's parameter is not key=value",
                value=part,
                remedy='Write, say, "bit-tactical:lookahead=4,shape=L"',
            )
        key = key.replace("-", "_")
        if key in options:
            raise InputError(
                f"an accelerator's parameter {key!r} is there twice",
                value=text,
                remedy="Give it once",
            )
        options[key] = _value(value)
    return get(name.strip().lower() if name not in ACCELERATORS else name, **options)


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        return text


__all__ = [
    "SimulationOptions",
    "ACCELERATORS",
    "SCNN",
    "Accelerator",
    "Ampere",
    "BitTactical",
    "CambriconX",
    "Cnvlutin",
    "Count",
    "Cycles",
    "DenseTile",
    "Ideal",
    "Problem",
    "Systolic",
    "TensorDash",
    "cache_clear",
    "ceil_div",
    "count_multiplications",
    "get",
    "parse",
    "register",
    "total",
]
