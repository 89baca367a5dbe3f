"""Exports that store less: packed weights, fewer bits, our kernels, and names to read."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import kernels
from swatfx.errors import ExportError, UnknownNameError
from swatfx.exporting.names import Call, readable
from swatfx.exporting.packing import Unpack, stored
from tests.nets.small_nets import Residual, assert_same, batches, sgd, snapshot, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*dynamic.*:UserWarning"),
]
FORMS: dict[str, dict[str, Any]] = {
    "packed": {"packed": True},
    "bf16": {"packed": True, "values": "bf16"},
    "int8": {"packed": True, "values": "int8"},
    "dense int8": {"values": "int8"},
    "shrunk": {"shrink": True, "packed": True},
}
SOME = [
    pytest.param(name, marks=() if name in ("int8", "shrunk") else pytest.mark.slow)
    for name in FORMS
]


class Transformer(nn.Module):
    """Linear layers on three dimensions, which ONNX multiplies the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 40)
        self.norm = nn.LayerNorm(40)
        self.down = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.norm(self.up(x)).relu()).sin()
        return out


def trained(
    policy: str = "swat-u:0.8,period=2,first_dense=False", **options: str
) -> swatfx.compiled.SwatModule:
    torch.manual_seed(0)
    gm = swatfx.compile(Residual(), policy, **options)
    train(gm, sgd(gm), batches(2))
    return gm


def outputs(gm: nn.Module, x: Tensor) -> Tensor:
    """Of evaluation, plain torch's arithmetic."""
    swatfx.refresh(gm)
    gm.eval()
    with torch.no_grad(), kernels.reference_only():
        out: Tensor = gm(x)
    return out


def allowed(want: Tensor, form: str) -> float:
    """How far outputs may lie apart: weights are rounded to a part in 256, or in 254."""
    share = 1e-5 if form in ("packed", "shrunk") else 0.03
    return share * float(want.abs().max())


def close(got: Tensor, want: Tensor, form: str) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=allowed(want, form))
    assert form in ("packed", "shrunk") or not torch.equal(got, want)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7), (3, 0), (0, 4), (9,)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("values", ["exact", "bf16", "int8"])
def test_stored_weights_come_back(shape: tuple[int, ...], packed: bool, values: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * (torch.rand(shape) < 0.2)
    got = Unpack(stored(weight, values, packed))()
    assert got.shape == weight.shape and got.dtype == weight.dtype
    assert torch.equal(got == 0, weight == 0) or values == "int8"
    if values == "exact":
        assert torch.equal(got, weight)
    elif weight.numel():
        rows = weight.reshape(shape[0], -1).abs().amax(1)
        step = rows / 254 if values == "int8" else rows / 256
        assert ((got - weight).reshape(shape[0], -1).abs() <= step.unsqueeze(1) * 1.001).all()


def test_a_dense_weight_is_not_packed() -> None:
    assert stored(torch.ones(4, 8), "exact", True).bitmask is None
    sparse = stored(torch.eye(32), "exact", True)
    assert sparse.bitmask is not None and sparse.bytes == 32 * 4 + 32 * 32 // 8


@pytest.mark.parametrize("form", SOME)
def test_packed_programs_compute_the_same(form: str, tmp_path: pathlib.Path) -> None:
    selector = ",weight_selector=filter" if form == "shrunk" else ""
    gm = trained("swat-u:0.8,period=2,first_dense=False" + selector)
    before = snapshot(gm)
    swatfx.export(gm, tmp_path / "a.pt2", torch.randn(2, 3, 8, 8), **FORMS[form])
    assert_same(snapshot(gm), before)
    x = torch.randn(5, 3, 8, 8)
    want = outputs(gm, x)
    with torch.no_grad():
        as_it_is = torch.export.load(tmp_path / "a.pt2").module()(x)
        loaded = swatfx.load_program(tmp_path / "a.pt2")
        unpacked = loaded(x)
    close(as_it_is, want, form)
    torch.testing.assert_close(unpacked, as_it_is, rtol=0, atol=1e-6)
    names = set(loaded.state_dict())
    assert {"block1.conv1.weight", "fc.weight", "fc.bias"} <= names
    assert not any(name.endswith((".values", ".bitmask", ".scale")) for name in names)
    assert not any("masked_scatter" in str(node.target) for node in loaded.graph.nodes)


def test_packed_files_are_smaller(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(
        nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))), "swat-u:0.9,first_dense=False"
    )
    sizes = {}
    for name, form in {"dense": {}, **FORMS}.items():
        swatfx.export(gm, tmp_path / "a.pt2", torch.randn(2, 256), **form)
        sizes[name] = (tmp_path / "a.pt2").stat().st_size
    weights, text = 4 * 256 * 256, 40_000
    assert sizes["dense"] > 4 * weights
    assert sizes["packed"] < weights * (0.4 + 1 / 8) + text
    assert sizes["bf16"] < weights * (0.2 + 1 / 8) + text
    assert sizes["int8"] < weights * (0.1 + 1 / 8) + text


