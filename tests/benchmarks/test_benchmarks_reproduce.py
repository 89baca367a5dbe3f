"""benchmarks.reproduce: tables beside the figures in print, and the command with its files."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import common
from benchmarks.reproduce import __main__, figures, plotting, tables
from benchmarks.reproduce.experiments import EXPERIMENTS
from benchmarks.reproduce.jobs import SCALES, Network
from benchmarks.reproduce.table_rows import TABLES, TRAINING, WEIGHTS, Row
from tests.nets.reproducing import DIGITS, TINY
from tests.nets.runners import numbers

pytestmark = pytest.mark.usefixtures("spare_time")


# Tables.


def test_rows_are_beside_the_figures_in_print() -> None:
    rows = TABLES["table4"][:1]
    (record,) = records = tables.account(rows)
    assert record["printed"][TRAINING] == 49.8
    assert (
        record["differences"][TRAINING] == pytest.approx(record["computed"][TRAINING] - 49.8)
        and abs(record["differences"][TRAINING]) < 0.5
    )
    summary = tables.summarise(records)
    assert record["targets"] == ["weight_sparsity", "activation_sparsity"]
    assert summary["figures"] == summary["within_half_a_point"] == 3
    assert summary["by_natural_zeros"] == summary["rows_not_computed"] == 0
    headers, (cells,) = tables.table(records)
    assert len(headers) == len(cells) and cells[5].startswith("49.9 (49.8, +0.")
    panel = tables.picture(records)
    assert panel.lines[0].ys == (49.8,) and panel.lines[1].ys == (record["computed"][TRAINING],)


def test_rows_without_accounting_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network("digits/cnn", "digits")
    monkeypatch.setattr(
        tables, "computed", lambda n, policy, floor: dict.fromkeys(tables.FIGURES, 50 + floor)
    )
    rows = [
        Row(network, "A", "swat-m:0.5", {TRAINING: 60.0}, 90.0, -1.0, unknown="moves"),
        Row(network, "B", "swat-erk:0.5", {TRAINING: 52.0}, 91.0, 0.5, floor=0.25),
    ]
    unknown, known = records = tables.account(rows)
    assert unknown["computed"] is None and unknown["differences"] == {}
    assert known["differences"] == {TRAINING: 50.25 - 52}
    assert known["without_floor"][TRAINING] == 50
    _, cells = tables.table(records)
    assert cells[0][3:] == ["- (60)", "90 (-1)", "moves"]
    assert cells[1][3] == "50.2 (52, -1.8)" and cells[1][-1].startswith("natural zeros 0.25; ")
    text = tables.sentence(tables.summarise(records))
    assert "0 of 1 figures" in text and "(-1.75 points)" in text and "1 rows do not" in text
    # Natural zeros bring the second row's figure within half a point.
    close = tables.account([replace(rows[1], printed={TRAINING: 50.6})])
    assert tables.summarise(close)["by_natural_zeros"] == 1
    assert "1 of 1 figures come out within half a point of the one in print, 1 by" in (
        tables.sentence(tables.summarise(close))
    )
    targets = tables.account([replace(rows[1], printed={WEIGHTS: 50.0})])
    assert tables.sentence(tables.summarise(targets)) == (
        "the table prints targets and accuracies only"
    )


def test_every_row_has_a_policy_or_a_reason() -> None:
    counts = {name: len(rows) for name, rows in TABLES.items()}
    assert counts == {
        "table2": 13, "table3": 18, "table4": 6, "table5": 10,
        "appendix-table1": 9, "appendix-table2": 6,
    }  # fmt: skip
    for rows in TABLES.values():
        for row in rows:
            assert row.printed and (row.policy or row.unknown)
        policies = {row.policy for row in rows if row.policy is not None}
        arms = figures.table_arms(rows)(DIGITS, TINY)
        assert {arm.curve for arm in arms} == {"dense", *policies}
    network = Network("wide_resnet50_2", "imagenet")
    own = figures.table_arms(TABLES["table3"])(network, SCALES["paper"])
    assert [arm.curve for arm in own] == ["dense", "swat-u:0.8", "swat-u:0.9"]


# The command.


def run(*words: str) -> int:
    return __main__.main([*words, "--scale", "tiny"])


def test_a_figure_from_the_command_line(
    tmp_path: pathlib.Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    work, output = tmp_path / "work", tmp_path / "out"
    folders = ["--work", str(work), "--output", str(output)]
    assert run("figure8", "figure4", *folders, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert trained == [] and not output.exists() and "of 8 runs to train: about" in printed
    assert "frozen after epoch x 0: swat-frozen:0.9,hold_from_epoch=0, 2 epochs" in printed

    assert run("figure8", "figure4", *folders) == 0
    assert len(trained) == 8 and trained.count("swat-u 0") == 1  # shared by the two figures
    out, err = capsys.readouterr()
    assert "[2/2] digits/cnn on digits, swat-u:0.9, seed 1:" in err and "wrote" in err
    assert "8 of 8 runs to train: about" in err and out.index("figure4") < out.index("figure8")
    stem = f"{common.today()}-reproduce-figure8-tiny"
    result = json.loads((output / f"{stem}.json").read_text())
    assert str(tmp_path) not in json.dumps(result)
    assert all(math.isfinite(number) for number in numbers(result))
    assert result["command"].endswith("--work work --output out --scale tiny")
    assert result["claim"] == "freezing early hurts" and result["verdict"] in out
    (found,) = result["outcomes"]
    assert [p["curve"] for p in found["points"]] == [
        "dense", "frozen after epoch x", "frozen after epoch x", "never frozen"
    ]  # fmt: skip
    assert len(found["runs"]) == 8 and {run["seed"] for run in found["runs"]} == {0, 1}
    (finding,) = found["findings"]
    point = {p["curve"]: p["accuracy_mean"] for p in found["points"] if p["x"] in (None, 0)}
    assert finding["difference"] == pytest.approx(
        point["never frozen"] - point["frozen after epoch x"]
    )
    assert (output / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    text = (output / f"{stem}.md").read_text()
    assert f"![{result['description']}]({stem}.png)" in text and "not the paper's network" in text
    thresholds = json.loads((output / f"{stem.replace('8', '4')}.json").read_text())
    assert len(thresholds["outcomes"][0]["quarters"]) == 2

    assert run("figure8", *folders, "--tag", "again") == 0  # all of it is there
    assert len(trained) == 8 and (output / f"{stem}-again.json").exists()
    assert "nothing to train: 8 runs are finished" in capsys.readouterr().err


def test_a_table_is_trained_only_when_asked(
    tmp_path: pathlib.Path,
    trained: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        tables, "computed", lambda n, policy, floor: dict.fromkeys(tables.FIGURES, 50.0)
    )
    words = ["appendix-table2", "--work", str(tmp_path / "w"), "--seeds", "1", "--epochs", "1"]
    assert run(*words) == 0 and trained == []
    assert "the table prints targets and accuracies only" in capsys.readouterr().out
    assert run(*words, "--train") == 0
    assert trained == ["dense 0", *["swat-u 0"] * 3]
    out = capsys.readouterr().out
    assert "change in print" in out and "cifar/resnet18 -0.4, cifar/densenet121 +0.9" in out
    assert not list(tmp_path.rglob("*reproduce*"))  # the tiny scale writes where it is told to


def test_the_command_line_says_what_does_not_fit(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("figure9")
    assert "unknown: figure9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("figure1", "--no-train")
    assert "leaves nothing of a figure" in capsys.readouterr().err
    words = ["figure7", "--work", str(tmp_path), "--dataset", "cifar10", "--data", str(tmp_path)]
    assert run(*words) == 2
    assert "error: " in capsys.readouterr().err


def test_the_list_names_everything() -> None:
    words = [sys.executable, "-m", "benchmarks.reproduce", "list"]
    done = subprocess.run(words, cwd=common.ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(EXPERIMENTS)
    assert len(EXPERIMENTS) == 15


def test_scales_and_options() -> None:
    parser = __main__._parser()
    args = parser.parse_args(["figure1", "--limit", "all", "--epochs", "30"])
    scale = __main__._scale(args)
    assert (scale.limit, scale.epochs, scale.seeds) == (None, 30, 2)
    args = parser.parse_args(["figure1", "--scale", "paper"])
    grid = __main__._grid(EXPERIMENTS["figure1"], __main__._scale(args), args)
    assert [network.model for network in grid] == [
        "cifar/densenet121", "cifar/vgg16", "cifar/resnet18"
    ]  # fmt: skip
    assert {len(pairs) for pairs in grid.values()} == {11 * 3}
    assert {one.epochs for pairs in grid.values() for _, one in pairs} == {150}
    args = parser.parse_args(["figure1", "--model", "cifar/resnet18"])
    (network,) = __main__._grid(EXPERIMENTS["figure1"], __main__._scale(args), args)
    assert network == Network("cifar/resnet18", "cifar10")
    text = __main__._command(["figure1", "--work=/a/b", "--data", "/c/d.npz"])
    assert text == "python -m benchmarks.reproduce figure1 --work=b --data d.npz"


def test_without_matplotlib_there_is_one_complaint(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plotting._complain.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    panel = plotting.Panel("", "x", "y", (plotting.Line("a", (1.0,), (2.0,)),))
    for _ in range(2):
        assert not plotting.draw("t", [panel], tmp_path / "p.png")
    assert capsys.readouterr().err.count("matplotlib is not installed") == 1
    assert not list(tmp_path.iterdir())
