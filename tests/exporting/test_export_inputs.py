"""Exports: example inputs, which dimensions are dynamic, and files that cannot be written."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import swatfx
from swatfx.errors import ExportError
from tests.nets.small_nets import TwoInputs, plain

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*dynamic.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned:UserWarning"),
]


class Queries(nn.Module):
    """A batch, and queries whose number the model fixes."""

    def __init__(self, fixed: int = 5) -> None:
        super().__init__()
        self.a = nn.Linear(8, 32)
        self.b = nn.Linear(32, 3)
        self.q = nn.Parameter(torch.randn(fixed, 32))

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).unsqueeze(1) + (self.q + q))
        return y


class Pooled(nn.Module):
    """A tensor without a batch beside one with it; a list of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 32)
        self.b = nn.Linear(32, 3)

    def forward(self, rows: list[Tensor], scale: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(rows[0])) + self.a(rows[1])) * scale
        return y


class Writes(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x.add_(1)))
        return y


def _program(gm: nn.Module, path: pathlib.Path, *args: Any, **kwargs: Any) -> Any:
    swatfx.export(gm, path, *args, **kwargs)
    return torch.export.load(path).module()


def _same(gm: nn.Module, program: Any, *inputs: Any, **named: Any) -> None:
    gm.eval()
    swatfx.refresh(gm)
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs, **named), gm(*inputs, **named))


@pytest.mark.parametrize(("batch", "fixed"), [(4, 5), (5, 5), (1, 5), (4, 1), (1, 1), (2, 1)])
def test_a_fixed_first_dimension_stays_fixed(
    batch: int, fixed: int, tmp_path: pathlib.Path
) -> None:
    gm = swatfx.compile(Queries(fixed), "swat-u:0.5")
    inputs = torch.randn(batch, 8), torch.randn(fixed, 32)
    program = _program(gm, tmp_path / "q.pt2", inputs)
    free = batch > 1 or fixed == 1  # beside others, a batch of one is taken for a constant
    for size in (batch, 3, 7) if free else (batch,):
        _same(gm, program, torch.randn(size, 8), torch.randn(fixed, 32))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_open_first_dimension_is_dynamic(batch: int, tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(Pooled(), "swat-u:0.5")
    make = lambda n: ([torch.randn(n, 8), torch.randn(n, 8)], torch.tensor(2.0))  # noqa: E731
    program = _program(gm, tmp_path / "a.pt2", make(batch))
    for size in (2, 5):
        _same(gm, program, *make(size))


def test_inputs_by_name(tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(TwoInputs(), "swat-u:0.7,first_dense=False")
    names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    make = lambda n: dict(  # noqa: E731
        zip(names, (torch.randn(n, 3, 8, 8), torch.randn(n, 5)), strict=True)
    )
    program = _program(gm, tmp_path / "a.pt2", make(1))
    _same(gm, program, **make(3))


def test_dynamic_shapes_are_the_callers(tmp_path: pathlib.Path) -> None:
    """Image sizes that vary, and a batch that does not."""
    gm = swatfx.compile(nn.Sequential(*plain()[:4]), "swat-u:0.6")
    x = torch.randn(1, 3, 8, 8)
    side = {2: Dim("height", min=4, max=64), 3: Dim("width", min=4, max=64)}
    program = _program(gm, tmp_path / "a.pt2", (x,), dynamic_shapes=(side,))
    _same(gm, program, torch.randn(1, 3, 12, 17))
    with pytest.raises(Exception, match="Guard|shape"):
        program(torch.randn(2, 3, 12, 17))
    static = _program(gm, tmp_path / "b.pt2", (x,), dynamic_shapes=({},))
    _same(gm, static, x)
    with pytest.raises(Exception, match="Guard|shape"):
        static(torch.randn(2, 3, 8, 8))


def test_impossible_dynamic_shapes_are_refused(tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(Queries(), "swat-u:0.5")
    inputs = torch.randn(4, 8), torch.randn(5, 32)
    with pytest.raises(ExportError, match="dynamic_shapes"):
        swatfx.export(gm, tmp_path / "a.pt2", inputs, dynamic_shapes=({}, {0: Dim("n")}))
    with pytest.raises(ExportError, match="dynamic_shapes"):
        swatfx.export(gm, tmp_path / "a.safetensors", dynamic_shapes=({},))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_example_inputs_stay_as_they_are(
    batch: int, training: bool, tmp_path: pathlib.Path
) -> None:
    gm = swatfx.compile(Writes(), "swat-u:0.5")
    for leaf in (False, True):
        x = torch.randn(batch, 8)
        before, version, address = x.clone(), x._version, x.data_ptr()
        x.requires_grad_(leaf and not training)
        inputs = [x]
        swatfx.export(gm, tmp_path / "a.pt2", inputs, training=training)
        assert inputs[0] is x and x.data_ptr() == address and x._version == version
        assert torch.equal(x, before) and x.grad is None
        assert x.requires_grad is (leaf and not training)


FULL = """
import resource, sys, torch, swatfx
from swatfx.errors import SwatError
gm = swatfx.compile(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)), {!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    swatfx.export(gm, {!r}, (torch.randn(2, 64),), **{})
except SwatError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize(
    ("suffix", "options"), [(".pt2", {}), (".pt2", {"training": True}), (".safetensors", {})]
)
def test_a_full_disk_leaves_nothing(
    suffix: str, options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    code = FULL.format("swat-u:0.5", str(path), options)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert "cannot write the file" in done.stdout and str(path) in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"old"
