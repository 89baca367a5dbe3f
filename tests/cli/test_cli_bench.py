"""`swatfx bench`, run in this process."""

from __future__ import annotations

import csv
import io
import json
import pathlib
import re

import pytest
import torch

from swatfx.cli.commands import main
from tests.nets.command_lines import printed_by

pytestmark = pytest.mark.usefixtures("spare_time")

NETS = "tests.nets.timed_nets"
QUICK = ("--rounds", "2", "--seconds", "0.001", "--dtype", "fp32")
OWN = ("--policy", "swat-u:0.9", *QUICK)


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Exit code 1, one line on stderr, nothing on stdout."""
    assert main(("bench", *arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("swatfx bench: ")
    return captured.err


def test_tables_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("digits/cnn", "--policy", "swat-u", "--sparsity", "0.9", "--batch-size", "4")
    text = printed_by(capsys, "bench", *words, *QUICK[:4], "--threads", "1")
    for said in (
        "a training step of digits/cnn, 4x1x8x8 float32, swat-u:0.9,period=1000",
        "fp32 NCHW, eager",
        "bf16 channels_last, eager",
        "bf16 swat-u:0.9",
        "fastest dense",
        "features.10",
        "first layer",
        "the whole step",
    ):
        assert said in text
    last = text.splitlines()[-1]
    assert re.match(r"(fp32|bf16) swat-u:0.9 (trains|takes|is as fast)", last)


def test_json_and_csv(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bench.json"
    words = (
        "bench",
        "digits/cnn",
        "--batch-size",
        "2",
        *OWN,
        "--kernels",
        "dense",
        "--period",
        "7",
        "--quiet",
    )
    assert printed_by(capsys, *words, "--json", "--output", str(path)) == ""
    data = json.loads(path.read_text())
    assert data["model"] == "digits/cnn" and data["policy"] == "swat-u:0.9,period=7"
    assert data["period"] == 7 and data["inputs"] == ["2x1x8x8 float32"]
    assert {row["why"] for row in data["layers"]} == {"first layer", "asked for"}
    rows = list(csv.DictReader(io.StringIO(printed_by(capsys, *words, "--format", "csv"))))
    assert [row["name"] for row in rows[:5]] == [row["name"] for row in data["layers"]]
    assert rows[-1]["name"] == "the optimizer's step"


def test_a_period_of_the_policys_own(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("digits/cnn", "--policy", "swat-u:0.9, period=1", *QUICK)
    assert "refreshed at every step" in printed_by(capsys, "bench", *words)
    said = _refused(capsys, *words, "--period", "10")
    assert "says a period itself" in said and "--period" in said


def test_the_dense_policy_has_no_period(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_by(capsys, "bench", "digits/cnn", "--policy", "dense", *QUICK)
    assert "no layer is sparse" in text


def test_whole_numbers_as_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"{NETS}:reader", "--input-shape", "6", "--batch-size", "3", "--tokens", "50", *OWN)
    assert "3x6 int64" in printed_by(capsys, "bench", *words)


@pytest.mark.parametrize(
    ("name", "inputs", "loss"),
    [
        ("with_inputs", "4x6 int64 4x6 float32", "cross entropy"),
        ("with_loss", "4x6 int64", "your own loss"),
    ],
)
def test_what_a_callable_returns_beside_the_model(
    name: str, inputs: str, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed_by(capsys, "bench", f"{NETS}:{name}", *OWN)
    assert f"{NETS}:{name}, {inputs}, swat-u:0.9" in text and f"loss ({loss}" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((f"{NETS}:reader",), "add --input-shape"),
        ((f"{NETS}:with_inputs", "--tokens", "3"), "returns its own inputs (got '--tokens')"),
        ((f"{NETS}:with_inputs", "--batch-size", "3"), "(got '--batch-size')"),
        ((f"{NETS}:with_a_list",), "let it return a model, (model, inputs)"),
        ((f"{NETS}:with_no_loss",), "is no function"),
        ((f"{NETS}:failing",), "cannot be built: RuntimeError: out of luck"),
        ((f"{NETS}:absent",), "cannot import the model"),
        (("resnet5",), "unknown model"),
        (("digits/cnn", "--policy", "swat"), "unknown policy"),
        (("digits/cnn", "--policy", "swat-u:1.5"), "sparsity"),
        (("digits/cnn", "--input-shape", "2,8,8"), "does not run on the example inputs"),
        (("digits/cnn", "--tokens", "9"), "does not run on the example inputs"),
        (("digits/cnn", "--json", "--format", "csv"), "--json is --format json"),
        (("digits/cnn", "--output", "no/such/folder"), "its folder is not there"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in _refused(capsys, *words)


@pytest.mark.parametrize("words", [("--rounds", "0"), ("--seconds", "nan"), ("--dtype", "fp16")])
def test_options_out_of_range_are_usage(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leave:
        main(("bench", "digits/cnn", *words))
    assert leave.value.code == 2 and capsys.readouterr().err.startswith("swatfx bench: ")


def test_progress_is_for_terminals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(("bench", "digits/cnn", "--batch-size", "2", *OWN)) == 0
    assert "layers of fp32 swat-u:0.9" in capsys.readouterr().err
    assert main(("bench", "digits/cnn", "--batch-size", "2", *OWN, "--quiet")) == 0
    assert capsys.readouterr().err == ""
    assert torch.get_num_threads() == threads
