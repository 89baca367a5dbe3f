"""A network from what a user types: one of our names, or ``package.module:callable``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from torch import nn

from swatfx.errors import InputError


def import_callable(spec: str) -> Any:
    """Import ``package.module:callable``; the current folder is looked in as well.

    Raises:
        InputError: there is no such thing.
    """
    module_name, _, attribute = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` has it and a console script has not
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever the user's module raises as it is run
        known = isinstance(error, (ImportError, AttributeError, ValueError))
        what = str(error) if known else f"{type(error).__name__}: {error}"
        raise InputError(
            f"cannot import the model: {what}",
            value=spec,
            remedy="write package.module:callable, importable from the current folder",
        ) from error
    return found


def build(spec: str, num_classes: int | None) -> nn.Module:
    """Call ``package.module:callable``, with ``num_classes=`` if it is given and taken.

    Raises:
        InputError: it cannot be imported, cannot be called so, or returns no module.
    """
    model = call(spec, num_classes)
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned no torch.nn.Module", value=type(model).__name__)
    return model


def build_with_inputs(spec: str, num_classes: int | None) -> tuple[nn.Module, Any, Any]:
    """(model, example inputs, loss) of ``package.module:callable``; None for what it leaves out.

    It returns a model, (model, inputs) or (model, inputs, loss).

    Raises:
        InputError: as `build`, or it returns something else.
    """
    found = call(spec, num_classes)
    parts = found if isinstance(found, tuple) and 2 <= len(found) <= 3 else (found,)
    model, inputs, loss = (*parts, None, None)[:3]
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{spec} returned no torch.nn.Module",
            value=type(model).__name__,
            remedy="let it return a model, (model, inputs) or (model, inputs, loss)",
        )
    if not (loss is None or callable(loss)):
        raise InputError(
            f"the loss that {spec} returned is no function",
            value=type(loss).__name__,
            remedy="let it be a function of what the model returns, which gives a scalar",
        )
    return model, inputs, loss


def call(spec: str, num_classes: int | None) -> Any:
    """What ``package.module:callable`` returns, called as `build` says; raises as it does."""
    builder = import_callable(spec)
    if not callable(builder):
        raise InputError("not a callable that builds a model", value=spec)
    options = {}
    try:
        if num_classes is not None and "num_classes" in inspect.signature(builder).parameters:
            options["num_classes"] = num_classes
        return builder(**options)
    except (NotImplementedError, RuntimeError):
        raise  # on the meta device, which not every builder can do; see `resolve_on_meta`
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the model cannot be built: {type(error).__name__}: {error}",
            value=spec,
            remedy="name a callable without required arguments",
        ) from error
