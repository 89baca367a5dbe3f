"""The paper's table 1 from the policies themselves: what is sparse in a method, and where.

Every cell is derived from the fields of a Policy; no method is known by name. Where a line of the
paper's stands for several policies, its cells join theirs with a slash.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass

import torch

from swatfx import selectors
from swatfx.policy import CONSTRUCTORS, Policy, parse
from swatfx.selectors import Axes, BlockSelector, Held, NofM, Selector
from swatfx.tables import Page, Table

__all__ = [
    "PAPER_ROWS",
    "Table1Line",
    "Table1Row",
    "is_structured",
    "join",
    "page",
    "row",
    "table1",
]

FIXED, VARIABLE = "Fixed", "Variable"
YES, GRADUAL, NO, NONE = "Yes", "Gradual", "No", "-"

# The paper's lines, in its order, and the policies that they stand for. (A mask that is selected
# once and kept, on the weights of a trained network, is one-shot pruning.)
PAPER_ROWS: Mapping[str, tuple[str, ...]] = {
    "Network pruning": (
        "static:0.9,weight_selector=nchw",
        "static:0.9,weight_selector=filter",
        "gradual-magnitude:0.9",
    ),
    "meProp": ("meprop:0.9",),
    "SET": ("set:0.9",),
    "DSR": ("dsr:0.9",),
    "SNFS": ("snfs:0.9",),
    "RigL": ("rigl:0.9",),
    "SWAT": ("swat-u:0.9", "swat-erk:0.9", "swat-m:0.9", "swat-u:0.9,weight_selector=channel"),
}
MISSING = "DSG, which the paper lists too, is not implemented."
_ARGUMENTS = {"ssc": ",g=4,p=8"}  # of constructors that want more than a sparsity


@dataclass(frozen=True)
class Table1Row:
    """One line of table 1.

    Attributes:
        across_layers: "Fixed", or "Variable" where training moves sparsity between layers.
        forward: whether the forward pass is sparse: "Yes", "Gradual" (along a ramp) or "No".
        input_gradient: likewise.
        weight_gradient: likewise.
        unstructured: whether the trained network has single weights missing: "Yes" or "No".
        structured: whether channels, filters or a regular pattern are missing: "Yes" or "-".
    """

    across_layers: str
    forward: str
    input_gradient: str
    weight_gradient: str
    unstructured: str
    structured: str


@dataclass(frozen=True)
class Table1Line:
    """A line under its name, with the policies that it stands for, as strings."""

    name: str
    row: Table1Row
    policies: tuple[str, ...]


HEADERS = (
    "algorithm",
    "across layers",
    "forward",
    "input gradient",
    "weight gradient",
    "unstructured",
    "structured",
)


def row(policy: Policy) -> Table1Row:
    """The line of one policy; those of a per-layer policy's rules are joined."""
    rules = [rule for _, rule in policy.rules]
    return join([_row(policy), *(_row(rule) for rule in rules)])


def _row(policy: Policy) -> Table1Row:
    variable = policy.distribution == "momentum" or policy.grow_share != "layer"
    variable = variable or policy.penalty > 0
    sparse = GRADUAL if policy.ramp != "none" else YES
    gradient = policy.gradient_sparsity > 0
    network = policy.forward_weight or policy.zeroes_inactive
    structured = is_structured(policy.weight_selector)

    def cell(is_sparse: bool) -> str:
        return sparse if is_sparse else NO

    return Table1Row(
        VARIABLE if variable else FIXED,
        cell(policy.forward_weight or policy.forward_activation),
        cell(policy.backward_weight or gradient),
        cell(policy.backward_activation or gradient),
        YES if network and not structured else NO,
        YES if network and structured else NONE,
    )


def is_structured(selector: str) -> bool:
    """Whether the selector of this name keeps weights in groups or in a regular pattern.

    It does if it scores groups of weights (channels, filters, blocks), keeps n of every m, or has
    densities of its own, which the shape alone decides (a fixed pattern).
    """
    chosen = selectors.get(selector)
    chosen = chosen.base if isinstance(chosen, Held) else chosen
    weight = torch.ones(8, 8, 3, 3)
    grouped = chosen.score(weight, Axes(0, 1)).shape != weight.shape
    pattern = type(chosen).own_density is not Selector.own_density
    return grouped or pattern or isinstance(chosen, (NofM, BlockSelector))


def join(rows: Iterable[Table1Row]) -> Table1Row:
    """One line for several policies: what differs is joined as in "Fixed/Variable".

    The network is unstructured, or structured, where it can be so.
    """
    columns = [list(dict.fromkeys(column)) for column in zip(*map(astuple, rows), strict=True)]
    *passes, unstructured, structured = columns
    kinds = [YES if YES in column else column[0] for column in (unstructured, structured)]
    order = (FIXED, VARIABLE, YES, GRADUAL, NO)
    return Table1Row(*("/".join(sorted(column, key=order.index)) for column in passes), *kinds)


def table1() -> list[Table1Line]:
    """The paper's lines, then one for each policy that none of them names."""
    found = [_line(name, policies) for name, policies in PAPER_ROWS.items()]
    named = {text.partition(":")[0] for texts in PAPER_ROWS.values() for text in texts}
    for name, build in CONSTRUCTORS.items():
        if name not in named:
            found.append(_line(name, (_example(name, build),)))
    return found


def _line(name: str, policies: tuple[str, ...]) -> Table1Line:
    return Table1Line(name, join(row(parse(text)) for text in policies), policies)


def _example(name: str, build: Callable[..., Policy]) -> str:
    """A string that makes a policy of constructor `name`."""
    sparsity = ":0.9" if "sparsity" in inspect.signature(build).parameters else ""
    return f"{name}{sparsity}{_ARGUMENTS.get(name, '')}"


def page(lines: Sequence[Table1Line]) -> Page:
    """Two tables, which policies stand behind the lines, and what is left out."""
    paper = [line for line in lines if line.name in PAPER_ROWS]
    others = [line for line in lines if line.name not in PAPER_ROWS]
    rows = [
        {"algorithm": line.name, **asdict(line.row), "policies": line.policies} for line in lines
    ]
    named = {name: [row[name] for row in rows] for name in rows[0]}
    return Page(
        (
            f"Table 1 of the paper, from the policies' fields. {MISSING}",
            Table(HEADERS, tuple((line.name, *astuple(line.row)) for line in paper)),
            "\n".join(f"{line.name}: {' | '.join(line.policies)}" for line in paper),
            Table(HEADERS, tuple((line.policies[0], *astuple(line.row)) for line in others)),
        ),
        Table.of(named | {"policies": [" | ".join(policies) for policies in named["policies"]]}),
        {"rows": rows, "note": MISSING},
    )
