"""`swatfx compare`, run in this process."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from typing import Any

import pytest
import torch

from swatfx.cli.commands import main
from swatfx.cli.compare import split_policies
from swatfx.comparing.table import compare
from swatfx.errors import PolicyError
from swatfx.runs import run as runs
from swatfx.runs.folder import CHECKPOINT
from tests.nets.command_lines import printed_by

NET = ("compare", "digits/cnn", "--policies")
TRAIN = ("--train", "--data", "digits", "--epochs", "1", "--limit", "64", "--threads", "1")
TRAIN += ("--device", "cpu")


@pytest.mark.parametrize(
    ("texts", "policies"),
    [
        (["swat-u:0.9"], ["swat-u:0.9"]),
        (["swat-u:0.9,rigl:0.9,dense"], ["swat-u:0.9", "rigl:0.9", "dense"]),
        (["swat-u:0.9,period=10,set:0.8"], ["swat-u:0.9,period=10", "set:0.8"]),
        (
            ["swat-u:0.5,weight_selector=2:4, period=3 , saw:0.9"],
            ["swat-u:0.5,weight_selector=2:4,period=3", "saw:0.9"],
        ),
        (["ssc,g=4,p=8,dense"], ["ssc,g=4,p=8", "dense"]),
        (["swat_u:0.9,dst"], ["swat_u:0.9", "dst"]),
        (["dense,", ",swat-u:0.9"], ["dense", "swat-u:0.9"]),
        (["nonsense,alsono:1"], ["nonsense", "alsono:1"]),
        ([""], []),
    ],
)
def test_a_field_belongs_to_the_policy_before_it(texts: list[str], policies: list[str]) -> None:
    assert split_policies(texts) == policies


@pytest.mark.parametrize("texts", [["period=10,swat-u:0.9"], ["swat-u:0.9", "period=10"]])
def test_a_field_without_a_policy_is_an_error(texts: list[str]) -> None:
    with pytest.raises(PolicyError, match="without a policy before it"):
        split_policies(texts)


def test_formats(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    asked = (*NET, "swat-u:0.9,period=10,rigl:0.9", "dense", "--policies", "swat-m:0.8")
    names = ["swat-u:0.9,period=10", "rigl:0.9", "dense", "swat-m:0.8"]
    found = compare("digits/cnn", names, torch.empty(32, 1, 8, 8, device="meta"))
    assert printed_by(capsys, *asked) == found.to_text() + "\n"
    assert printed_by(capsys, *asked, "--format", "markdown") == found.to_markdown() + "\n"
    data = json.loads(printed_by(capsys, *asked, "--json"))
    assert data == json.loads(found.to_json())
    assert data == json.loads(printed_by(capsys, *asked, "--format", "json"))
    rows = list(csv.DictReader(io.StringIO(printed_by(capsys, *asked, "--format", "csv"))))
    assert [row["policy"] for row in rows] == names
    path = tmp_path / "table.md"
    assert printed_by(capsys, *asked, "--format", "markdown", "--output", str(path)) == ""
    assert path.read_text() == found.to_markdown() + "\n"


def test_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    def totals(*options: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(
            printed_by(capsys, *NET, "swat-u:0.9", "--json", *options)
        )
        return data | data["rows"][0]

    plain, large = totals("--batch-size", "1"), totals("--batch-size", "4")
    assert large["input_shapes"] == [[4, 1, 8, 8]]
    assert large["dense_saved_bytes"] > 3 * plain["dense_saved_bytes"]
    assert totals("--input-shape", "1,16,16")["input_shapes"] == [[32, 1, 16, 16]]
    assert totals("--num-classes", "3")["model_compression"] != plain["model_compression"]
    exact = totals("--accounting", "exact")
    assert exact["accounting"] == "exact"
    assert exact["training_mac_reduction"] != plain["training_mac_reduction"]
    floored = totals("--activation-floor", "0.95")
    assert floored["activation_sparsity"] == pytest.approx(0.95)
    narrow = totals("--norm-saves", "int8", "--value-dtype", "bf16", "--batch-size", "1")
    assert narrow["saved_bytes"] < plain["saved_bytes"]


def test_training(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    asked = (*NET, "swat-u:0.9,set:0.9", *TRAIN, "--seeds", "2", "--batch-size", "32")
    asked += ("--output-dir", str(tmp_path), "--json")
    assert main(asked) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["input_shapes"] == [[32, 1, 8, 8]]
    assert data["training"]["batch_size"] == 32 and data["training"]["seeds"] == 2
    assert "quiet" not in data["training"]
    for row in data["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert 0 <= row["accuracy_mean"] <= 1 and row["accuracy_std"] >= 0
    lines = captured.err.splitlines()
    assert lines[0] == "swatfx compare: swat-u:0.9, seed 0: run 1 of 4" and len(lines) == 8
    assert len(list(tmp_path.glob(f"*/seed-*/{CHECKPOINT}"))) == 4
    assert json.loads(printed_by(capsys, *asked, "--quiet")) == data  # read, seconds and all


def test_interrupted(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> float:
        raise KeyboardInterrupt

    asked = (*NET, "dense", *TRAIN, "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "learning_rate", interrupt)
        assert main((*asked, "--output-dir", str(tmp_path))) == 130
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.endswith("interrupted; the same command goes on from there\n")
        assert main(asked) == 130
        assert capsys.readouterr().err == "swatfx compare: interrupted\n"
    assert "accuracy" in printed_by(capsys, *asked, "--output-dir", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dense",), ""),
        (("swatu:0.9",), "did you mean swat-u"),
        (("period=3",), "without a policy before it"),
        (("dense,dense",), "there twice"),
        ((",",), "no policy to compare"),
        (("swat-u:0.5,weight_selector=2:5",), "policy 'swat-u:0.5,weight_selector=2:5'"),
        (("dense", "--batch-size", "0"), "argument --batch-size: 0 is not in 1 to"),
        (("dense", "--input-shape", "3,8,8"), "layer 'features.0'"),
        (("dense", "--data", "digits"), "without --train (got '--data')"),
        (("dense", "--seeds", "2", "--compile"), "without --train (got '--compile, --seeds')"),
        (("dense", "--train"), "wants a data set"),
        (("dense", *TRAIN, "--seeds", "0"), "argument --seeds: 0 is not in 1 to"),
        (
            ("dense", *TRAIN, "--num-classes", "3"),
            "the data set's with --train (got '--num-classes')",
        ),
        (
            ("dense", *TRAIN, "--input-shape", "1,9,9"),
            "the data set's with --train (got '--input-shape')",
        ),
        (("dense", "--polices", "dense"), "did you mean --policies"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = 1
    try:
        code = main((*NET, *arguments))
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        code, wanted = leave.code, 2
    captured = capsys.readouterr()
    if not message:
        assert (code, captured.err) == (0, "")
        return
    assert code == wanted and captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.err.startswith("swatfx")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["compare", "--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: swatfx compare") and "--policies" in text
    assert "--policy " not in text
