"""The page swatfx/ops/README.md: its code is the compiled layer, and what it lists is there.

The code is read from the page, and held against `swatfx.compile` and against plain formulas.
"""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import kernels, ops
from swatfx.compiled.layers import sparse_layers
from swatfx.ops import calls
from swatfx.ops.calls import Call, SparseCall
from swatfx.tensors import bits
from tests.nets.second_method import (
    as_double,
    assert_close,
    forward,
    input_gradient,
    packs,
    top,
    weight_gradient,
)

torch.set_num_threads(1)
PAGE = Path(ops.__file__).parent / "README.md"
TEXT = PAGE.read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
S, PERIOD, STEPS = 0.75, 3, 7


def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(CODE, str(PAGE), "exec"), names)
    return names


SwatLayer = page()["SwatLayer"]

# ---- The code is the compiled layer --------------------------------------------------------------


def layers() -> list[nn.Module]:
    """Wide enough for sparse kernels; for inputs (16, 16, 8, 8)."""
    torch.manual_seed(3)
    return [
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 2, dilation=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 16),
    ]


def as_page(layer: nn.Module) -> nn.Module:
    takes_part = isinstance(layer, nn.Conv2d | nn.Linear)
    return SwatLayer(layer, S, PERIOD) if takes_part else layer


def as_compiled(model: nn.Module, kind: str) -> nn.Module:
    policy = swatfx.swat_u(S, first_dense=False, period=PERIOD)
    gm = swatfx.compile(model, policy, kernels=kind)
    # What was asked for is what runs.
    assert {layer.plan.kernels.partition(":")[0] for layer in sparse_layers(gm)} == {kind}
    return gm


def train(model: nn.Module, draw: Callable[..., Tensor], **options: Any) -> list[list[Tensor]]:
    """[output, gradients of the input and of every parameter] of each step, then of evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), **options)
    found = []
    for step in range(STEPS):
        model.train(step < STEPS - 1)
        torch.manual_seed(step)
        x = draw(16, 16, 8, 8).requires_grad_()
        y = model(x)
        optimizer.zero_grad()
        y.backward(draw(*y.shape))
        grads = [x.grad, *(p.grad for p in model.parameters())]
        assert all(g is not None for g in grads)
        found.append([t.detach().clone() for t in (y, *grads)])
        optimizer.step()
    return found


def normal(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_page_is_the_compiled_network(dtype: torch.dtype) -> None:
    """Dense kernels: bit for bit, while thresholds age and are refreshed."""
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-2}
    plain = nn.Sequential(*map(as_page, layers())).to(dtype)
    gm = as_compiled(nn.Sequential(*layers()).to(dtype), "dense")
    expected, found = (train(model, normal(dtype), **options) for model in (plain, gm))
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other), step


needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")


@needs_kernels
def test_the_page_is_what_sparse_kernels_run() -> None:
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-2}
    plain = nn.Sequential(*map(as_page, layers()))
    gm = as_compiled(nn.Sequential(*layers()), "sparse")
    expected, found = (train(model, normal(torch.float32), **options) for model in (plain, gm))
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).abs().max() <= 3e-6 * other.abs().max()


def whole(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).float()


@needs_kernels
@pytest.mark.parametrize("kind", ["conv", "strided", "linear"])
def test_sparse_kernels_sum_whole_numbers_alike(kind: str) -> None:
    """Sums that are exact in any order: bit for bit, ties at the threshold and zeros among them."""
    layer: nn.Module = nn.Linear(16 * 8 * 8, 16)
    if kind != "linear":
        steps = (1, 1) if kind == "conv" else (2, 2, 2, 2)  # stride, padding, dilation, groups
        layer = nn.Conv2d(16, 32, 3, *steps)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(whole(*p.shape))
    model = nn.Sequential(nn.Flatten(), layer) if kind == "linear" else nn.Sequential(layer)
    plain = nn.Sequential(*map(as_page, copy.deepcopy(model)))
    exact = nn.Sequential(*map(as_page, copy.deepcopy(model).double()))
    gm = as_compiled(model, "sparse")
    options = {"lr": 2**-4, "momentum": 0.5}
    found = [train(model, whole, **options) for model in (gm, plain)]
    found.append(train(exact, lambda *shape: whole(*shape).double(), **options))
    for sparse, dense, double in zip(*found, strict=True):
        for one, other, third in zip(sparse, dense, double, strict=True):
            assert torch.equal(one, other) and torch.equal(one.double(), third)


# ---- The code is the method ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv2d", "grouped", "linear", "sequence"])
def test_the_page_is_the_formulas(name: str) -> None:
    """Of `tests.nets.second_method`, which shares no code with the page; and it keeps packs."""
    layer, x, call = as_double(name)
    y = SwatLayer(layer, S)(x)
    g = torch.randn_like(y)
    kept = y.grad_fn.saved_tensors[-1]
    y.backward(g)
    grads = [x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad]
    with torch.no_grad():
        a, w, b = x.detach(), layer.weight, layer.bias
        keep = top(a.abs(), S)
        w_s, a_s = w * top(w.abs(), S), a * keep
        assert_close(y, forward(a, w_s, b, call))
        assert_close(grads[0], input_gradient(g, w_s, a, call))
        assert_close(grads[1], weight_gradient(g, a_s, w, call))
        assert int((grads[1] != 0).sum()) > int((w_s != 0).sum())  # inactive ones learn, too
        if b is not None:
            features = 1 if w.dim() > 2 else g.dim() - 1
            assert_close(grads[2], g.sum([d for d in range(g.dim()) if d != features]))
        assert torch.equal(kept, a[keep])
    gm = swatfx.compile(nn.Sequential(layer), swatfx.swat_u(S, first_dense=False))
    with packs(gm) as seen:
        gm(x)
    (packed,) = seen
    assert packed is not None
    assert torch.equal(bits.unpack(packed, a.numel(), a.dtype).view(a.shape), a_s)


# ---- The page itself -----------------------------------------------------------------------------


def test_the_code_runs_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", CODE], cwd=tmp_path, check=True)


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)]*)\)", TEXT.replace(CODE, ""))
    assert links
    for link in links:
        assert not Path(link).is_absolute() and (PAGE.parent / link).is_file(), link


def test_the_table_tells_of_every_marked_line() -> None:
    marks = re.findall(r"# \((\d+)\)", CODE)
    rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    told = [n for row in rows for n in re.findall(r"\((\d+)\)", row.split("|")[1])]
    assert sorted(marks) == told == [str(i + 1) for i in range(len(marks))]


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].partition("\n## ")[0]


def test_every_op_is_listed() -> None:
    named = re.findall(r"`(\w+)`", section("The ops"))
    assert sorted(named) == sorted(ops.__all__)


def test_every_record_and_every_option_of_the_layers_is_listed() -> None:
    text = section("What else an op is told")
    records = [c for _, c in inspect.getmembers(calls, inspect.isclass) if issubclass(c, Call)]
    assert set(re.findall(r"`(\w+Call)`", text)) == {
        c.__name__ for c in records if c not in (Call, SparseCall)
    }
    layers_told = {*calls.ConvCall.__match_args__, *calls.LinearCall.__match_args__}
    assert layers_told <= set(re.findall(r"`(\w+)`", text))
