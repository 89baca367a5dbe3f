"""benchmarks.step: its sides, its time budgets, and what it says of them."""

from __future__ import annotations

import argparse
from gc import collect  # by itself: `spare_time` replaces the module's
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import common, op_times, step
from benchmarks.sides import (
    DENSE,
    FORMS,
    Network,
    Predictor,
    StepSide,
    Trainer,
    exact_twin,
    parse_network,
    policy_sides,
)
from swatfx import models
from swatfx.timing.steps import failure
from tests.nets.runners import check_spread, run_quick

pytestmark = pytest.mark.usefixtures("spare_time")
_DIGITS = Network("digits/cnn", 4)
_SWAT = "swat-u:0.9,period=1"


def test_step(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "digits/cnn:4", "--budget-steps", "1", "--inference-batches", "1"]
    measured = run_quick(step, capsys, *words)
    (result,) = measured["networks"]
    assert result["network"] == "digits/cnn" and result["input_shape"] == [4, 1, 8, 8]
    names = {"dense nchw", "dense channels_last", *step._QUICK_POLICIES}
    policies = {f"{p}{d}" for p in step._QUICK_POLICIES for d in ("", " bf16")}
    assert set(result["sides"]) == names | {f"{name} bf16" for name in names}
    assert result["fastest_dense"].removesuffix(" bf16") in DENSE and result["unavailable"] == {}
    assert set(result["speedups"]) == set(result["same_dtype"]) == policies
    for name, values in result["same_dtype"].items():
        assert values["over"].endswith("bf16") == name.endswith("bf16")
    for values in result["speedups"].values():
        check_spread(values)
        assert values["minimum"] > 0
    assert set(result["targets"]) == {p for p in policies if not p.startswith("dense")}
    for name, target in result["targets"].items():
        assert target["wanted"] == (1.8 if name.endswith("bf16") else 2.2)
    for name in ("dense channels_last", "dense channels_last bf16", *policies):
        kinds = result["time_budgets"][name]["kinds"]
        assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
        assert ("thresholds" in kinds) == (name in result["targets"])
    (inference,) = result["inference"]
    assert inference["input_shape"] == [1, 1, 8, 8]
    assert set(inference["speedups"]) == {"swat-u:0.9", "swat-u:0.9 bf16"}


def test_steps_with_codes_stand_beside_exact_ones(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "digits/cnn:4", "--policies", _SWAT, "--norm-saves", "exact", "int8"]
    words += ["--dense-forms", "nchw", "--budget-steps", "1", "--inference-batches"]
    (result,) = run_quick(step, capsys, *words)["networks"]
    coded = {f"{_SWAT} int8", f"{_SWAT} int8 bf16"}
    both = {_SWAT, f"{_SWAT} bf16", *coded}
    assert set(result["sides"]) == {"dense nchw", "dense nchw bf16", *both}
    assert set(result["over_exact"]) == coded
    for name, values in result["over_exact"].items():
        assert name.replace(" int8", "") == values.pop("over") and values.pop("wanted") == 1.05
        check_spread(values)
        assert values["minimum"] > 0
    headers, rows = step.table({"networks": [result]})
    lost = {row[2] for row in rows if row[headers.index("time over exact [min, max]")]}
    assert lost == coded


def test_time_over_exact_is_of_two_that_differ_in_nothing_else() -> None:
    named = policy_sides(["swat-u:0.9", "swat-u:0.8"], "nchw", ["exact", "int4"])
    twins = {name: exact_twin(name, named) for name in named}
    assert twins == {
        "swat-u:0.9": None,
        "swat-u:0.9 int4": "swat-u:0.9",
        "swat-u:0.8": None,
        "swat-u:0.8 int4": "swat-u:0.8",
    }
    alone = policy_sides(["swat-u:0.9"], "nchw", ["int4"])
    assert exact_twin("swat-u:0.9 int4", alone) is None
    models_of = {n: Trainer(_DIGITS, side).model for n, side in named.items()}
    assert {n: m.swat.options.norm_saves for n, m in models_of.items()} == {  # type: ignore[union-attr]
        n: "int4" if n.endswith("int4") else "exact" for n in named
    }


def test_sides_start_alike_and_the_dense_policy_changes_nothing() -> None:
    model = models.create("digits/cnn")

    def losses(side: StepSide) -> list[float]:
        trainer = Trainer(_DIGITS, side, model)
        return [trainer.step() for _ in range(3)]

    dense = losses(DENSE["dense nchw"])
    sides = policy_sides(["dense", _SWAT], "nchw")
    assert losses(sides["dense"]) == dense
    assert losses(sides[_SWAT])[0] != dense[0]
    assert Predictor(_DIGITS, DENSE["dense nchw"], model).predict().shape == (4, 10)


