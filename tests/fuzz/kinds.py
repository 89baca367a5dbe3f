"""What can be drawn and checked, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.fuzz.cases import LayerCase, random_layer
from tests.fuzz.checking import check_layer
from tests.fuzz.checking_networks import check_network
from tests.fuzz.networks import NetworkCase, random_network
from tests.fuzz.programs import ProgramCase, check_program, random_program, smaller_programs
from tests.fuzz.shrinking import smaller_layers, smaller_networks


@dataclass(frozen=True)
class Kind:
    """One kind of case.

    Attributes:
        draw: (seed, number) -> case.
        read: JSON -> case.
        check: case -> what is wrong.
        smaller: case -> simpler ones to try.
        source: what a script imports.
        warm: a case that takes a process through all that first calls cost.
    """

    draw: Callable[[int, int], Any]
    read: Callable[[dict[str, Any]], Any]
    check: Callable[[Any], list[str]]
    smaller: Callable[[Any], list[Any]]
    source: str
    warm: Any


KINDS = {
    "layer": Kind(
        random_layer,
        LayerCase.from_json,
        check_layer,
        smaller_layers,
        "from tests.fuzz.cases import LayerCase\n"
        "from tests.fuzz.checking import check_layer as check\n"
        "from tests.fuzz.methods import Method\n",
        LayerCase(
            kind="conv2d",
            size=(4, 4),
            kernel=(1, 1),
            stride=(1, 1),
            padding=(0, 0),
            dilation=(1, 1),
            kernels="dense",
        ),
    ),
    "network": Kind(
        random_network,
        NetworkCase.from_json,
        check_network,
        smaller_networks,
        "from tests.fuzz.checking_networks import check_network as check\n"
        "from tests.fuzz.methods import Method\n"
        "from tests.fuzz.networks import Do, NetworkCase\n",
        # One thread: a fork of a process that has more would wait for them.
        replace(random_network(0, 1), kernels="dense", threads=1),
    ),
    "program": Kind(
        random_program,
        ProgramCase.from_json,
        check_program,
        smaller_programs,
        "from tests.fuzz.programs import ProgramCase, check_program as check\n",
        ProgramCase(kernels="dense"),
    ),
}
