"""Costs in an objective: those of the report, also at densities that nothing was compiled for."""

from __future__ import annotations

import pytest

import swatfx
from swatfx.compiled.layers import all_plans
from swatfx.costs.simulation import simulate
from swatfx.density import Density
from swatfx.errors import UnknownNameError
from swatfx.tuning.costs import cost, with_densities
from swatfx.tuning.search import tune
from tests.nets.tuning_nets import META, compiled, images, layers_of


def test_costs_are_those_of_the_report() -> None:
    _, gm = compiled("swat-u:0.8")
    report = swatfx.report(gm, META)
    found = cost(gm, META)
    assert found.fraction == pytest.approx(1 - report.totals["training_mac_reduction"])
    assert found.weight["stem"] == 2 * report.layers[0].dense_forward_macs
    last = report.layers[-1]
    assert found.activation["fc"] == last.sparse_weight_gradient_macs
    kept = cost(gm, (META,), "saved_bytes")
    assert kept.total == report.totals["saved_bytes"]
    assert kept.dense == report.totals["dense_saved_bytes"] and kept.rest > 0
    assert sum(kept.weight.values()) == 0
    cycles = cost(gm, META, "cycles:tensordash")
    step = simulate(gm, META, ["tensordash"]).totals["tensordash"]["step"]
    assert cycles.total == step["cycles"] and cycles.dense == step["own_dense_cycles"]
    assert cycles.rest == 0 and cycles.objective == "cycles:tensordash"


@pytest.mark.parametrize(
    ("objective", "nearest"),
    [("mac", "macs"), ("saved-bytes", "saved_bytes"), ("cycle:scnn", "cycles:scnn")],
)
def test_unknown_objectives_name_the_nearest(objective: str, nearest: str) -> None:
    _, gm = compiled()
    with pytest.raises(UnknownNameError, match=nearest):
        cost(gm, META, objective)
    with pytest.raises(UnknownNameError, match=nearest):
        tune(gm, images(), objective, budget=0.5)


def test_unknown_accelerators_name_the_nearest() -> None:
    _, gm = compiled()
    with pytest.raises(UnknownNameError, match="scnn"):
        tune(gm, images(), "cycles:scn", budget=0.5)


@pytest.mark.parametrize("objective", ["macs", "saved_bytes", "cycles:ideal"])
def test_other_densities_cost_what_a_policy_of_them_does(objective: str) -> None:
    model, gm = compiled("swat-u:0.5,first_dense=False")
    names = list(all_plans(gm))
    before = {name: layer.weight_density for name, layer in layers_of(gm).items()}
    density = Density.from_sparsity(0.8)
    twin = with_densities(gm, {name: (density, density) for name in names})
    wanted = cost(swatfx.compile(model, "swat-u:0.8,first_dense=False"), META, objective)
    assert cost(twin, META, objective) == wanted
    assert {name: layer.weight_density for name, layer in layers_of(gm).items()} == before
