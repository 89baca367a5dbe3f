"""The runners in benchmarks/: their timers and files, and that each gives a sane result."""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import swatfx
from benchmarks import common, compile_cost, export_sizes, small
from benchmarks import topk as topk_runner
from swatfx.compiled.state import Threshold
from swatfx.density import Density
from swatfx.selectors import topk
from tests.nets.runners import check_result, check_spread, run_quick

pytestmark = pytest.mark.usefixtures("spare_time")


def test_spread_of_known_values() -> None:
    assert common.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == common.Spread(
        3.0, 1.0, 5.0, 2.0, 4.0, 2.0, 5
    )
    assert common.spread([7.0]) == common.Spread(7.0, 7.0, 7.0, 7.0, 7.0, 0.0, 1)
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


def test_geometric_mean_and_targets() -> None:
    assert common.geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4)
    assert common.against(2.0, 2.0)["met"] and not common.against(2.0, 1.9)["met"]


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
    words += ["--data", str(tmp_path / "d.npz"), f"--partial={tmp_path}/p"]
    text = common.command("x", words)
    assert text == (
        "python -m benchmarks.x --output 'a b.json' --output=c.json --json --data d.npz --partial=p"
    )
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


def test_topk(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sizes", "2000", "70000", "--densities", "0.2"]
    measured = run_quick(topk_runner, capsys, *words)
    cases = [(c["n"], c["data"], c["density"]) for c in measured["cases"]]
    assert cases == [(n, kind, 0.2) for n in (2000, 70000) for kind in ("normal", "relu")]
    for case in measured["cases"]:
        assert list(case["sides"]) == list(case["over_copy"])
        assert set(case["over_copy"]["copy_"].values()) == {1.0, 0.0, 2}
        for side in case["sides"].values():
            check_spread(side["seconds"])
    assert measured["growth_exponents"] == {} and measured["targets"] == []


def test_small(capsys: pytest.CaptureFixture[str]) -> None:
    (network,) = run_quick(small, capsys)["networks"]
    assert network["network"] == "resnet50/8"
    ours = [side for side in network["sides"] if side != small.DENSE]
    assert [side.rpartition(" ")[2] for side in ours] == list(small.KERNELS)
    for ratios in network["overhead"].values():
        assert list(ratios) == ours
        for values in ratios.values():
            check_spread(values)


def test_export_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    (network,) = run_quick(export_sizes, capsys, "--runtimes", "torch")["networks"]
    sizes = network["bytes"]
    assert [side.removesuffix(", torch") for side in sizes] == list(export_sizes._forms(0.9))
    assert sizes["packed, torch"] < 0.6 * sizes["dense fp32, torch"]
    assert sizes["packed int8, torch"] < sizes["packed, torch"] < sizes["2:4 packed, torch"]
    for batch in network["batches"].values():
        assert list(batch["sides"]) == list(batch["dense_over"])
        assert set(batch["sides"]) - set(sizes) == {"frozen", "frozen bf16"}
        check_spread(batch["dense_over"]["shrunk, torch"])


@pytest.mark.slow
def test_export_sizes_of_onnx(capsys: pytest.CaptureFixture[str]) -> None:
    (network,) = run_quick(export_sizes, capsys, "--runtimes", "torch", "onnxruntime")["networks"]
    assert sum(side.endswith("onnxruntime") for side in network["bytes"]) == 5


def test_topk_targets_and_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_runner, "_TARGET_SIZE", 3000)
    monkeypatch.setattr(topk_runner, "_ASYMPTOTIC", 1000)
    words = ["--quick", "--repeats", "1", "--sizes", "500", "1000", "3000", "--data", "equal"]
    measured = topk_runner.measure(common._parser(topk_runner.BENCHMARK).parse_args(words))
    assert [(t["n"], t["density"], t["side"], t["at_most"]) for t in measured["targets"]] == [
        (3000, density, *target) for density in (0.1, 0.2) for target in topk_runner.TARGETS.items()
    ]
    assert all(t["met"] == (t["measured"] <= t["at_most"]) for t in measured["targets"])
    assert set(measured["growth_exponents"]) == set(measured["cases"][0]["sides"])


@pytest.mark.parametrize("kind", ["normal", "relu", "equal"])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_all_searches_find_the_same(kind: str, sparsity: float) -> None:
    x = topk_runner.make_values(kind, topk._SMALL + 5)
    density = Density.from_sparsity(sparsity)
    topk_runner.check(x, density)
    wanted = topk.kth_magnitude(x.abs(), density)
    assert torch.equal(topk_runner.by_topk(x.abs(), density), wanted)
    assert torch.equal(topk_runner.by_kthvalue(x.abs(), density), wanted)
    assert torch.equal(topk_runner.threshold(x, density), wanted)


def test_results_that_disagree_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_runner, "by_topk", lambda scores, density: scores.max())
    with pytest.raises(SystemExit, match="disagree at n = 1000"):
        topk_runner.check(topk_runner.make_values("normal", 1000), Density(0.1))


def test_compile_cost(capsys: pytest.CaptureFixture[str]) -> None:
    original = Threshold.recompute
    measured = run_quick(compile_cost, capsys, "--chain-lengths", "3", "6")
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
        check_spread(case["over_fake"])
    assert set(measured["chain_growth"]) == {"linear", "conv"}
    assert "fitted" in measured["chain_growth"]["conv"]["swatfx.compile"]


def test_compile_cost_counts_each_first_threshold_once() -> None:
    with compile_cost.threshold_clock() as spent:
        swatfx.compile(compile_cost.linear_chain(5), "swat-u:0.9")
    assert len(spent) == 4  # the first layer is dense


_QUICKLY = {
    "layers": ["--sparsities", "0.9"],
    "patterns": ["--selectors", "block-4x1"],
    "step": ["--budget-steps", "1"],
    "memory": ["--sides", "dense channels_last", "exact"],
    "accuracy": ["--sides", "dense", "reference kernels", "--seeds", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _QUICKLY)
def test_a_runner_from_the_command_line_under_the_tuned_allocator(name: str) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the tuned allocator is glibc's")
    words = ["--quick", "--json", "--repeats", "2", "--allocator", "tuned", *_QUICKLY[name]]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *words],
        cwd=common.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    module = importlib.import_module(f"benchmarks.{name}")
    check_result(module, done.stdout, "tuned")
    assert done.stderr == ""