def test_our_kernels_in_a_program(tmp_path: pathlib.Path) -> None:
    gm = trained(kernels="sparse")
    x = torch.randn(5, 3, 8, 8)
    for form in ({}, {"packed": True}):
        swatfx.export(gm, tmp_path / "a.pt2", torch.randn(2, 3, 8, 8), kernels=True, **form)
        loaded = swatfx.load_program(tmp_path / "a.pt2")
        ours = [str(n.target) for n in loaded.graph.nodes if "swatfx.conv" in str(n.target)]
        assert len(ours) == 7
        with torch.no_grad():
            for _ in range(2):  # once with what kernels kept of the first call
                torch.testing.assert_close(loaded(x), outputs(gm, x), rtol=1e-4, atol=1e-5)


ALONE = """
import sys
sys.modules['swatfx'] = sys.modules['passes'] = None  # importing either is an error
import torch
x, want = torch.load({io!r})
got = torch.export.load({path!r}).module()(x)
torch.testing.assert_close(got, want, rtol=0, atol={atol})
"""
ALONE_ONNX = """
import sys
sys.modules['swatfx'] = sys.modules['passes'] = sys.modules['torch'] = None
import numpy, onnxruntime
x, want = numpy.load({io!r}).values()
session = onnxruntime.InferenceSession({path!r})
got = session.run(None, {{session.get_inputs()[0].name: x}})[0]
assert abs(got - want).max() <= {atol}, abs(got - want).max()
"""


