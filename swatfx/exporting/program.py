"""Example inputs and dynamic dimensions for torch.export, and the call of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from swatfx.errors import ExportError, SwatError


@dataclass(frozen=True)
class Example:
    """Example inputs, copied from the caller's, and what the caller says of their dimensions.

    Attributes:
        args: by position.
        kwargs: by name.
        dynamic_shapes: as torch.export takes it; None: dimension 0 wherever it can be.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None

    @staticmethod
    def of(given: Any, dynamic_shapes: Any) -> Example:
        """One tensor, a sequence of positional inputs, or a mapping of those by name."""
        copied = pytree.tree_map(_copy, given)
        if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
            return Example((), dict(copied), dynamic_shapes)
        if isinstance(given, Sequence) and not isinstance(given, str):
            return Example(tuple(copied), None, dynamic_shapes)
        return Example((copied,), None, dynamic_shapes)

    def tensors(self) -> list[Tensor]:
        """All tensors in them."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs or {})))
        return [x for x in leaves if isinstance(x, Tensor)]

    def candidates(self, module: nn.Module) -> Iterator[Example]:
        """What to try in turn, with dynamic shapes: a dimension of 0 or 1 is taken for a constant,
        so a batch of them is made one of two, unless the model wants it as it is.
        """
        if self.dynamic_shapes is not None:
            yield self
            return
        narrow = [x for x in self.tensors() if x.dim() and x.shape[0] < 2]
        whole = len(narrow) == sum(x.dim() > 0 for x in self.tensors())
        if narrow and whole:
            yield self._widened(narrow)._automatic(module)
        if len(narrow) > 1 and whole:
            yield self._widened(narrow[:1])._automatic(module)
        yield self._automatic(module)

    def _widened(self, which: list[Tensor]) -> Example:
        chosen = {id(x) for x in which}

        def widen(x: Any) -> Any:
            if id(x) not in chosen:
                return x
            return torch.cat([x, x]) if x.shape[0] else x.new_zeros((2, *x.shape[1:]))

        args, kwargs = pytree.tree_map(widen, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def _automatic(self, module: nn.Module) -> Example:
        def shape(x: Any) -> Any:
            return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None

        shapes = pytree.tree_map(shape, self.args)
        if self.kwargs is not None:
            return replace(self, dynamic_shapes=pytree.tree_map(shape, dict(self.kwargs)))
        names = list(inspect.signature(module.forward).parameters.values())
        if names and names[0].kind is inspect.Parameter.VAR_POSITIONAL:
            return replace(self, dynamic_shapes={names[0].name: shapes})
        return replace(self, dynamic_shapes=shapes)


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def first_line(error: Exception) -> str:
    """Of what it says."""
    return (str(error).strip().splitlines() or [""])[0]


def exported(module: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """torch.export's program of `module`.

    Raises:
        ExportError: torch.export cannot follow the model, or not with these dynamic shapes.
    """
    failed: Exception | None = None
    for tried in example.candidates(module):
        try:
            return _export(module, tried)
        except SwatError:
            raise
        except Exception as error:  # torch.export raises whatever the model does
            failed = failed or error
    assert failed is not None
    first = first_line(failed)
    remedy = "export the parts that it can follow, or write .safetensors"
    if example.dynamic_shapes is not None:
        remedy = "leave dynamic_shapes out, or name only dimensions that the model leaves free"
    raise ExportError(
        f"torch.export cannot follow the model: {type(failed).__name__}: {first}",
        value=[tuple(x.shape) for x in example.tensors()],
        remedy=remedy,
    ) from failed


def _export(module: nn.Module, example: Example) -> torch.export.ExportedProgram:
    run: Callable[..., torch.export.ExportedProgram] = torch.export.export
    kwargs = None if example.kwargs is None else dict(example.kwargs)
    shapes = example.dynamic_shapes
    return run(module, example.args, kwargs, dynamic_shapes=shapes, strict=False)
