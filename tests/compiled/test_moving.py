"""A compiled model that is moved to another device or dtype chooses kernels and layouts anew."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import kernels, meta
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.compiled.parts import all_parts
from swatfx.compiled.state import Pack
from swatfx.ops.layout import laid_out
from tests.nets.small_nets import EagerMiddle, Residual, loss_of, pads, plain, sgd

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": Residual,
    "pads": pads,
    "eager middle": EagerMiddle,
}


def _wishes(gm: SwatModule) -> list[str]:
    """All that only suits the sparse kernels, which are float32 on a CPU."""
    found = []
    for _, part in all_parts(gm):
        for node in part.graph.nodes:
            record = meta.read(node)
            if node.target is laid_out or {"layout", "sparse_kernels"} & set(node.kwargs):
                found.append(str(node.target))
            if record.role == "op" and record.plan is not None and record.plan.kernels == "sparse":
                found.append(f"plan of {node.name}")
    found += [n for n, m in gm.swat.named_modules() if isinstance(m, Pack) and "batch" in m.layout]
    return found


def _codes(gm: SwatModule) -> list[str]:
    return [re.sub(r"laid_out(_\d+)?", "laid_out", part.code) for _, part in all_parts(gm)]


def _results(gm: SwatModule, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    gm.zero_grad()
    y = gm(x)
    loss_of(y).backward()
    return y.detach(), {n: p.grad for n, p in gm.named_parameters() if p.grad is not None}


@pytest.mark.skipif(not kernels.available(), reason="needs compiled kernels")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_in_another_dtype(name: str, dtype: torch.dtype) -> None:
    """As those of a model that was compiled in it, to the bit; float64 has no sparse kernels."""
    torch.manual_seed(0)
    model = NETS[name]()
    gm = swatfx.compile(model, "swat-u:0.8,period=2", kernels="sparse")
    assert _wishes(gm)
    own = swatfx.compile(copy.deepcopy(model).to(dtype), "swat-u:0.8,period=2", kernels="sparse")
    gm.to(dtype)
    swatfx.refresh(gm)
    assert _wishes(gm) == _wishes(own)
    assert bool(_wishes(gm)) == (dtype is torch.bfloat16)
    assert _codes(gm) == _codes(own)
    y, grads = _results(gm, X.to(dtype))
    want, wanted = _results(own, X.to(dtype))
    assert y.dtype == dtype and torch.equal(y, want)
    for key, grad in wanted.items():
        assert torch.equal(grads[key], grad), key


@pytest.mark.skipif(not kernels.available(), reason="needs compiled kernels")
@pytest.mark.parametrize("name", NETS)
def test_and_back(name: str) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(NETS[name](), "swat-u:0.8", kernels="sparse")
    reference = copy.deepcopy(gm)
    code, wishes = _codes(gm), _wishes(gm)
    gm.double().float()
    assert _codes(gm) == code and _wishes(gm) == wishes
    for layer in sparse_layers(gm):
        assert layer.plan.kernels in ("sparse", *(r.plan.kernels for r in sparse_layers(reference)))
    one, two = _results(gm, X), _results(reference, X)
    assert torch.equal(one[0], two[0])
    for key, grad in two[1].items():
        assert torch.equal(one[1][key], grad), key


def test_density_1_equals_eager_in_float64() -> None:
    torch.manual_seed(0)
    model = Residual()
    gm = swatfx.compile(model, "swat-u:0.0", kernels="sparse").double()
    eager = copy.deepcopy(model).double()
    x = X.double()
    torch.testing.assert_close(gm(x), eager(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["swat-u:0.8,period=100", "static:0.8"])
@pytest.mark.parametrize("selector", ["nchw", "channel"])
def test_over_meta_and_back(policy: str, selector: str) -> None:
    """Weights are lost on the way, and what state there is belongs to those that come after."""
    torch.manual_seed(0)
    gm = swatfx.compile(plain(), f"{policy},weight_selector={selector}")
    if policy.startswith("static"):
        swatfx.attach(gm, sgd(gm))
    state = copy.deepcopy(gm.state_dict())
    gm.to("meta")
    assert gm.eval()(X.to("meta")).is_meta
    gm.to_empty(device="cpu")
    gm.load_state_dict(state)
    for name, value in gm.state_dict().items():
        assert torch.equal(value, state[name]), name
    gm.to("meta").to_empty(device="cpu")
    for layer in gm.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.reset_parameters()
    swatfx.refresh(gm)
    for layer in sparse_layers(gm):
        planned = layer.weight_density.value
        assert float(layer.keep().double().mean()) == pytest.approx(planned, abs=0.06)


def test_a_model_compiled_on_meta(tmp_path: Any) -> None:
    with torch.device("meta"):
        model = plain()
    gm = swatfx.compile(model, "swat-u:0.8,period=100,weight_selector=channel")
    gm.to_empty(device="cpu")
    torch.manual_seed(0)
    source = plain()
    gm.load_state_dict(source.state_dict())
    other = swatfx.compile(source, "swat-u:0.8,period=100,weight_selector=channel")
    torch.testing.assert_close(gm(X), other(X), rtol=1e-4, atol=1e-5)
    for one, two in zip(sparse_layers(gm), sparse_layers(other), strict=True):
        assert torch.equal(one.keep(), two.keep())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NETS)
def test_to_a_gpu_and_back(name: str) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(NETS[name](), "swat-u:0.8", kernels="sparse").double()
    reference, before = _results(copy.deepcopy(gm), X.double()), _codes(gm)
    gm.cuda()
    assert not _wishes(gm)
    y, grads = _results(gm, X.double().cuda())
    torch.testing.assert_close(y.cpu(), reference[0], rtol=1e-9, atol=1e-9)
    for key, grad in reference[1].items():
        torch.testing.assert_close(grads[key].cpu(), grad, rtol=1e-7, atol=1e-9)
    gm.cpu()
    assert _codes(gm) == before
    gm.float().cuda()
    assert not _wishes(gm)
    gm(X.cuda())
    gm.cpu()
    assert _wishes(gm) or not kernels.available()
    gm(X)