def test_saved_bytes_of_a_known_network() -> None:
    trainer = Trainer(_DIGITS, DENSE["dense nchw"])
    trainer.model = trainer.call = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)
    )
    # The batch [4, 64], tanh's output [4, 10], log-softmax's [4, 10], the target [4] and a total
    # weight []; of the parameters, the second weight alone: the batch wants no gradient.
    without = 4 * (4 * 64 + 4 * 10 + 4 * 10 + 1) + 8 * 4
    assert trainer.saved_bytes() == {
        "saved_bytes": without,
        "saved_bytes_with_parameters": without + 4 * 100,
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_saved_bytes_under_torch_compile_are_those_that_stay_allocated() -> None:
    from torch.profiler import ProfilerActivity, profile

    network = Network("cifar/resnet20", 4)
    for budget in (None, 0.3):
        torch._dynamo.reset()
        trainer = Trainer(network, StepSide("compiled", budget=budget))
        for _ in range(2):
            trainer.step()
        saved = trainer.saved_bytes()["saved_bytes"]
        collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = trainer.loss()
        events: Any = profiler.profiler
        allocated = sum(
            e.nbytes() for e in events.kineto_results.events() if e.name() == "[memory]"
        )
        # Kept, but not allocated by forward: the batch and its labels.
        given = trainer.x.nbytes + trainer.y.nbytes
        assert allocated == saved - given + loss.nbytes
        del loss  # or it would be freed while the next one is watched


@pytest.mark.parametrize("text", ["resnet50:0", "resnet50:x", "a:1:2:3", "a:1:-2"])
def test_a_network_that_cannot_be_read_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        common.run(step.BENCHMARK, ["--model", text])
    assert "NAME[:BATCH[:SIDE]]" in capsys.readouterr().err


def test_a_policy_that_cannot_be_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        common.run(step.BENCHMARK, ["--policies", "swat-x:0.9"])
    assert "swat-u" in capsys.readouterr().err


def test_networks_are_read_with_their_batches() -> None:
    assert parse_network("resnet18:2:64").shape == (2, 3, 64, 64)
    assert parse_network("resnet50") == Network("resnet50", 16)
    assert parse_network("cifar/resnet18") == Network("cifar/resnet18", 128)
    assert str(Network("resnet18", 2, 64)) == "resnet18:2:64"


def test_a_refresh_among_the_steps_measured_is_refused() -> None:
    for period, iterations in ((1000, {0}), (2, {4})):
        name = f"swat-u:0.9,period={period}"
        trainer = Trainer(_DIGITS, StepSide("nchw", name))
        for _ in range(5):
            trainer.step()
        assert trainer.refreshed_at() == iterations
        if period == 2:
            with pytest.raises(SystemExit, match="recomputed"):
                step._check_refreshes(name, trainer)
        else:
            step._check_refreshes(name, trainer)


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("swat-u:0.9", (2.2, 1.8)),
        ("swat-u:0.95,period=1000", (3.0, 2.3)),
        ("swat-u:0.5", (1 / 1.1, None)),
        ("swat-u:0.7,weight_selector=input-channel", (1.8, None)),
        ("swat-u:0.9,weight_selector=channel", (None, None)),
        ("swat-erk:0.9", (None, None)),
        ("dense", (None, None)),
        (None, (None, None)),
    ],
)
def test_targets(policy: str | None, wanted: tuple[float | None, float | None]) -> None:
    dtypes = None, torch.bfloat16
    assert tuple(step.target(StepSide("nchw", policy, dtype=d)) for d in dtypes) == wanted


@pytest.mark.parametrize(
    ("phase", "op", "kind"),
    [
        ("forward", "swatfx::conv", "sparse convolution, forward"),
        ("backward", "swatfx::conv_backward", "sparse convolution, backward"),
        ("forward", "swatfx::refresh", "thresholds"),
        ("forward", "swatfx::pack", "packing"),
        ("forward", "swatfx::batch_norm", "batch norm"),
        ("backward", "swatfx::relu_backward", "ReLU"),
        ("forward", "swatfx::max_pool2d", "pooling"),
        ("forward", "swatfx::to_layout", "copies and layout"),
        ("backward", "aten::native_batch_norm_backward", "batch norm"),
        ("backward", "aten::threshold_backward", "ReLU"),
        ("backward", "aten::max_pool2d_with_indices_backward", "pooling"),
        ("forward", "aten::convolution", "dense convolution, forward"),
        ("backward", "aten::convolution_backward", "dense convolution, backward"),
        ("backward", "aten::mm", "linear"),
        ("optimizer", "aten::add_", "optimizer"),
        ("forward", "aten::add", "additions"),
        ("forward", "aten::gelu", "other"),
    ],
)
def test_kinds_of_ops(phase: str, op: str, kind: str) -> None:
    assert op_times.kind_of(phase, op) == kind


def test_an_op_of_ours_is_timed_as_one() -> None:
    trainer = Trainer(_DIGITS, StepSide("nchw", _SWAT))
    with op_times.OpTimes() as times:
        trainer.step(times.set_phase)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in trainer.model.modules())
    assert times.calls["forward", "swatfx::conv"] == convolutions - 1
    assert times.calls["backward", "swatfx::conv_backward"] == convolutions - 1
    assert times.calls["forward", "aten::convolution"] == 1  # the first layer is dense
    assert any(phase == "optimizer" for phase, _ in times.calls)
    assert all(seconds > 0 for seconds in times.seconds.values())


def test_a_side_that_needs_a_keyword_yet_unknown_says_so() -> None:
    assert StepSide("nchw", "dense", {"example_inputs": None}).missing() is None
    reason = StepSide("nchw", "dense", {"no_such_keyword": 1}).missing()
    assert reason == "swatfx.compile takes no no_such_keyword"


def test_a_compiler_that_fails_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        def call(*inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler\nhere is more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    options = {"norm_saves": ["exact"], "dense_forms": list(FORMS), "dtypes": ["fp32", "bf16"]}
    args = argparse.Namespace(form="nchw", budget_steps=1, quick=False, **options)
    result = step.train(_DIGITS, [_SWAT], args, 1, lambda: None)
    why = "RuntimeError: no C++ compiler"
    assert result["unavailable"] == {"dense compiled": why, "dense compiled bf16": why}
    assert "compiled" not in result["fastest_dense"]
    assert failure(lambda: None) is None
