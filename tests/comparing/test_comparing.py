"""Comparisons: the same figures as reports, averages where densities move, and how they print."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import swatfx
from swatfx import models, per_layer, swat_u
from swatfx.comparing import table as comparing
from swatfx.comparing.rows import Comparison, Row
from swatfx.comparing.runs import Run, Trained
from swatfx.comparing.table import compare
from swatfx.errors import InputError, PolicyError, UnknownNameError
from tests.nets import small_nets

X = torch.empty(4, 1, 8, 8, device="meta")
TRAIN = {"data": "digits", "epochs": 2, "limit": 64, "device": "cpu", "threads": 1}


def _report(policy: Any, **options: Any) -> swatfx.Report:
    gm = swatfx.compile(models.resolve_on_meta("digits/cnn"), policy)
    return swatfx.report(gm, X, **options)


@pytest.mark.parametrize("accounting", ["paper", "exact"])
def test_figures_are_those_of_the_report(accounting: str) -> None:
    texts = ["swat-u:0.9", "swat-erk:0.8,period=7", "saw:0.9", "meprop:0.9", "dense"]
    found = compare("digits/cnn", texts, X, accounting=accounting, activation_floor=0.3)
    assert [row.policy for row in found.rows] == texts
    for row in found.rows:
        totals = _report(row.policy, accounting=accounting, activation_floor=0.3).totals
        for name in (
            "weight_sparsity",
            "activation_sparsity",
            "training_mac_reduction",
            "inference_mac_reduction",
            "activation_reduction",
            "saved_bytes",
            "dense_saved_bytes",
        ):
            assert getattr(row, name) == totals[name], (row.policy, name)
        assert row.densities == "fixed" and row.runs == () and row.accuracy_mean is None
    assert found.accounting == accounting and found.training == {}


def test_compression_counts_the_weights_of_the_trained_network() -> None:
    found = compare("digits/cnn", ["swat-u:0.9", "swat-erk:0.9", "saw:0.9", "meprop:0.9"], X)
    unstructured, erk, saw, meprop = (row.model_compression for row in found.rows)
    sizes = [p.numel() for p in models.create("digits/cnn").parameters() if p.dim() > 1]
    stay = sizes[0] + sum(sizes[1:]) / 10  # the first layer is dense
    assert unstructured == pytest.approx(sum(sizes) / stay, rel=1e-9)
    assert erk == pytest.approx(10, rel=1e-6)
    assert saw == meprop == 1.0  # their networks are dense
    assert found.rows[2].weight_sparsity > 0.8


def test_baselines_have_default_activations() -> None:
    """The paper's accounting: forward and input gradient at the weights', the rest at one half."""
    (row,) = compare("digits/cnn", ["static:0.9,distribution=uniform"], X).rows
    assert row.activation_sparsity is None and row.activation_reduction is None
    totals = _report("dense").totals
    forward, inputs, weights = (
        totals[f"dense_{name}_macs"] for name in ("forward", "input_gradient", "weight_gradient")
    )
    expected = 1 - (0.1 * (forward + inputs) + 0.5 * weights) / (forward + inputs + weights)
    assert row.training_mac_reduction == pytest.approx(expected, abs=1e-6)
    assert row.inference_mac_reduction == pytest.approx(0.9, abs=1e-6)
    (mixed,) = compare("digits/cnn", [per_layer({"fc": "static:0.9"}, "swat-u:0.9")], X).rows
    assert mixed.activation_sparsity is not None  # some layers' are sparse


def _residual() -> small_nets.Residual:
    torch.manual_seed(5)
    return small_nets.Residual()


def test_the_order_of_policies_does_not_matter() -> None:
    texts = ["static:0.9", "swat-u:0.9", "snfs:0.8", "gradual-magnitude:0.9"]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    there = compare(_residual, texts, x, accounting="exact").rows
    back = compare(_residual, texts[::-1], x, accounting="exact").rows
    assert [row.policy for row in there] == texts
    assert there == back[::-1]


def test_a_network_of_ones_own_and_names_of_ones_own() -> None:
    x = torch.empty(2, 3, 8, 8, device="meta")
    chosen = {"plain": swat_u(0.9), "rare": "swat-u:0.9,period=100", "all": swat_u(0.9, period=2)}
    found = compare(small_nets.Residual, chosen, [x])
    assert [row.policy for row in found.rows] == ["plain", "rare", "all"]
    assert found.model == "Residual" and found.input_shapes == ((2, 3, 8, 8),)
    listed = compare(small_nets.Residual, [swat_u(0.9), swatfx.dense()], x)
    assert [row.policy for row in listed.rows] == ["swat-u:0.9", "dense"]
    assert listed.rows[0].saved_bytes == found.rows[0].saved_bytes
    assert compare(small_nets.Residual, "dense", x).rows == listed.rows[1:]


def test_compile_options_count() -> None:
    exact = compare("cifar/resnet20", "swat-u:0.9", torch.empty(8, 3, 32, 32, device="meta"))
    small = compare(
        "cifar/resnet20",
        "swat-u:0.9",
        torch.empty(8, 3, 32, 32, device="meta"),
        compile_options={"norm_saves": "int8", "value_dtype": "bf16"},
    )
    assert small.rows[0].saved_bytes < 0.7 * exact.rows[0].saved_bytes
    assert small.rows[0].dense_saved_bytes == exact.rows[0].dense_saved_bytes


@pytest.mark.parametrize("policy", ["swat-m:0.8", "gradual-magnitude:0.8", "snfs:0.8"])
def test_planned_densities_where_nothing_is_trained(policy: str) -> None:
    found = compare("digits/cnn", [policy, "swat-u:0.8"], X)
    row = found.rows[0]
    assert row.densities == "planned"
    assert row.weight_sparsity == pytest.approx(0.8, abs=0.01)
    assert f"{policy}*" in found.to_text() and "planned ones" in found.to_text()
    assert "swat-u:0.8*" not in found.to_text()


def _pretend(monkeypatch: pytest.MonkeyPatch, runs: Sequence[Trained]) -> None:
    def train(config: Any, policies: Any, seeds: Any, folder: Any, tell: Any) -> Any:
        assert list(seeds) == list(range(len(runs)))
        return {name: list(runs) for name in policies}

    monkeypatch.setattr(comparing.comparing_runs, "train_policies", train)


LAYERS = tuple(layer.name for layer in _report("dense").layers)


def _epoch(first: float, rest: float) -> dict[str, float]:
    return dict.fromkeys(LAYERS[1:], rest) | {LAYERS[0]: first}


@pytest.mark.parametrize("policy", ["swat-m:0.8", "snfs:0.8", "dst"])
def test_densities_that_moved_are_averaged_over_training(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    runs = [
        Trained(Run(0, 0.9, 0.95, 10.0), (_epoch(1.0, 0.4), _epoch(0.8, 0.2))),
        Trained(Run(1, 0.8, 0.85, 14.0), (_epoch(0.6, 0.4), _epoch(0.4, 0.2))),
    ]
    _pretend(monkeypatch, runs)
    found = compare("digits/cnn", [policy], train=TRAIN | {"seeds": 2})
    (row,) = found.rows
    assert row.densities == "trained"
    assert found.input_shapes == ((64, 1, 8, 8),)  # the recipe's batch, the data set's shape

    def part(mean: tuple[float, float], stages: dict[str, tuple[float, float]]) -> float:
        """1 - MACs at `mean` (first layer, others), or as `stages` says, over dense MACs."""
        left = total = 0.0
        for layer in _report("dense").layers:
            for stage in ("forward", "input_gradient", "weight_gradient"):
                macs = getattr(layer, f"dense_{stage}_macs")
                total += macs
                left += macs * stages.get(stage, mean)[layer.name != LAYERS[0]]
        return 1 - left / total

    stages = {} if policy.startswith("swat") else {"weight_gradient": (0.5, 0.5)}
    assert row.training_mac_reduction == pytest.approx(part((0.7, 0.3), stages), abs=1e-6)
    forward = [(layer.name, layer.dense_forward_macs) for layer in _report("dense").layers]
    left = sum(macs * (0.6 if name == LAYERS[0] else 0.2) for name, macs in forward)
    expected = 1 - left / sum(macs for _, macs in forward)
    assert row.inference_mac_reduction == pytest.approx(expected, abs=1e-6)
    sizes = {layer.name: layer.parameters for layer in _report("dense").layers}
    stay = sum(n * (0.6 if name == LAYERS[0] else 0.2) for name, n in sizes.items())
    assert row.weight_sparsity == pytest.approx(1 - stay / sum(sizes.values()))
    assert row.model_compression == pytest.approx(sum(sizes.values()) / stay)
    assert "densities moved" in found.to_text() and "planned" not in found.to_text()


def test_only_the_layers_whose_densities_move_are_counted_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a held or thresholded layer realises is not what it is counted at."""
    policy = per_layer({LAYERS[-1]: "snfs:0.5"}, swat_u(0.9, first_dense=False))
    _pretend(monkeypatch, [Trained(Run(0, 0.9, 0.9, 1.0), (_epoch(0.3, 0.3),))])
    (row,) = compare("digits/cnn", [policy], train=TRAIN).rows
    sizes = [layer.parameters for layer in _report("dense").layers]
    stay = 0.1 * sum(sizes[:-1]) + 0.3 * sizes[-1]
    assert row.densities == "trained"
    assert row.weight_sparsity == pytest.approx(1 - stay / sum(sizes), abs=1e-6)


