"""Exports: what is written computes what eval computes after a refresh, without us."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import swatfx
from swatfx import kernels, meta
from swatfx.compiled.layers import all_plans, sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.errors import ExportError, SwatError, UnknownNameError
from tests.nets.small_nets import (
    EagerMiddle,
    Residual,
    Tied,
    TwoInputs,
    assert_same,
    batches,
    pads,
    plain,
    sgd,
    snapshot,
    train,
)

# torch.onnx's and torch.export's own: nothing that a caller could do differently.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*dynamic.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]
OURS = {torch.ops.swatfx.conv.default, torch.ops.swatfx.linear.default}


def weight_norm() -> nn.Sequential:
    """Computed weights in a convolution and in a linear layer."""
    net = plain()
    parametrizations.weight_norm(net[2])
    parametrizations.weight_norm(net[5])
    return net


def hooked() -> nn.Sequential:
    """A layer that a hook computes the weight of stays a module."""
    net = plain()
    nn.utils.spectral_norm(net[2])
    return net


def _images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 8, 8),)


def _pair(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 3, 8, 8), torch.randn(batch, 5)


def _rows(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 6),)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]], Any]] = {
    "plain": (plain, _images, "swat-u:0.8,period=2"),
    "residual": (Residual, _images, "swat-erk:0.8,period=2"),
    "saw": (Residual, _images, "saw:0.8"),
    "meprop": (plain, _images, "meprop:0.8"),
    "channel": (plain, _images, "swat-u:0.8,weight_selector=channel"),
    "2:4": (plain, _images, "swat-u:0.5,weight_selector=2:4"),
    "pads": (pads, _images, "swat-u:0.6,period=3"),
    "two inputs": (TwoInputs, _pair, "swat-u:0.7,first_dense=False"),
    "tied": (Tied, _rows, "swat-u:0.5,first_dense=False"),
    "parametrized": (weight_norm, _images, "swat-u:0.6"),
    "hooked": (hooked, _images, "swat-u:0.6"),
    "dense": (plain, _images, "dense"),
}


def _trained(name: str) -> tuple[SwatModule, Callable[[int], tuple[Tensor, ...]]]:
    """In the middle of a period, so that thresholds in use are not those of the weights."""
    torch.manual_seed(0)
    build, inputs, policy = NETS[name]
    gm = swatfx.compile(build(), policy)
    optimizer = sgd(gm)
    for _ in range(3):
        optimizer.zero_grad()
        gm(*inputs(4)).square().mean().backward()
        optimizer.step()
    return gm, inputs


def _check_runs(gm: SwatModule, inputs: Any, run: Callable[..., Tensor], exact: bool) -> None:
    swatfx.refresh(gm)
    gm.eval()
    for batch in (1, 2, 5):
        x = inputs(batch)
        with torch.no_grad():
            expected, got = gm(*x), run(*x)
        if exact:
            assert torch.equal(got, expected), batch
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", [1, 4])
@pytest.mark.parametrize("name", NETS)
def test_pt2_computes_what_eval_computes(name: str, example: int, tmp_path: pathlib.Path) -> None:
    gm, inputs = _trained(name)
    before, mode = snapshot(gm), gm.training
    code = gm.code
    swatfx.export(gm, tmp_path / "a.pt2", inputs(example))
    assert_same(snapshot(gm), before)
    assert gm.training == mode and gm.code == code
    program = torch.export.load(tmp_path / "a.pt2")
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets and all(t.startswith(("aten.", "<built-in")) for t in targets), targets
    assert not any("swat" in t for t in targets)
    _check_runs(gm, inputs, program.module(), exact=True)


@pytest.mark.parametrize("name", ["plain", "residual", "tied"])
def test_pt2_holds_exact_top_k_weights_and_no_dense_ones(name: str, tmp_path: pathlib.Path) -> None:
    gm, inputs = _trained(name)
    swatfx.export(gm, tmp_path / "a.pt2", inputs(2))
    program = torch.export.load(tmp_path / "a.pt2")
    swatfx.refresh(gm)
    stored = [v for v in {**program.state_dict, **program.constants}.values()]
    tensors = [v for v in stored if isinstance(v, Tensor)]
    for layer in sparse_layers(gm):
        wanted = layer.weight.detach() * layer.keep()
        alike = [v for v in tensors if v.shape == wanted.shape]
        assert any(torch.equal(v, wanted) for v in alike), layer.plan.name
        if not layer.weight_density.is_dense:
            assert not any(torch.equal(v, layer.weight) for v in alike), layer.plan.name
        count = layer.weight_density.count(layer.weight.numel())
        assert int((wanted != 0).sum()) == count


def test_pt2_runs_without_swatfx(tmp_path: pathlib.Path) -> None:
    gm, inputs = _trained("residual")
    swatfx.export(gm, tmp_path / "a.pt2", inputs(1))
    swatfx.refresh(gm)
    x = inputs(3)[0]
    with kernels.reference_only():  # the program is plain torch: so to the bit
        torch.save((x, gm.eval()(x).detach()), tmp_path / "io.pt")
    script = (
        "import sys, torch\n"
        f"x, y = torch.load({str(tmp_path / 'io.pt')!r})\n"
        f"program = torch.export.load({str(tmp_path / 'a.pt2')!r})\n"
        "assert torch.equal(program.module()(x), y)\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('swatfx', 'passes')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_pt2_of_a_model_with_eager_parts(tmp_path: pathlib.Path) -> None:
    """Control flow on values cannot be exported; control flow on Python values can."""
    gm = swatfx.compile(EagerMiddle(), "swat-u:0.8")
    with pytest.raises(ExportError, match=r"torch\.export cannot follow.*\.safetensors"):
        swatfx.export(gm, tmp_path / "a.pt2", _images(2))
    assert not list(tmp_path.iterdir())

    class Repeat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x.shape[1]) - 2):  # tracing cannot know it, export can
                y = self.inner(x)
            return y

    gm = swatfx.compile(Repeat(), "swat-u:0.8,first_dense=False")
    assert gm.eager
    train(gm, sgd(gm), batches(2))
    before = snapshot(gm)
    swatfx.export(gm, tmp_path / "a.pt2", _images(1))
    assert_same(snapshot(gm), before)
    program = torch.export.load(tmp_path / "a.pt2")
    _check_runs(gm, _images, program.module(), exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_onnx_computes_what_eval_computes(name: str, tmp_path: pathlib.Path) -> None:
    import onnxruntime

    gm, inputs = _trained(name)
    before = snapshot(gm)
    swatfx.export(gm, tmp_path / "a.onnx", inputs(1))
    assert_same(snapshot(gm), before)
    assert gm.training
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    names = [x.name for x in session.get_inputs()]

    def run(*x: Tensor) -> Tensor:
        feed = {n: t.numpy() for n, t in zip(names, x, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    _check_runs(gm, inputs, run, exact=False)


@pytest.mark.slow
def test_optional_packages_of_the_long_tests_are_there() -> None:
    """The long tests fail, not skip, where an extra is missing."""
    import onnx
    import onnxruntime
    import onnxscript
    import safetensors

    assert all((onnx, onnxruntime, onnxscript, safetensors))


@pytest.mark.parametrize("name", [n for n in NETS if n != "parametrized"])
def test_safetensors_round_trip(name: str, tmp_path: pathlib.Path) -> None:
    gm, inputs = _trained(name)
    before = snapshot(gm)
    swatfx.export(gm, tmp_path / "a.safetensors")
    assert_same(snapshot(gm), before)
    state = swatfx.load_sparse(tmp_path / "a.safetensors")
    model = NETS[name][0]()
    model.load_state_dict(state, strict=True)
    model.eval()
    _check_runs(gm, inputs, model, exact=True)


def test_safetensors_is_smaller(tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(nn.Linear(256, 256), "swat-u:0.9,first_dense=False")
    swatfx.export(gm, tmp_path / "a.safetensors")
    dense = 256 * 256 * 4  # of which a tenth stays, and a bit a weight
    assert (tmp_path / "a.safetensors").stat().st_size < dense * (0.1 + 1 / 32) + 4096


def test_safetensors_of_computed_weights_is_refused(tmp_path: pathlib.Path) -> None:
    gm, _ = _trained("parametrized")
    with pytest.raises(ExportError, match=r"layer '2'.*parametrized.*\.pt2"):
        swatfx.export(gm, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_safetensors_of_a_tied_embedding_is_refused(tmp_path: pathlib.Path) -> None:
    """The embedding reads the weight dense, the head sparse: .pt2 can hold both."""

    class Tongue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.hidden = nn.Linear(8, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(self.embed(x)).relu())

    gm = swatfx.compile(Tongue(), "swat-u:0.6,first_dense=False")
    with pytest.raises(ExportError, match=r"layer 'head'.*reads 'embed\.weight' dense"):
        swatfx.export(gm, tmp_path / "a.safetensors")

    def words(batch: int) -> tuple[Tensor, ...]:
        return (torch.randint(12, (batch, 3)),)

    swatfx.export(gm, tmp_path / "a.pt2", words(1))
    _check_runs(gm, words, torch.export.load(tmp_path / "a.pt2").module(), exact=True)


def test_load_sparse_refuses_other_files(tmp_path: pathlib.Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ExportError, match="not a file that swatfx.export wrote"):
        swatfx.load_sparse(tmp_path / "foreign.safetensors")
    gm, _ = _trained("plain")
    swatfx.export(gm, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("short.safetensors", "absent.safetensors"):
        with pytest.raises(ExportError, match=name):
            swatfx.load_sparse(tmp_path / name)


@pytest.mark.parametrize("name", [n for n in NETS if n != "dense"])
def test_training_export_is_the_plan(name: str, tmp_path: pathlib.Path) -> None:
    gm, inputs = _trained(name)
    before = snapshot(gm)
    swatfx.export(gm, tmp_path / "a.pt2", inputs(1), training=True)
    assert_same(snapshot(gm), before)
    program = torch.export.load(tmp_path / "a.pt2")
    plans = all_plans(gm)
    calls = [n for n in gm.graph.nodes if n.target in OURS]
    ops = [n for n in program.graph.nodes if n.target in OURS]
    assert len(ops) == len(calls) > 0
    for node in program.graph.nodes:
        record = meta.read(node)
        if node.target in OURS:
            assert record.role == "op" and record.plan == plans[record.plan.name]
        else:
            assert record == meta.NodeRecord(), node
    assert [meta.read(n) for n in ops] == [meta.read(n) for n in calls]


def test_training_export_loads_in_a_fresh_process(tmp_path: pathlib.Path) -> None:
    gm, inputs = _trained("residual")
    swatfx.export(gm, tmp_path / "a.pt2", inputs(2), training=True)
    script = (
        "import torch, swatfx\n"
        f"program = torch.export.load({str(tmp_path / 'a.pt2')!r})\n"
        "ours = [n for n in program.graph.nodes if str(n.target).startswith('swatfx.conv')]\n"
        "assert len(ours) == 7, len(ours)\n"
        "y = program.module()(torch.randn(3, 3, 8, 8))\n"
        "y.sum().backward()\n"
        "assert y.shape == (3, 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_export_through_wrappers_and_single_tensor(tmp_path: pathlib.Path) -> None:
    gm, inputs = _trained("plain")
    swatfx.export(torch.compile(gm, backend="eager"), str(tmp_path / "a.pt2"), inputs(2)[0])
    _check_runs(gm, inputs, torch.export.load(tmp_path / "a.pt2").module(), exact=True)


def test_export_says_what_is_wrong(tmp_path: pathlib.Path) -> None:
    gm, inputs = _trained("plain")
    with pytest.raises(UnknownNameError, match=r"export format.*'\.onn'.*did you mean \.onnx"):
        swatfx.export(gm, tmp_path / "a.onn", inputs(1))
    with pytest.raises(ExportError, match=r"wants example inputs"):
        swatfx.export(gm, tmp_path / "a.pt2")
    with pytest.raises(ExportError, match=r"written as \.pt2"):
        swatfx.export(gm, tmp_path / "a.onnx", inputs(1), training=True)
    with pytest.raises(SwatError, match="not a compiled model"):
        swatfx.export(plain(), tmp_path / "a.pt2", inputs(1))
    with pytest.raises(ExportError, match=r"\(1, 4, 8, 8\)|torch\.export cannot follow"):
        swatfx.export(gm, tmp_path / "a.pt2", (torch.randn(1, 4, 8, 8),))
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_of_sparse_weights_is_refused(tmp_path: pathlib.Path) -> None:
    """Any bit: in a value, a mask, a name, what the file says of itself."""
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    gm = swatfx.compile(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), "swat-u:0.5")
    swatfx.export(gm, path)
    whole, want = path.read_bytes(), swatfx.load_sparse(path)
    generator = torch.Generator().manual_seed(0)
    for bit in torch.randint(8 * len(whole), (400,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = swatfx.load_sparse(path)
        except ExportError:
            continue
        assert found.keys() == want.keys(), f"bit {bit}"
        assert all(torch.equal(found[name], want[name]) for name in want), f"bit {bit}"


def test_a_file_of_sparse_weights_without_a_checksum_loads(tmp_path: pathlib.Path) -> None:
    """As versions before the checksum wrote it."""
    safetensors = pytest.importorskip("safetensors.torch")
    path, old = tmp_path / "a.safetensors", tmp_path / "old.safetensors"
    gm = swatfx.compile(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), "swat-u:0.5")
    swatfx.export(gm, path)
    with pytest.importorskip("safetensors").safe_open(str(path), framework="pt") as file:
        about = {k: v for k, v in file.metadata().items() if k != "sha256"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.save_file(tensors, str(old), about)
    want, found = swatfx.load_sparse(path), swatfx.load_sparse(old)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_sparse_weights_load_into_a_model_or_leave_it_as_it_was(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("safetensors")
    gm, inputs = _trained("residual")
    swatfx.export(gm, tmp_path / "a.safetensors")
    model = NETS["residual"][0]()
    assert swatfx.load_sparse(tmp_path / "a.safetensors", model) is model
    _check_runs(gm, inputs, model.eval(), exact=True)
    other = plain()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ExportError, match="of another model.*more"):
        swatfx.load_sparse(tmp_path / "a.safetensors", other)
    assert_same(other.state_dict(), before)


def test_numpy_reads_sparse_weights_by_the_lines_of_the_page(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("safetensors")
    gm, _ = _trained("residual")
    swatfx.export(gm, tmp_path / "a.safetensors")
    want = swatfx.load_sparse(tmp_path / "a.safetensors")
    page = (pathlib.Path(swatfx.__file__).parent / "exporting" / "README.md").read_text()
    lines = page.split("<!-- numpy reader -->\n```python\n")[1].split("```")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 20
    assert "torch" not in lines and "swatfx" not in lines
    scope: dict[str, Any] = {}
    exec(lines, scope)
    found = scope["read"](tmp_path / "a.safetensors")
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.numpy().dtype and (found[name] == value.numpy()).all()
