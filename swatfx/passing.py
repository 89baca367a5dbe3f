"""The contract of a compiler pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swatfx.compiled import SwatModule
from swatfx.policy import Policy


@dataclass(frozen=True)
class Context:
    """What passes know beside the graph.

    Attributes:
        policy: what is sparse where.
    """

    policy: Policy


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        graph_module: the module to go on with.
        modified: whether graph or metadata changed.
        notes: one line each, for people.
    """

    graph_module: SwatModule
    modified: bool
    notes: tuple[str, ...] = ()


Pass = Callable[[SwatModule, Context], PassResult]
