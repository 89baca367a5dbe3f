"""Table 1 from the policies' fields, against the paper's own lines."""

from __future__ import annotations

import json
from dataclasses import astuple, replace

import pytest

from swatfx import policy
from swatfx.cli.commands import main
from swatfx.paper import table1
from swatfx.paper.table1 import PAPER_ROWS, Table1Row, is_structured, join, row
from swatfx.policy import Policy, dense, parse, per_layer

# As printed. Its columns: sparsity across layers; sparse forward, input gradient, weight gradient;
# unstructured, structured network. DSG is not implemented.
PRINTED = {
    "meProp": ("Fixed", "No", "Yes", "Yes", "No", "-"),
    "SET": ("Fixed", "Yes", "Yes", "No", "Yes", "-"),
    "DSR": ("Variable", "Yes", "Yes", "No", "Yes", "-"),
    "SNFS": ("Variable", "Yes", "Yes", "No", "Yes", "-"),
    "RigL": ("Fixed", "Yes", "Yes", "No", "Yes", "-"),
    "SWAT": ("Fixed/Variable", "Yes", "Yes", "Yes", "Yes", "Yes"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_papers_lines(name: str) -> None:
    lines = {line.name: line.row for line in table1.table1()}
    assert astuple(lines[name]) == PRINTED[name]


def test_network_pruning_is_within_what_the_paper_says_of_it() -> None:
    """It prints "Fixed/Variable" and "depend on algorithm": ours are fixed, of both kinds."""
    line = next(line for line in table1.table1() if line.name == "Network pruning")
    assert line.row == Table1Row("Fixed", "Yes/Gradual", "Yes/Gradual", "No", "Yes", "Yes")
    assert row(parse("gradual-magnitude:0.9")) == Table1Row(
        "Fixed", "Gradual", "Gradual", "No", "Yes", "-"
    )


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("dense", ("Fixed", "No", "No", "No", "No", "-")),
        ("saw:0.9", ("Fixed", "No", "Yes", "Yes", "No", "-")),
        ("swat-m:0.9", ("Variable", "Yes", "Yes", "Yes", "Yes", "-")),
        ("swat-u:0.5,weight_selector=2:4", ("Fixed", "Yes", "Yes", "Yes", "No", "Yes")),
        ("forward-weights:0.9", ("Fixed", "Yes", "No", "No", "Yes", "-")),
        ("forward-activations:0.9", ("Fixed", "Yes", "No", "No", "No", "-")),
        ("dst", ("Variable", "Yes", "Yes", "No", "Yes", "-")),
        ("static:0.9", ("Fixed", "Yes", "Yes", "No", "Yes", "-")),
        ("soft-filter:0.3", ("Fixed", "No", "No", "No", "No", "Yes")),
        ("ssc,g=4,p=8", ("Fixed", "Yes", "Yes", "No", "No", "Yes")),
    ],
)
def test_other_policies(text: str, cells: tuple[str, ...]) -> None:
    assert astuple(row(parse(text))) == cells


@pytest.mark.parametrize(
    ("changes", "column", "cell"),
    [
        ({"distribution": "momentum"}, "across_layers", "Variable"),
        ({"grow_share": "survivors"}, "across_layers", "Variable"),
        ({"penalty": 1e-4}, "across_layers", "Variable"),
        ({"forward_weight": False}, "forward", "No"),
        ({"forward_weight": False, "forward_activation": True}, "forward", "Yes"),
        ({"ramp": "cubic", "hold_from_epoch": 0}, "forward", "Gradual"),
        ({"backward_weight": False}, "input_gradient", "No"),
        ({"backward_weight": False, "gradient_sparsity": 0.5}, "input_gradient", "Yes"),
        ({"backward_activation": False}, "weight_gradient", "No"),
        ({"backward_activation": False, "gradient_sparsity": 0.5}, "weight_gradient", "Yes"),
        ({"forward_weight": False}, "unstructured", "No"),
        (
            {"forward_weight": False, "zero_inactive": "updates", "hold_from_epoch": 0},
            "unstructured",
            "Yes",
        ),
        ({"weight_selector": "channel"}, "unstructured", "No"),
        ({"weight_selector": "channel"}, "structured", "Yes"),
    ],
)
def test_each_cell_follows_a_field(changes: dict[str, object], column: str, cell: str) -> None:
    base = Policy("mine", 0.9)
    assert astuple(row(base)) == ("Fixed", "Yes", "Yes", "Yes", "Yes", "-")
    assert getattr(row(replace(base, **changes)), column) == cell


@pytest.mark.parametrize(
    "name",
    ["channel", "channel-per-filter", "filter", "filter-l2", "input-channel", "2:4", "block-4x1"],
)
def test_structured_selectors(name: str) -> None:
    assert is_structured(name) and is_structured("held:channel")


@pytest.mark.parametrize("name", ["nchw", "chw", "hw", "random", "learned", "held:random"])
def test_unstructured_selectors(name: str) -> None:
    assert not is_structured(name)


def test_lines_join_what_differs_and_networks_are_what_they_can_be() -> None:
    lines = [row(parse(text)) for text in ("gradual-magnitude:0.9", "swat-m:0.9", "saw:0.9")]
    assert join(lines) == Table1Row(
        "Fixed/Variable", "Yes/Gradual/No", "Yes/Gradual", "Yes/No", "Yes", "-"
    )
    assert join(lines) == join(reversed(lines))
    assert join(lines[:1]) == lines[0]


def test_a_policy_a_layer_joins_its_rules() -> None:
    mixed = per_layer({"fc": "saw:0.9", "layer4.*": "swat-u:0.7,weight_selector=filter"})
    assert row(mixed) == join([row(dense()), row(parse("saw:0.9")), row(mixed.rules[1][1])])
    assert row(mixed).structured == "Yes" and row(mixed).forward == "Yes/No"


def test_every_policy_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(sparsity: float) -> Policy:
        return Policy("mine", sparsity, backward_weight=False)

    monkeypatch.setitem(policy.CONSTRUCTORS, "mine", mine)
    lines = table1.table1()
    assert [line.name for line in lines][: len(PAPER_ROWS)] == list(PAPER_ROWS)
    standing = {parse(text).name for line in lines for text in line.policies}
    assert standing >= {"mine", "dense", "swat-er", "saw", "set", "static"}
    shown = {text.partition(":")[0].partition(",")[0] for x in lines for text in x.policies}
    assert shown == set(policy.CONSTRUCTORS)
    assert lines[-1].row.input_gradient == "No"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", "--table1"]) == 0
    text = capsys.readouterr().out
    for name, cells in PRINTED.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert [part.strip() for part in line.split("  ") if part.strip()] == [name, *cells]
    assert "DSG" in text and "gradual-magnitude:0.9" in text
    assert main(["policies", "--table1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["rows"][0]["algorithm"] == "Network pruning"
    rigl = next(line for line in data["rows"] if line["algorithm"] == "RigL")
    assert rigl["policies"] == ["rigl:0.9"] and rigl["weight_gradient"] == "No"
    assert "DSG" in data["note"]
