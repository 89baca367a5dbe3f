"""Cycles on compiled models: masks, totals, traffic, traces, sweeps, and the paper's table 6."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import swatfx
from swatfx import accelerators
from swatfx.accelerators import Accelerator, Count, Ideal
from swatfx.accelerators.options import SimulationOptions
from swatfx.accelerators.traffic import Traffic, operand_bytes
from swatfx.cli import commands as cli
from swatfx.cli.simulate import sweep_values
from swatfx.compiled.layers import sparse_layers
from swatfx.costs.perfetto import trace_events
from swatfx.costs.simulation import PASSES, simulate
from swatfx.errors import InputError, UnknownNameError
from swatfx.paper.table6 import table6_trained

torch.set_num_threads(1)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


def compiled(policy: str = "swat-u:0.5") -> Any:
    torch.manual_seed(0)
    return swatfx.compile(small(), policy)


def batch(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_cycles_are_those_of_the_real_masks() -> None:
    gm = compiled()
    found = simulate(gm, batch(), [Ideal(multipliers=4)])
    layer = next(lay for lay in sparse_layers(gm) if lay.plan.name == "2")
    with torch.no_grad():
        inner = torch.relu(gm.get_submodule("0")(batch()))
    expected = Ideal(multipliers=4).conv_cycles(
        layer.keep().numpy(),
        (inner[0] != 0).numpy(),
        input_hw=(8, 8),
        stride=2,
        padding=1,
        groups=2,
    )
    row = next(r for r in found.rows if r.layer == "2" and r.stage == "forward")
    assert row.cycles == expected.cycles
    assert row.dense_cycles == expected.dense_cycles
    assert row.utilisation == pytest.approx(expected.utilisation)
    assert row.masks == "weights as they are, activations seen"


def test_the_weight_gradient_sees_what_was_packed() -> None:
    gm = compiled("swat-u:0.8")
    found = simulate(gm, batch(), [Ideal(multipliers=1)])
    rows = {(r.layer, r.stage): r for r in found.rows}
    keeps = []
    gm.train()
    with swatfx.observe(gm) as seen:
        gm(batch())
    keeps.append(seen.activation_density["5"])
    row = rows["5", "weight_gradient"]
    # One multiplier: cycles are products. 5 filters meet every kept input of the first sample.
    assert row.cycles % 5 == 0
    assert 0 < row.cycles / 5 <= 96 * max(keeps) * 2


def test_no_input_gradient_at_the_first_layer_and_totals_add_up() -> None:
    found = simulate(compiled(), batch(), ["scnn", "bit-tactical"])
    stages = {(r.layer, r.stage) for r in found.rows}
    assert ("0", "input_gradient") not in stages
    assert {("0", "forward"), ("0", "weight_gradient"), ("2", "input_gradient")} <= stages
    for name, totals in found.totals.items():
        mine = [r for r in found.rows if r.accelerator == name]
        assert totals["step"]["cycles"] == sum(r.cycles for r in mine)
        assert totals["step"]["cycles"] == sum(totals[stage]["cycles"] for stage in PASSES)
        assert 0 < totals["step"]["utilisation"] <= 1


def test_meta_inputs_draw_masks_at_the_planned_density_by_seed() -> None:
    with torch.device("meta"):
        gm = swatfx.compile(small(), "swat-u:0.75")
    x = torch.empty(1, 3, 8, 8, device="meta")

    def cycles(seed: int) -> dict[tuple[str, str], float]:
        found = simulate(gm, x, [Ideal(multipliers=1)], options=SimulationOptions(seed=seed))
        assert all("drawn" in r.masks or "dense" in r.masks for r in found.rows)
        return {(r.layer, r.stage): r.cycles for r in found.rows}

    assert cycles(0) == cycles(0)
    assert cycles(0) != cycles(1)
    # 5 x 96 weights at a quarter meet a dense output gradient of one position.
    assert cycles(0)["5", "input_gradient"] == 120


def test_samples_give_a_mean_and_its_error() -> None:
    gm = compiled()
    one = [simulate(gm, batch(3)[i : i + 1], ["cnvlutin"]) for i in range(3)]
    three = simulate(gm, batch(3), ["cnvlutin"], options=SimulationOptions(samples=3))
    first = [s.rows[0].cycles for s in one]
    assert three.samples == 3
    assert three.rows[0].cycles == pytest.approx(np.mean(first))
    error = np.std(first, ddof=1) / np.sqrt(3)
    assert three.rows[0].standard_error == pytest.approx(error)


def test_calls_of_one_layer_add_up() -> None:
    class Loop(nn.Module):
        """Calls one layer as often as it is told to; its forward stays Python."""

        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                x = self.layer(x) if x.sum() < 1e9 else x
            return x

    def cycles(times: int) -> float:
        torch.manual_seed(0)
        gm = swatfx.compile(Loop(times), swatfx.swat_u(0.5, first_dense=False))
        found = simulate(gm, torch.ones(2, 6), ["dense-tile"], options=SimulationOptions(samples=2))
        assert found.samples == 2
        return next(r.cycles for r in found.rows if r.stage == "forward")

    assert cycles(3) == 3 * cycles(1)


def test_memory_can_bound_a_layer() -> None:
    gm = compiled()
    free = simulate(gm, batch(1), ["scnn"])
    slow = simulate(gm, batch(1), ["scnn"], options=SimulationOptions(bandwidth=0.01))
    assert all(r.memory_cycles == 0 for r in free.rows)
    for r in slow.rows:
        assert r.cycles == r.memory_cycles == np.ceil(r.moved_bytes / 0.01)
        assert r.limit == "memory"
        assert r.moved_bytes != r.dense_bytes


def test_traffic_by_hand() -> None:
    assert operand_bytes(100, 10, 2) == (200, 33)  # 20 bytes of values, 13 of mask
    traffic = Traffic(200, 80, 40, 33, 45)
    assert traffic.moved(()) == 320
    assert traffic.moved(("weights",)) == 153
    assert traffic.moved(("weights", "activations")) == 118
    assert traffic.cycles((), 0) == 0
    assert traffic.cycles((), 100) == 4


def test_what_no_design_can_run_is_said() -> None:
    gm = swatfx.compile(
        nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 3)), swatfx.swat_u(0.5, first_dense=False)
    )
    found = simulate(gm, torch.randn(1, 1, 6, 6, 6), ["ideal"])
    assert set(found.skipped) == {"0", "1"}
    assert "two-dimensional" in found.skipped["0"]
    assert "two-dimensional" in found.to_text()


def test_report_takes_accelerators_and_nothing_changes() -> None:
    gm = compiled()
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    report = swatfx.report(gm, (batch(),), accelerators=["scnn", Ideal()])
    assert report.simulation is not None and "scnn" in report.to_text()
    assert json.loads(report.to_json())["simulation"]["totals"]["scnn"]["step"]["cycles"] > 0
    assert all(torch.equal(before[k], v) for k, v in gm.state_dict().items())
    with pytest.raises(UnknownNameError, match="scnn"):
        swatfx.report(gm, (batch(),), accelerators=["scn"])
    with pytest.raises(InputError, match="no accelerator"):
        simulate(gm, batch(), [])


def test_a_design_of_ones_own() -> None:
    @dataclass(frozen=True)
    class Wall(Accelerator):
        """One product a cycle, zeros and all."""

        @property
        def multipliers(self) -> int:
            return 1

        def run(self, problem: Any, weights: Any, activations: Any) -> Count:
            return Count(problem.dense_multiplications)

    accelerators.register("wall", Wall)
    try:
        found = simulate(compiled(), batch(), ["wall"])
        row = next(r for r in found.rows if r.layer == "5" and r.stage == "forward")
        assert row.cycles == row.own_dense_cycles == 96 * 5
    finally:
        del accelerators.ACCELERATORS["wall"]


def test_the_trace_is_a_timeline() -> None:
    found = simulate(compiled(), batch(), ["scnn", "ideal"])
    events = json.loads(json.dumps(trace_events(found)))["traceEvents"]
    for process, name in enumerate(found.totals, start=1):
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == process]
        assert len(slices) == sum(r.accelerator == name for r in found.rows)
        ends = [e["ts"] + e["dur"] for e in slices]
        assert [e["ts"] for e in slices[1:]] == ends[:-1]
        assert ends[-1] == found.totals[name]["step"]["cycles"]
        assert {e["tid"] for e in slices} == {1, 2, 3}
    counters = [e for e in events if e["ph"] == "C"]
    assert counters and all(0 <= e["args"]["utilisation %"] <= 100 for e in counters)


def test_sweep_values() -> None:
    assert sweep_values("lookahead=1..3") == ("lookahead", [1, 2, 3])
    assert sweep_values("natural-density=0.5,1.0") == ("natural_density", [0.5, 1.0])
    for wrong in ("lookahead", "lookahead=", "lookahead=a..b", "lookahead=3..1"):
        with pytest.raises(InputError, match="sweep"):
            sweep_values(wrong)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    trace = tmp_path / "trace.json"
    options = ["simulate", "digits/cnn", "--policy", "swat-u:0.9", "--accelerator", "scnn"]
    assert cli.main([*options, "--json", "--trace", str(trace)]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["totals"]["scnn"]["forward"]["cycles"] > 0
    assert json.loads(trace.read_text())["traceEvents"]
    assert cli.main([*options, "--sweep", "sparsity=0.0,0.9", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    step = {r["sparsity"]: r["cycles"] for r in rows if r["pass"] == "forward"}
    assert step[0.9] < step[0.0]
    assert cli.main([*options, "--sweep", "batch=1,2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    step = {r["batch"]: r["cycles"] for r in rows if r["pass"] == "forward"}
    assert 1.5 < step[2] / step[1] < 2.5
    bad = ["simulate", "digits/cnn", "--accelerator", "bit-tactical", "--sweep", "lookhead=1..2"]
    assert cli.main(bad) == 1
    assert "lookhead" in capsys.readouterr().err


def test_table6_on_trained_weights(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    folder = str(tmp_path / "run")
    train = ["train", "--model", "digits/cnn", "--data", "digits", "--policy", "swat-u:0.8"]
    train += ["--epochs", "1", "--limit", "128", "--output-dir", folder, "--quiet"]
    assert cli.main(train) == 0
    table = ["simulate", "digits/cnn", "--table6", "--checkpoint", f"{folder}/checkpoint.ckpt"]
    assert cli.main([*table, "--data", "digits", "--samples", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["accelerator"] for r in rows] == ["scnn", "bit-tactical"]
    assert all("trained weights" in r["masks"] and r["forward"] > 1 for r in rows)
    assert cli.main([*table, "--data", "digits", "--samples", "2"]) == 0
    told = capsys.readouterr().out
    assert "input gradient alone" in told and "whole step" in told and "weight gradient" in told
    assert cli.main(table) == 1


def test_table6_shows_the_whole_step() -> None:
    """Sums over layers and passes of one simulation, over the design's own dense run."""
    gm = swatfx.compile(swatfx.models.create("digits/cnn"), "swat-u:0.9")
    x = torch.randn(1, 1, 8, 8)
    found = simulate(gm, x, ["scnn"])
    (row,) = table6_trained(gm, (x,), 0.9, ["scnn"])
    convolutions = {x.name for x in swatfx.report(gm, x).layers if x.kind.startswith("conv")}
    rows = [r for r in found.rows if r.layer in convolutions]
    dense, cycles = (sum(getattr(r, f) for r in rows) for f in ("own_dense_cycles", "cycles"))
    assert row.step == pytest.approx(dense / cycles)
    weight = [r for r in rows if r.stage == "weight_gradient"]
    assert row.weight_gradient == pytest.approx(
        sum(r.own_dense_cycles for r in weight) / sum(r.cycles for r in weight)
    )


@pytest.mark.slow
def test_table6_is_consistent_with_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--table6", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    ours = {(r["accelerator"], r["sparsity"]): r for r in rows}
    for sparsity, paper in ((0.8, (3.3, 3.4)), (0.9, (5.6, 6.3))):
        row = ours["scnn", sparsity]
        assert (row["forward"], row["backward"]) == pytest.approx(paper, rel=0.05)
        assert row["consistent"] is True
        assert ours["bit-tactical", sparsity]["consistent"] is False
        assert ours["bit-tactical", sparsity]["forward"] <= 3
        # The weight gradient, which the paper leaves out, is where the step's time goes.
        assert 1 < row["weight_gradient"] <= row["step"] * 1.01 < row["forward"] / 2
