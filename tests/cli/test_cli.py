"""The command line, run in this process but for one call of `python -m swatfx`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import pytest
import torch

import swatfx
from swatfx import models, policy
from swatfx.cli.commands import main
from tests.nets.command_lines import printed_by

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OWN_NETS = """
from torch import nn

def build(num_classes=4):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, num_classes)
    )

def refuses(size):
    return build()

def fails_on_meta():
    net = build()
    float(net[0].weight.detach().sum())
    return net

answer = 42
"""


@pytest.fixture
def own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN_NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Exit code 2 for usage, 1 for the rest; one line on stderr, nothing on stdout."""
    wanted = 1
    try:
        code = main(arguments)
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        code, wanted = leave.code, 2
    captured = capsys.readouterr()
    assert code == wanted
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


REPORT = ("report", "digits/cnn", "--policy", "swat-u:0.8")


def test_report_formats(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_by(capsys, *REPORT)
    markdown = printed_by(capsys, *REPORT, "--format", "markdown")
    rows = list(csv.DictReader(io.StringIO(printed_by(capsys, *REPORT, "--format", "csv"))))
    data = json.loads(printed_by(capsys, *REPORT, "--json"))
    assert data == json.loads(printed_by(capsys, *REPORT, "--format", "json"))
    names = [layer["name"] for layer in data["layers"]]
    assert [row["name"] for row in rows] == names and len(names) == 5
    for rendered in (text, markdown):
        assert all(name in rendered for name in names) and "first layer" in rendered
    assert markdown.startswith("|") and not text.startswith("|")
    gm = swatfx.compile(models.create("digits/cnn"), "swat-u:0.8")
    expected = swatfx.report(gm, torch.empty(32, 1, 8, 8, device="meta"))
    assert data["totals"] == json.loads(expected.to_json())["totals"]


def test_report_options(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    one = json.loads(printed_by(capsys, *REPORT, "--json", "--batch-size", "1"))["totals"]
    two = json.loads(printed_by(capsys, *REPORT, "--json", "--batch-size", "2"))["totals"]
    assert two["dense_forward_macs"] == 2 * one["dense_forward_macs"]
    wide = json.loads(printed_by(capsys, *REPORT, "--json", "--input-shape", "1,16,16"))["layers"]
    assert wide[0]["input_shape"] == [32, 1, 16, 16]
    assert (
        wide
        == json.loads(printed_by(capsys, *REPORT, "--json", "--input-shape", "1x16x16"))["layers"]
    )
    exact = json.loads(printed_by(capsys, *REPORT, "--json", "--accounting", "exact"))
    assert exact["accounting"] == "exact"
    assert exact["totals"]["dense_forward_macs"] < 32 * one["dense_forward_macs"]
    own = printed_by(capsys, *REPORT, "--topk-cost", "10,2")
    assert "dense step 10 ms, one refresh 2 ms:" in own
    short = printed_by(
        capsys,
        "report",
        "digits/cnn",
        "--policy",
        "swat-u,period=7",
        "--sparsity",
        "0.8",
        "--topk-cost",
        "paper",
    )
    assert "Top-K every 7 iterations" in short
    classes = json.loads(printed_by(capsys, *REPORT, "--json", "--num-classes", "3"))["layers"]
    assert classes[-1]["weight_shape"] == [3, 64]


def test_report_into_a_file(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.json"
    assert printed_by(capsys, *REPORT, "--json", "--output", str(path)) == ""
    assert json.loads(path.read_text())["policy"] == "swat-u"
    error = _refused(capsys, *REPORT, "--output", str(tmp_path / "absent" / "x.md"))
    assert "cannot write" in error and "absent" in error


def test_own_model(capsys: pytest.CaptureFixture[str], own: str) -> None:
    shape = ("--input-shape", "2,8,8", "--json")
    for name in ("build", "fails_on_meta"):
        data = json.loads(printed_by(capsys, "report", f"{own}:{name}", *shape))
        assert [x["name"] for x in data["layers"]] == ["0", "2", "4"]
    classes = json.loads(printed_by(capsys, "report", f"{own}:build", *shape, "--num-classes", "9"))
    assert classes["layers"][-1]["weight_shape"] == [9, 64]
    for spec, message in {
        f"{own}:build": "wants an input shape",
        f"{own}:missing": "cannot import the model",
        f"{own}_absent:build": "cannot import the model",
        f"{own}:refuses": "without required arguments",
        f"{own}:answer": "not a callable",
    }.items():
        arguments = ("report", spec) if "shape" in message else ("report", spec, *shape[:2])
        assert message in _refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "resnet5"), "unknown model (got 'resnet5'). did you mean resnet50"),
        (("report", "cifar/vgg"), "cifar/vgg16"),
        (("report", "digits/cnn", "--policy", "swatu:0.9"), "did you mean swat-u"),
        (("report", "digits/cnn", "--policy", "swat-u:1"), "number in [0, 1)"),
        (("report", "digits/cnn", "--policy", "swat-u"), "wants a sparsity"),
        (("report", "digits/cnn", "--sparsity", "2"), "not a number in [0, 1)"),
        (("report", "digits/cnn", "--policy", "swat-u:.9,perod=1"), "did you mean period"),
        (("report", "digits/cnn", "--batch-size", "0"), "argument --batch-size: 0 is not in 1 to"),
        (("report", "digits/cnn", "--input-shape", "1,a"), "write it as 3,224,224"),
        (("report", "digits/cnn", "--input-shape", "3,8,8"), "layer 'features.0'"),
        (("report", "digits/cnn", "--activation-floor", "1"), "number in [0, 1)"),
        (("report", "digits/cnn", "--formt", "json"), "did you mean --format"),
        (("report", "digits/cnn", "--format", "jsn"), "did you mean json"),
        (("report", "digits/cnn", "--batch-size", "many"), "invalid int value: 'many'"),
        (("report", "digits/cnn", "--policy", "swat-u:.9,sparsity=.8"), "behind the policy's name"),
        (("models", "--epochs", "3"), "see swatfx models --help"),
        (("simulate", "digits/cnn", "--zip", "int8"), "see swatfx simulate --help"),
        (("report",), "required: model"),
        (("reprot", "digits/cnn"), "did you mean report or export"),
        ((), "required: COMMAND"),
        (("export", "digits/cnn"), "required: --output"),
        (("export", "digits/cnn", "--output", "a.pt3"), "did you mean .pt2"),
        (("export", "digits/cnn", "--output", "a.onnx", "--training"), "written as .pt2"),
        (("export", "digits/cnn", "--output", "a.onnx", "--kernels"), "run in a .pt2"),
        (("export", "digits/cnn", "--output", "a.pt2", "--values", "int4"), "invalid choice"),
        (("export", "digits/cnn", "--output", "a.pt2", "--checkpoint", "no"), "no such checkpoint"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _refused(capsys, *arguments)
    assert message in error
    assert error.startswith("swatfx")


def test_export(capsys: pytest.CaptureFixture[str], own: str, tmp_path: pathlib.Path) -> None:
    common = ("export", f"{own}:build", "--input-shape", "2,8,8")
    data = json.loads(
        printed_by(capsys, *common, "--output", "a.pt2", "--json", "--batch-size", "1")
    )
    assert data == {"path": "a.pt2", "bytes": (tmp_path / "a.pt2").stat().st_size}
    program = torch.export.load("a.pt2")
    assert program.module()(torch.randn(3, 2, 8, 8)).shape == (3, 4)
    text = printed_by(capsys, *common, "--output", "a.safetensors", "--policy", "swat-erk:0.9")
    assert "a.safetensors" in text and "bytes" in text
    assert "0.weight" in swatfx.load_sparse("a.safetensors")
    printed_by(capsys, *common, "--output", "t.pt2", "--training")
    targets = {str(n.target) for n in torch.export.load("t.pt2").graph.nodes}
    assert "swatfx.conv.default" in targets


def test_export_stores_less(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    common = ("export", "digits/cnn", "--policy", "swat-u:0.5,weight_selector=filter")
    path = tmp_path / "a.pt2"
    sizes = []
    for options in ((), ("--packed", "--values", "int8"), ("--shrink",), ("--kernels",)):
        assert main([*common, *options, "--output", str(path), "--json"]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["bytes"])
        assert swatfx.load_program(path)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sizes[1] < sizes[2] < sizes[0]


def test_export_of_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    torch.manual_seed(3)
    gm = swatfx.compile(models.create("digits/cnn", num_classes=7), "swat-u:0.9")
    swatfx.save(gm, tmp_path / "a.ckpt")
    common = ("export", "digits/cnn", "--checkpoint", str(tmp_path / "a.ckpt"))
    path = tmp_path / "a.pt2"
    error = _refused(capsys, *common, "--output", str(path))
    assert "layer 'fc'" in error and not path.exists()
    printed_by(capsys, *common, "--output", str(path), "--num-classes", "7")
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(path).module()(x), gm.eval()(x))


@pytest.mark.parametrize("asked", [("--policy", "rigl:0.5"), ("--sparsity", "0.5")])
@pytest.mark.parametrize("command", ["export", "simulate"])
def test_a_checkpoint_of_another_policy_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, command: str, asked: tuple[str, ...]
) -> None:
    torch.manual_seed(3)
    path = tmp_path / "a.ckpt"
    swatfx.save(swatfx.compile(models.create("digits/cnn"), "swat-u:0.9"), path)
    common = [command, "digits/cnn", "--checkpoint", str(path)]
    if command == "simulate":
        common += ["--data", "digits", "--accelerator", "scnn", "--samples", "1"]
    else:
        common += ["--output", str(tmp_path / "a.pt2")]
    error = _refused(capsys, *common, *asked)
    assert "trained with another policy, swat-u:0.9" in error and asked[1] in error
    if command == "export":
        printed_by(capsys, *common, "--policy", "swat-u:0.9")  # the same, said again
        assert (tmp_path / "a.pt2").exists()


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    names = json.loads(printed_by(capsys, "models", "--json"))
    assert names == printed_by(capsys, "models").split()
    assert {"resnet50", "cifar/vgg16", "digits/cnn"} <= set(names)
    data = json.loads(printed_by(capsys, "policies", "--json"))
    assert set(data["policies"]) == set(policy.CONSTRUCTORS)
    assert data["fields"]["period"] == 1
    text = printed_by(capsys, "policies")
    assert all(name in text for name in (*policy.CONSTRUCTORS, "redistribute_every"))


@pytest.mark.parametrize("text", ["rigl:0.8", "ssc,g=2,p=1", "dense"])
def test_fields_of_one_policy(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(printed_by(capsys, "policies", text, "--json"))
    chosen = policy.parse(text)
    known = {f.name for f in dataclasses.fields(policy.Policy)} - {"rules"}
    assert set(data["policy"]) == known
    assert all(data["policy"][name] == getattr(chosen, name) for name in known)
    assert {name for name, meaning in data["meanings"].items() if meaning} >= known
    shown = printed_by(capsys, "policies", text)
    assert "optimizer steps between mask updates; 0 is once an epoch." in shown


def test_an_unknown_policy_has_no_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", "rigll"]) != 0
    assert "did you mean" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--version"])
    assert leave.value.code == 0
    assert capsys.readouterr().out == f"swatfx {swatfx.__version__}\n"


@pytest.mark.parametrize("command", ["", "report", "train", "export", "policies", "models", "demo"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main([*filter(None, [command]), "--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: swatfx {command}".strip())
    if not command:
        assert "swatfx report resnet50" in text  # copy-paste examples


def _process(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swatfx", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_as_a_process(tmp_path: pathlib.Path) -> None:
    done = _process(tmp_path, "report", "digits/cnn", "--json", "--output", "/dev/stdout")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy"] == "swat-u"


@pytest.mark.slow
def test_as_a_process_that_fails(tmp_path: pathlib.Path) -> None:
    done = _process(tmp_path, "report", "digits/cn")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "digits/cnn" in done.stderr and "Traceback" not in done.stderr