def run_alone(script: str, folder: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", SOME)
def test_programs_run_without_swatfx(form: str, tmp_path: pathlib.Path) -> None:
    gm = trained()
    x = torch.randn(5, 3, 8, 8)
    want = outputs(gm, x)
    io, path = str(tmp_path / "io.pt"), tmp_path / "a.pt2"
    torch.save((x, want), io)
    swatfx.export(gm, path, torch.randn(2, 3, 8, 8), **FORMS[form])
    run_alone(ALONE.format(io=io, path=str(path), atol=allowed(want, form)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_onnx_files_run_without_torch_and_are_unpacked_once(
    form: str, tmp_path: pathlib.Path
) -> None:
    import numpy
    import onnx
    import onnxruntime

    gm = trained()
    x = torch.randn(5, 3, 8, 8)
    want = outputs(gm, x)
    path = tmp_path / "a.onnx"
    swatfx.export(gm, path, torch.randn(2, 3, 8, 8), **FORMS[form])
    onnx.checker.check_model(str(path), full_check=True)
    numpy.savez(tmp_path / "io.npz", x=x.numpy(), want=want.numpy())
    io = str(tmp_path / "io.npz")
    run_alone(ALONE_ONNX.format(io=io, path=str(path), atol=allowed(want, form)), tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    ran = {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}
    assert not ran & {"CumSum", "Gather", "BitShift", "Cast", "Unpack", "Widen"}, ran


@pytest.mark.slow
@pytest.mark.parametrize("values", ["exact", "int8"])
def test_onnx_of_linear_layers_on_three_dimensions(values: str, tmp_path: pathlib.Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    gm = swatfx.compile(Transformer(), "swat-u:0.8,first_dense=False")
    x = torch.randn(3, 7, 16)
    swatfx.export(gm, tmp_path / "a.onnx", x, packed=True, values=values)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    want = outputs(gm, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if values == "exact" else 0.03)
    import onnx

    held = {one.name: one.data_type for one in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert sum(name.endswith(".bitmask") for name in held) == 2


@pytest.mark.slow
def test_names_in_onnx_files_are_the_modules(tmp_path: pathlib.Path) -> None:
    import onnx

    swatfx.export(trained(), tmp_path / "a.onnx", torch.randn(2, 3, 8, 8), packed=True)
    raw = (tmp_path / "a.onnx").read_bytes()
    assert b".py" not in raw and b"site-packages" not in raw  # whose machine it was
    graph = onnx.load(tmp_path / "a.onnx").graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    wanted = {"stem", "block1.conv1", "block1.conv1.weight", "block2.down", "pool", "fc"}
    assert wanted <= set(names), names
    by_name = {node.name: node for node in graph.node}
    assert by_name["block1.conv1"].op_type == "Conv"
    assert by_name["block1.conv1.weight"].op_type == "Unpack"
    assert list(by_name["block1.conv1.weight"].input) == [
        *("block1.conv1.weight.values", "block1.conv1.weight.bitmask")
    ]


@pytest.mark.parametrize("form", ["dense", "packed", "shrunk"])
def test_names_in_programs_are_the_modules(form: str, tmp_path: pathlib.Path) -> None:
    swatfx.export(trained(), tmp_path / "a.pt2", torch.randn(2, 3, 8, 8), **FORMS.get(form, {}))
    program = torch.export.load(tmp_path / "a.pt2")
    names = {node.name for node in program.graph.nodes if node.op == "call_function"}
    wanted = {"stem", "bn", "block1_conv1", "block1_bn1", "block2_down", "block2_add", "pool", "fc"}
    assert wanted <= names, names
    held = set(program.state_dict) | set(program.constants)
    kind = "weight.values" if form in ("packed", "shrunk") else "weight"
    assert f"block1.conv1.{kind}" in held and "fc.bias" in held, held
    if form != "dense":
        assert {"block1_conv1_weight"} <= names


def test_readable_names_differ() -> None:
    calls = [
        *(Call("a", "conv2d", "stem", ["x"]), Call("b", "relu", "", ["a"])),
        *(Call("c", "conv2d", "block.conv", ["b"]), Call("d", "add", "", ["c", "b"])),
        *(Call("e", "relu", "", ["d"]), Call("f", "relu", "", ["e"])),
        Call("g", "conv2d", "block.conv", ["f"]),
    ]
    assert readable(calls) == {
        **{"a": "stem", "b": "relu", "c": "block.conv", "d": "block.add", "e": "block.relu"},
        **{"f": "block.relu_1", "g": "block.conv.conv2d"},
    }


@pytest.mark.parametrize(
    ("suffix", "options", "match"),
    [
        (".pt2", {"values": "int4"}, r"form of values.*'int4'.*int8"),
        (".pt2", {"training": True, "packed": True}, r"written as it is.*'packed'"),
        (".onnx", {"kernels": True}, r"our kernels run in a \.pt2"),
        (".pt2", {"kernels": True, "shrink": True}, r"plain ops.*choose one"),
        (".safetensors", {"values": "int8"}, r"exact values.*\.pt2 or \.onnx"),
        (".safetensors", {"shrink": True}, r"no graph.*'shrink'"),
    ],
)
def test_options_that_do_not_go_together(
    suffix: str, options: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
    gm = swatfx.compile(nn.Linear(4, 4), "swat-u:0.5,first_dense=False")
    with pytest.raises((ExportError, UnknownNameError), match=match):
        swatfx.export(gm, tmp_path / f"a{suffix}", torch.randn(2, 4), **options)
    assert not list(tmp_path.iterdir())


def test_load_program_refuses_other_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.pt2").write_bytes(b"no program")
    for name in ("a.pt2", "absent.pt2"):
        with pytest.raises(ExportError, match=f"cannot read the program.*{name}"):
            swatfx.load_program(tmp_path / name)
