"""The errors that swatfx raises: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 200  # characters of a value in a message
_FEW = 4  # names, which are all told


class SwatError(Exception):
    """Base of every error that swatfx raises on purpose.

    Args:
        problem: what is wrong, in one sentence without the names below.
        layer: the layer (module path) it is about, if any.
        value: the offending value, if any.
        remedy: what the user can do.
    """

    def __init__(
        self,
        problem: str,
        *,
        layer: str | None = None,
        value: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.layer = layer
        self.value = value
        self.remedy = remedy
        text = problem if layer is None else f"layer {layer!r}: {problem}"
        if value is not None:
            text += f" (got {_short(value)})"
        if remedy is not None:
            text += f". {remedy}"
        super().__init__(" ".join(text.splitlines()))


def _short(value: object) -> str:
    """`repr(value)` in one line, cut where it is long; some values have none."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


class SwatWarning(UserWarning):
    """What a user should know of, though it is no error: part of a model stays eager Python."""


class PolicyError(SwatError, ValueError):
    """A policy asks for something impossible, such as a sparsity outside [0, 1)."""


class InputError(SwatError, ValueError):
    """Example inputs, tensors or shapes that do not fit the model or the method."""


class CheckpointError(SwatError, RuntimeError):
    """A checkpoint that is cut short, foreign, or made for another model."""


class ExportError(SwatError, RuntimeError):
    """An export format that is unknown, or whose optional packages are missing."""


class AttachError(SwatError, RuntimeError):
    """A policy needs an optimizer that was not attached, or that lacks what the policy reads."""


class UnknownNameError(SwatError, KeyError):
    """A name that nothing is registered under; the message lists the nearest ones."""

    def __init__(self, kind: str, value: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(value, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else ""
        if not near or len(names) <= _FEW:
            hint = f"{hint} known: {', '.join(names)}".strip()
        super().__init__(f"unknown {kind}", value=value, remedy=hint)

    def __str__(self) -> str:
        # KeyError prints its argument's repr, which would quote the whole sentence.
        return str(self.args[0])


class ChangedModelError(SwatError, RuntimeError):
    """A compiled model whose modules were changed in a way that its graph cannot follow."""


class PassError(SwatError, RuntimeError):
    """A compiler pass failed; carries the pass, the node and the layer.

    Args:
        pass_name: the pass that failed.
        node: the graph node in hand, if one is known.
        layer: the layer in hand, if one is known.
        problem: the original message.
    """

    def __init__(
        self, pass_name: str, problem: str, *, node: str | None = None, layer: str | None = None
    ) -> None:
        self.pass_name = pass_name
        self.node = node
        where = f"pass {pass_name}" + (f", node {node}" if node else "")
        super().__init__(f"{where}: {problem}", layer=layer)