def test_accuracies_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        Trained(Run(0, 0.90, 0.95, 10.0)),
        Trained(Run(1, 0.80, 0.85, 14.0)),
        Trained(Run(2, failure="the loss is nan at step 3, in epoch 1")),
    ]
    _pretend(monkeypatch, runs)
    found = compare("digits/cnn", ["swat-u:0.9"], train=TRAIN | {"seeds": 3})
    (row,) = found.rows
    assert row.accuracy_mean == pytest.approx(0.85)
    assert row.accuracy_std == pytest.approx(0.1 / 2**0.5)  # of two, n - 1
    assert row.best_accuracy_mean == pytest.approx(0.9) and row.seconds_mean == 12
    assert row.runs == tuple(trained.run for trained in runs)
    text = found.to_text()
    assert "85.00 ± 7.07 (1 of 3 failed)" in text and "90.00" in text and "12.0" in text
    assert "swat-u:0.9, seed 2: the loss is nan at step 3" in text
    assert "epochs 2" in text and "seeds 3" in text
    _pretend(monkeypatch, runs[2:])
    (row,) = compare("digits/cnn", ["swat-m:0.9"], train=TRAIN).rows
    assert row.accuracy_mean is row.accuracy_std is row.seconds_mean is None
    assert row.densities == "planned"  # no training says otherwise
    _pretend(monkeypatch, runs[:1])
    found = compare("digits/cnn", ["swat-u:0.9"], train=TRAIN)
    assert found.rows[0].accuracy_std is None and "90.00 " in found.to_text()


