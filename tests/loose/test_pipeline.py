"""The pipeline: a visible list of passes, what they write, and how they can be run elsewhere."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx, nn

import swatfx
from passes.find_layers import find_layers
from passes.insert_sparsify import insert_sparsify
from passes.verify import verify
from swatfx import meta, pipeline
from swatfx.compiled.layers import all_plans
from swatfx.compiled.module import SwatModule
from swatfx.compiled.parts import all_parts
from swatfx.errors import InputError, PassError, SwatError
from swatfx.passing import Context, PassResult
from tests.nets.places import GOLDEN
from tests.nets.small_nets import (
    EagerMiddle,
    Residual,
    Tied,
    TwoInputs,
    assert_same,
    batches,
    pads,
    plain,
    sgd,
    snapshot,
    train,
)

POLICIES = {
    "residual_swat_u": "swat-u:0.9,period=4",
    "residual_saw": "saw:0.9",
    "residual_meprop": "meprop:0.9",
    "residual_channel": "swat-erk:0.9,weight_selector=channel",
}


@pytest.mark.parametrize("name", POLICIES)
def test_golden_code(name: str) -> None:
    """To write the files anew: SWATFX_GOLDEN=1 pytest tests/loose/test_pipeline.py -k golden."""
    # Which kernels run is a matter of the machine: tests/passes/test_layout_flow.py.
    code = swatfx.compile(Residual(), POLICIES[name], kernels="dense").code.strip() + "\n"
    code = "\n".join(line.rstrip() for line in code.splitlines()) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("SWATFX_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    expected = path.read_text()
    change = "\n".join(difflib.unified_diff(expected.splitlines(), code.splitlines(), lineterm=""))
    assert code == expected, f"the graph has changed:\n{change}"


NETS: list[Callable[[], nn.Module]] = [plain, Residual, TwoInputs, Tied, pads, EagerMiddle]


@pytest.mark.parametrize("build", NETS)
def test_compile_is_deterministic(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    state = torch.get_rng_state()
    one = swatfx.compile(model, "swat-erk:0.7")
    assert torch.equal(torch.get_rng_state(), state)
    other = swatfx.compile(model, "swat-erk:0.7")
    assert [(p, g.code) for p, g in all_parts(one)] == [(p, g.code) for p, g in all_parts(other)]
    assert all_plans(one) == all_plans(other)
    assert_same(snapshot(one), snapshot(other))


@pytest.mark.parametrize("build", NETS)
def test_second_run_changes_nothing(build: Callable[[], nn.Module]) -> None:
    gm = swatfx.compile(build(), "swat-erk:0.7")
    before = [
        (path, part.code, [meta.read(n) for n in part.graph.nodes]) for path, part in all_parts(gm)
    ]
    state = snapshot(gm)
    for _ in range(2):
        result = insert_sparsify(gm, Context(swatfx.swat_erk(0.7)))
        assert result.graph_module is gm and not result.modified
    after = [
        (path, part.code, [meta.read(n) for n in part.graph.nodes]) for path, part in all_parts(gm)
    ]
    assert after == before
    assert_same(snapshot(gm), state)


def test_passes_are_a_visible_list() -> None:
    passes = pipeline.default_passes()
    gm = swatfx.compile(Residual(), "swat-u:0.9", passes=passes)
    records = gm.__dict__["pass_records"]
    assert [r.name for r in records] == [p.__name__ for p in passes]
    assert "find_layers" in [r.name for r in records]
    assert all(r.seconds >= 0 for r in records)
    assert records[-1].nodes_after > records[0].nodes_before
    assert any("of 8 layers sparse" in note for r in records for note in r.notes)


def test_own_pass_runs_between() -> None:
    seen: list[str] = []

    def count_relus(gm: SwatModule, ctx: Context) -> PassResult:
        seen.append(f"{sum('relu' in n.name for n in gm.graph.nodes)} under {ctx.policy.name}")
        return PassResult(gm, False, (seen[-1],))

    first, *rest = pipeline.default_passes()
    swatfx.compile(Residual(), "swat-u:0.9", passes=[first, count_relus, *rest])
    assert seen == ["5 under swat-u"]


def test_failures_name_the_pass() -> None:
    def returns_nothing(gm: SwatModule, ctx: Context) -> Any:
        return None

    def own_error(gm: SwatModule, ctx: Context) -> Any:
        raise InputError("says so itself", layer="stem")

    def breaks_the_graph(gm: SwatModule, ctx: Context) -> PassResult:
        node = next(n for n in gm.graph.nodes if n.op == "call_module")
        meta.update(node, role="op")
        return PassResult(gm, True)

    class Callable_:
        def __call__(self, gm: SwatModule, ctx: Context) -> Any:
            return 1 / 0

    cases: list[tuple[Any, type[SwatError], str]] = [
        (returns_nothing, PassError, "pass returns_nothing: AttributeError"),
        (Callable_(), PassError, "pass Callable_: ZeroDivisionError"),
        (own_error, InputError, "layer 'stem': says so itself"),
        (breaks_the_graph, PassError, "pass verify, node stem: sparse ops and their metadata"),
    ]
    for function, error, message in cases:
        with pytest.raises(error, match=message):
            swatfx.compile(Residual(), "swat-u:0.9", passes=[find_layers, function])


def test_failing_compile_leaves_the_model_alone() -> None:
    def fails(gm: SwatModule, ctx: Context) -> Any:
        raise RuntimeError("late")

    model = Residual()
    before, modules = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(PassError):
        swatfx.compile(model, "swat-u:0.9", passes=[*pipeline.default_passes(), fails])
    assert_same(snapshot(model), before)
    assert [type(m) for m in model.modules()] == modules
    assert swatfx.compile(model, "swat-u:0.9").code


def test_passes_run_in_torch_fx_pass_manager() -> None:
    from torch.fx.passes.infra.pass_manager import PassManager

    policy = swatfx.swat_u(0.9, period=2)
    torch.manual_seed(0)
    model = Residual()
    traced = swatfx.compile(copy.deepcopy(model), policy, passes=[])
    manager = PassManager([pipeline.as_fx_pass(p, policy) for p in pipeline.default_passes()])
    result = manager(traced)
    assert result.modified
    gm = result.graph_module
    reference = swatfx.compile(model, policy)
    assert isinstance(gm, SwatModule) and gm.code == reference.code
    assert train(gm, sgd(gm), batches(3)) == train(reference, sgd(reference), batches(3))
    assert_same(snapshot(gm), snapshot(reference))


def test_pass_adapter_wants_a_compiled_model() -> None:
    run = pipeline.as_fx_pass(find_layers, "swat-u:0.9")
    assert run.__name__ == "find_layers"
    with pytest.raises(InputError, match=r"runs on a compiled model.*Sequential"):
        run(fx.symbolic_trace(plain()))


def test_to_networkx() -> None:
    gm = swatfx.compile(Residual(), "swat-u:0.9")
    graph = swatfx.to_networkx(gm)
    assert isinstance(graph, nx.DiGraph) and nx.is_directed_acyclic_graph(graph)
    assert len(graph) == len(gm.graph.nodes)
    edges = sum(len(n.all_input_nodes) for n in gm.graph.nodes)
    assert graph.number_of_edges() == edges
    named = {data["layer"] for _, data in graph.nodes(data=True)} - {None}
    assert named == set(all_plans(gm))
    key = {data["layer"]: k for k, data in graph.nodes(data=True) if data["layer"]}
    assert nx.has_path(graph, key["stem"], key["fc"])
    assert not nx.has_path(graph, key["block1.down"], key["block1.conv2"])


def test_to_networkx_spans_eager_parts() -> None:
    gm = swatfx.compile(EagerMiddle(), "swat-u:0.9")
    graph = swatfx.to_networkx(gm)
    key = {data["layer"]: k for k, data in graph.nodes(data=True) if data["layer"]}
    assert key["gate.a"][0].startswith("gate")
    for before, after in (("stem", "gate.a"), ("gate.a", "gate.b"), ("gate.b", "fc")):
        assert nx.has_path(graph, key[before], key[after])


def test_metadata_survives_what_torch_does_to_graphs() -> None:
    gm = swatfx.compile(Residual(), "swat-u:0.9")
    records = [meta.read(n) for n in gm.graph.nodes]
    assert [meta.read(n) for n in copy.deepcopy(gm).graph.nodes] == records
    again = fx.Transformer(gm).transform()
    ours = [meta.read(n) for n in again.graph.nodes if meta.read(n).role == "op"]
    assert ours == [r for r in records if r.role == "op"]


def test_verify_finds_a_layer_that_was_forgotten() -> None:
    gm = swatfx.compile(Residual(), "swat-u:0.9")
    node = next(n for n in gm.graph.nodes if meta.read(n).role == "op")
    with gm.graph.inserting_before(node):
        forgotten = gm.graph.call_function(torch.relu, (node.args[0],))
    meta.write(forgotten, meta.NodeRecord(plan=meta.read(node).plan, role="layer"))
    with pytest.raises(PassError, match=r"verify.*was not rewritten") as caught:
        verify(gm, Context(swatfx.swat_u(0.9)))
    assert caught.value.layer == "block1.conv1" and caught.value.node == forgotten.name
