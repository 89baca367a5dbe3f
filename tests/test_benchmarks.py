"""The runners in benchmarks/: their timers and files, and that each gives a sane result."""

from __future__ import annotations

import json
import math
import pathlib
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # benchmarks is not installed

import swatfx
from benchmarks import common, compile_cost, step_cost, step_sides, topk_cost
from swatfx import topk
from swatfx.density import Density
from swatfx.state import Threshold


@pytest.fixture(autouse=True)
def _one_thread_and_no_collection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Figures do not matter here: spare the time that threads and a large heap would take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("gc.collect", lambda *args: 0)
    yield
    torch.set_num_threads(before)


def test_spread_of_known_values() -> None:
    assert common.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == common.Spread(3.0, 1.0, 5.0, 2.0, 5)
    assert common.spread([7.0]) == common.Spread(7.0, 7.0, 7.0, 0.0, 1)
    with pytest.raises(ValueError, match="no values"):
        common.spread([])


def test_sides_take_turns_and_every_other_round_runs_backwards() -> None:
    calls: list[str] = []

    def side(name: str) -> common.Side:
        def run() -> dict[str, float]:
            calls.append(name)
            return {"seconds": float(len(calls))}

        return run

    ticks: list[None] = []
    sides = {name: side(name) for name in "abc"}
    rounds = common.alternate(sides, 3, warmup=1, tick=lambda: ticks.append(None))
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"
    assert len(ticks) == len(calls)
    assert rounds["a"]["seconds"] == [4.0, 9.0, 10.0]  # the warm-up is not recorded
    assert [len(rounds[name]["seconds"]) for name in "abc"] == [3, 3, 3]


def test_ratios_are_taken_round_by_round() -> None:
    rounds = {"a": {"seconds": [2.0, 20.0, 3.0]}, "b": {"seconds": [1.0, 10.0, 1.0]}}
    assert common.ratio(rounds, "a", "b")["median"] == 2.0
    assert common.ratio(rounds, "a", "b")["maximum"] == 3.0
    assert common.fastest(rounds, ["a", "b"]) == "b"


def test_growth_exponent() -> None:
    assert common.growth_exponent([10, 100, 1000], [3.0, 30.0, 300.0]) == pytest.approx(1)
    assert common.growth_exponent([2, 4, 8], [1.0, 4.0, 16.0]) == pytest.approx(2)