def test_training_for_real(tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    found = compare(
        "digits/cnn",
        ["swat-m:0.9,period=1", "rigl:0.9,update_every=1"],
        train=TRAIN | {"seeds": [0, 4], "output_dir": str(tmp_path)},
        tell=said.append,
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "swat-m_0.9_period=1",
        "rigl_0.9_update_every=1",
    }
    for row in found.rows:
        assert [run.seed for run in row.runs] == [0, 4]
        accuracies = [run.accuracy for run in row.runs]
        assert row.accuracy_mean == pytest.approx(sum(accuracies) / 2)
        assert row.accuracy_std is not None and row.seconds_mean is not None
        assert row.weight_sparsity == pytest.approx(0.9, abs=0.01)
    assert [row.densities for row in found.rows] == ["trained", "fixed"]
    assert found.training == TRAIN | {"seeds": [0, 4]}
    assert len(said) == 8


def test_forms() -> None:
    found = compare("digits/cnn", ["swat-m:0.9", "set:0.9,seed=1"], X)
    data = json.loads(found.to_json())
    assert [row["policy"] for row in data["rows"]] == ["swat-m:0.9", "set:0.9,seed=1"]
    assert data["rows"][1]["activation_sparsity"] is None
    assert data["input_shapes"] == [[4, 1, 8, 8]] and data["model"] == "digits/cnn"
    (first, second) = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert first["policy"] == "swat-m:0.9" and second["activation_sparsity"] == ""
    assert float(first["training_mac_reduction"]) == data["rows"][0]["training_mac_reduction"]
    assert "runs" not in first and "saved_bytes" in first
    assert str(found) == found.to_text()
    lines = found.to_text().splitlines()
    assert lines[0].startswith("policy") and lines[3].split()[2] == "DS"
    assert "accuracy" not in found.to_text()
    markdown = found.to_markdown()
    assert markdown.startswith("| policy") and "\n\n\\* densities move" in markdown


@pytest.mark.parametrize(
    ("policies", "error", "message"),
    [
        ([], PolicyError, "no policy to compare"),
        (["swat-u:0.9", "swat-u:0.9"], PolicyError, "there twice (got 'swat-u:0.9')"),
        ([swat_u(0.9), "swat-u:0.9"], PolicyError, "there twice"),
        (["swat-u"], PolicyError, "wants a sparsity"),
        (["dense", "swatu:0.9"], UnknownNameError, "did you mean swat-u"),
        ([0.9], PolicyError, "a policy is a swatfx.Policy or a string"),
        (
            ["dense", "swat-u:0.9,weight_selector=2:4"],
            PolicyError,
            "policy 'swat-u:0.9,weight_selector=2:4' on this network: selector '2:4'",
        ),
    ],
)
def test_policies_that_cannot_be(policies: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        compare("digits/cnn", policies, X)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, InputError, "wants example inputs"),
        ({"train": TRAIN | {"seeds": 0}}, InputError, "seeds has to be"),
        ({"train": TRAIN | {"seeds": [1, 1]}}, InputError, "wants seeds"),
        ({"train": {"epochs": 1}}, InputError, "wants a data set"),
        ({"train": TRAIN | {"epochz": 1}}, UnknownNameError, "did you mean epochs"),
        ({"example_inputs": X, "accounting": "mine"}, InputError, "'paper' or 'exact'"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare("digits/cnn", ["dense"], **options)


def test_a_callable_cannot_be_trained() -> None:
    with pytest.raises(InputError, match="wants a model by name"):
        compare(small_nets.Residual, ["dense"], X, train=TRAIN)


def test_a_built_network_cannot_be_compared() -> None:
    for built in (small_nets.Residual(), swatfx.compile(small_nets.Residual(), "dense")):
        with pytest.raises(InputError, match=r"got 'a built .*lambda: Net\(\), or its name"):
            compare(built, ["dense"], X)


def test_a_comparison_is_a_value() -> None:
    row = Row("mine", "fixed", 0.9, None, 0.5, 0.9, None, 0, 0, 10.0)
    found = Comparison("net", ((1, 3),), "exact", (row,))
    assert "0.00" in found.to_text() and json.loads(found.to_json())["rows"][0]["runs"] == []
