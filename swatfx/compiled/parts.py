"""The graphs of a compiled model, root and parts, and how their paths are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swatfx.compiled.module import SwatModule


def all_parts(gm: SwatModule) -> Iterator[tuple[str, SwatModule]]:
    """(path prefix, graph module) of the root ("") and of every part below eager code.

    The prefix of further graphs, for other calls, ends in their arguments, in parentheses.
    """
    yield "", gm
    ways = gm.ways
    if ways is not None:
        yield from ((str(pattern), graph) for pattern, graph in ways.graphs)
        if ways.fallback is not None:
            yield FALLBACK, ways.fallback
    for path, part in gm.parts.items():
        yield path, part
        if part.ways is not None:
            yield from ((f"{path}{pattern}", graph) for pattern, graph in part.ways.graphs)


FALLBACK = "(...)"


def is_root(prefix: str) -> bool:
    """Whether a graph with this prefix stands in for the whole model."""
    return not prefix or prefix.startswith("(")


def join(prefix: str, name: str) -> str:
    """Path of `name` below `prefix`."""
    path = prefix.partition("(")[0]
    return f"{path}.{name}" if path else name


def relative(prefix: str, path: str) -> str:
    """Inverse of `join`: `path` as seen from `prefix`, if it lies below."""
    above = prefix.partition("(")[0]
    return path.removeprefix(f"{above}.") if above else path