def test_a_result_file_is_whole_or_not_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results" / "r.json"
    common.write_result({"a": 1}, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        common.write_result({"a": math.nan}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_reader_never_meets_half_a_result(tmp_path: pathlib.Path) -> None:
    path, stop, seen = tmp_path / "r.json", threading.Event(), []
    common.write_result({"values": [0] * 5000}, path)

    def read() -> None:
        while not stop.is_set():
            seen.append(len(json.loads(path.read_text())["values"]))

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(20):
        common.write_result({"values": [index] * 5000}, path)
    stop.set()
    reader.join()
    assert set(seen) == {5000}


def test_nothing_recorded_names_a_folder_or_a_host(tmp_path: pathlib.Path) -> None:
    words = ["--output", str(tmp_path / "a b.json"), f"--output={tmp_path}/c.json", "--json"]
    text = common.command("x", words)
    assert text == "python -m benchmarks.x --output 'a b.json' --output=c.json --json"
    recorded = json.dumps([common.machine(), common.versions()])
    assert platform.node() not in json.loads(recorded)[0].values()
    assert str(pathlib.Path.home()) not in recorded
    assert set(common.versions()) == {
        "python",
        "torch",
        "torchvision",
        "numpy",
        "networkx",
        "numba",
        "swatfx",
    }


def test_the_tuned_allocator_is_set_and_the_default_one_is_bare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert "GLIBC_TUNABLES" not in common.worker_environment("default")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert common.worker_environment("tuned")["GLIBC_TUNABLES"] == common.TUNED
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    with pytest.raises(SystemExit, match="--allocator default"):
        common.worker_environment("tuned")


def _toy(measure: Callable[[Any], dict[str, Any]]) -> common.Benchmark:
    return common.Benchmark(
        "toy", "a toy", lambda parser: None, measure, lambda measured: (["x"], [[measured["x"]]])
    )


def test_a_full_run_writes_a_dated_file_and_a_quick_one_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "today", lambda: "2031-02-03")
    toy = _toy(lambda args: {"x": 1.5})
    common.run(toy, ["--quick"])
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert "2031-02-03  python -m benchmarks.toy --quick" in printed and "1.5" in printed
    common.run(toy, ["--allocator", "current", "--json"])
    written = json.loads((tmp_path / "2031-02-03-toy.json").read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert written["allocators"] == {"current": {"x": 1.5}}


def _run(
    module: ModuleType, capsys: pytest.CaptureFixture[str], *words: str, **parts: Any
) -> dict[str, Any]:
    assert common.run(module.BENCHMARK, ["--quick", "--json", "--repeats", "2", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar where there is no terminal
    result: dict[str, Any] = json.loads(captured.out)
    assert result["date"] == common.today() and result["quick"] is True
    assert result["command"].startswith(f"python -m {module.__name__} --quick")
    assert result["machine"]["threads"] >= 1
    assert common.render(module.BENCHMARK, result).count("\n") > 5
    measured: dict[str, Any] = result["allocators"]["current"]
    return measured


def _check_spread(values: dict[str, float]) -> None:
    assert set(values) == {"median", "minimum", "maximum", "iqr", "count"}
    assert 0 <= values["minimum"] <= values["median"] <= values["maximum"]
    assert values["count"] == 2 and values["iqr"] >= 0


def test_topk_cost(capsys: pytest.CaptureFixture[str]) -> None:
    measured = _run(topk_cost, capsys, "--sizes", "2000", "70000")
    assert [r["n"] for r in measured["sizes"]] == [2000, 70000]
    for result in measured["sizes"]:
        assert set(result["sides"]) == set(topk_cost.SEARCHES)
        assert set(result["ratios"]) == {"torch.topk", "torch.kthvalue"}
        for side in result["sides"].values():
            _check_spread(side["seconds"])
    assert measured["growth_exponents"]["kth_magnitude"]["from_1e6_median"] is None


@pytest.mark.parametrize("kind", ["normal", "relu", "equal"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_all_searches_find_the_same(kind: str, sparsity: float) -> None:
    scores = topk_cost.make_scores(kind, topk._SMALL + 5)
    density = Density.from_sparsity(sparsity)
    wanted = topk.kth_magnitude(scores, density)
    assert torch.equal(topk_cost.by_topk(scores, density), wanted)
    if sparsity:
        assert torch.equal(topk_cost.by_kthvalue(scores, density), wanted)


def test_compile_cost(capsys: pytest.CaptureFixture[str]) -> None:
    original = Threshold.recompute
    measured = _run(compile_cost, capsys, "--chain-lengths", "3", "6")
    assert Threshold.recompute is original
    names = ["digits/cnn", *(f"chain of {n} {k}+relu" for k in ("linear", "conv") for n in (3, 6))]
    assert [case["name"] for case in measured["cases"]] == names
    for case in measured["cases"]:
        assert case["fastest_fake"].startswith("trace+fake") and case["fastest"] in case["sides"]
        compiled = case["sides"]["swatfx.compile"]
        assert 0 < compiled["threshold_seconds"]["minimum"]
        assert compiled["net_seconds"]["maximum"] < compiled["seconds"]["maximum"]
        assert case["sides"]["swatfx.compile dense"]["threshold_seconds"]["maximum"] == 0
        assert case["nodes_compiled"] > case["nodes_traced"] > case["layers"]
        _check_spread(case["over_fake"])
    assert set(measured["chain_growth"]) == {"linear", "conv"}
    assert "fitted" in measured["chain_growth"]["conv"]["swatfx.compile"]


def test_compile_cost_counts_each_first_threshold_once() -> None:
    with compile_cost.threshold_clock() as spent:
        swatfx.compile(compile_cost.linear_chain(5), "swat-u:0.9")
    assert len(spent) == 4  # the first layer is dense


def test_step_cost(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--networks", "digits/cnn:4", "--memory-sides"]
    measured = _run(step_cost, capsys, *words)
    (result,) = measured["networks"]
    assert result["network"] == "digits/cnn" and result["input_shape"] == [4, 1, 8, 8]
    assert set(result["sides"]) == set(step_sides.SIDES) - {"model, compiled"}
    assert result["fastest_dense"] in step_sides.DENSE
    assert set(result["over_same_form"]) == set(step_sides.POLICY_DENSE)
    for values in (*result["over_fastest_dense"].values(), result["reference_over_torch_topk"]):
        _check_spread(values)
    assert result["memory"] == {}


def test_step_cost_weighs_a_side_in_its_own_process(capfd: pytest.CaptureFixture[str]) -> None:
    weight = step_cost._memory_of(step_sides.Network("digits/cnn", 4), "swat-u 90% P=1")
    assert 1e8 < weight["peak_rss_bytes"] < 1e10
    assert 0 < weight["saved_for_backward_bytes"] < 1e6
    assert capfd.readouterr().err == ""


def test_sides_start_alike_and_dense_policy_changes_nothing() -> None:
    network = step_sides.Network("digits/cnn", 4)
    model = compile_cost.models.create("digits/cnn")

    def losses(name: str) -> list[float]:
        trainer = step_sides.Trainer(network, step_sides.SIDES[name], model)
        return [trainer.step() for _ in range(3)]

    assert losses("policy dense, nchw") == losses("model, nchw")
    assert losses("swat-u 90% P=1, torch.topk") == losses("swat-u 90% P=1")
    assert losses("swat-u 90% P=1")[0] != losses("model, nchw")[0]


def test_saved_bytes_of_a_known_network() -> None:
    trainer = step_sides.Trainer(
        step_sides.Network("digits/cnn", 4), step_sides.SIDES["model, nchw"]
    )
    trainer.model = trainer.call = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Tanh()
    )
    # The batch [4, 64], tanh's output [4, 10], log-softmax's [4, 10], the target [4] and a total
    # weight []; the weight is a parameter.
    assert trainer.saved_bytes() == 4 * (4 * 64 + 4 * 10 + 4 * 10 + 1) + 8 * 4


@pytest.mark.parametrize("text", ["resnet50", "resnet50:0", "resnet50:x", "a:1:2:3"])
def test_a_network_that_cannot_be_read_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        common.run(step_cost.BENCHMARK, ["--networks", text])
    assert "NAME:BATCH" in capsys.readouterr().err
    assert step_cost.parse_network("resnet18:2:64").shape == (2, 3, 64, 64)
