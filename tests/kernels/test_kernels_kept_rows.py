"""What kernels keep of weights in evaluation: values are no other, and go with the weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import kernels
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.kernels import kept_rows, library
from swatfx.tensors import keeping
from tests.nets.kernel_nets import residual

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
POLICY = "swat-u:0.8,first_dense=False,period=4"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every list of rows that is made to be kept."""
    sizes: list[int] = []
    write = kept_rows._write

    def noting(*args: Any) -> int:
        size = write(*args)
        sizes.append(args[-1].numel())
        return size

    monkeypatch.setattr(kept_rows, "_write", noting)
    return sizes


def formula(gm: SwatModule, layer: nn.Module, x: Tensor) -> Tensor:
    """What a compiled layer is in evaluation, in float64, by the weights that it keeps."""
    (found,) = sparse_layers(gm)
    used = found.weight.detach() * found.keep_now()
    if isinstance(layer, nn.Linear):
        bias = None if layer.bias is None else layer.bias.double()
        return nn.functional.linear(x.double(), used.double(), bias)
    twin = type(layer)(  # type: ignore[call-arg]
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=layer.bias is not None,
    ).double()
    twin.load_state_dict({k: v.double() for k, v in layer.state_dict().items()} | {"weight": used})
    out: Tensor = twin(x.double())
    return out


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(20, 32, 3, padding=1),
    "strided": lambda: nn.Conv2d(20, 32, 3, 2, padding=1, bias=False),
    "1x1": lambda: nn.Conv2d(20, 33, 1),
    "strided 1x1": lambda: nn.Conv2d(20, 33, 1, 2),
    "groups": lambda: nn.Conv2d(20, 32, (3, 1), groups=2),
    "depthwise": lambda: nn.Conv2d(20, 20, 3, padding=1, groups=20),
    "1d": lambda: nn.Conv1d(20, 32, 5, dilation=2),
    "linear": lambda: nn.Linear(20, 33),
}


def data(layer: nn.Module, batch: int) -> Tensor:
    shapes = {nn.Conv2d: (batch, 20, 9, 7), nn.Conv1d: (batch, 20, 17), nn.Linear: (batch, 20)}
    return torch.randn(shapes[type(layer)])


@pytest.mark.usefixtures("each_number_of_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 15, 16, 17, 33])
@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_is_the_formula_however_often(
    name: str, batch: int, dtype: torch.dtype, made: list[int]
) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    gm = swatfx.compile(layer, POLICY, kernels="sparse").eval()
    x = data(layer, batch).to(dtype)
    true = formula(gm, layer, x)
    with torch.no_grad():
        found = [gm(x) for _ in range(3)]
    with torch.inference_mode():
        found.append(gm(x))
    found.append(gm(x).detach())  # with gradients, nothing is kept
    assert all(torch.equal(found[0], other) for other in found[1:])
    limit = 1e-5 if dtype is torch.float32 else 0.01
    assert (found[0].double() - true).norm() <= limit * true.norm()
    assert len([size for size in made if size]) == (name != "depthwise")


def test_what_is_kept_is_of_weights_threads_dtype_and_sizes(made: list[int]) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(nn.Conv2d(16, 32, 3, padding=1), POLICY, kernels="sparse").eval()

    def check(x: Tensor) -> None:
        with torch.no_grad():
            one, again = gm(x), gm(x)
        with kernels.reference_only(), torch.no_grad():
            other = gm(x)
        assert torch.equal(one, again)
        limit = 1e-5 if one.dtype is torch.float32 else 0.01
        assert (one - other).norm() <= limit * other.norm()

    x = torch.randn(2, 16, 8, 8)
    weight = gm.get_parameter("weight")
    writes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: weight.data.mul_(-1.5),
        lambda: weight.data.copy_(torch.randn_like(weight)),
        lambda: weight.detach().add_(0.5),
        lambda: gm.load_state_dict({"weight": torch.randn_like(weight)}, strict=False),
        lambda: setattr(weight, "data", torch.randn_like(weight)),
        lambda: setattr(gm, "weight", nn.Parameter(torch.randn_like(weight))),
    ]
    for write in writes:
        with torch.no_grad():
            write()
        check(x)
    count = len(made)
    with torch.autocast("cpu", torch.bfloat16):
        check(x)
    check(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    check(x)
    torch.set_num_threads(threads)
    check(x)
    assert len([size for size in made[count:] if size]) == 2
    for size in range(3, 12):
        check(torch.randn(2, 16, size, size))
    state = _state(gm)
    assert len(keeping.kept(state) or {}) == kept_rows._MOST


def _state(gm: SwatModule) -> Tensor:
    (layer,) = sparse_layers(gm)
    with torch.no_grad():
        found: Tensor = layer.weight_threshold(layer.weight, torch.zeros(1, dtype=torch.int64))
    return found


def test_an_optimizer_step_frees_what_is_kept() -> None:
    gm = swatfx.compile(nn.Conv2d(16, 32, 3), POLICY, kernels="sparse").eval()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, fused=True)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        before = gm(x)
    kept = keeping.kept(_state(gm))
    assert kept
    gone = weakref.ref(next(iter(kept.values())).made)
    gm.train()(x).sum().backward()
    optimizer.step()
    del kept
    gc.collect()
    assert gone() is None
    with torch.no_grad():
        assert not torch.equal(gm.eval()(x), before)


def test_training_keeps_nothing(made: list[int]) -> None:
    gm = swatfx.compile(residual(), POLICY, kernels="sparse")
    for _ in range(3):
        gm(torch.randn(16, 3, 8, 8)).sum().backward()
    assert not made


def test_held_masks_go_on_as_they_change(made: list[int]) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(nn.Conv2d(16, 32, 3), "rigl:0.8,first_dense=False", kernels="sparse")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    swatfx.attach(gm, optimizer, total_steps=100)
    gm.eval()
    x = torch.randn(2, 16, 8, 8)
    (layer,) = sparse_layers(gm)
    for _ in range(3):
        layer.held_threshold.set_mask(torch.rand_like(layer.weight) < 0.2)
        true = nn.functional.conv2d(x, layer.weight * layer.keep_now(), gm.get_parameter("bias"))
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(gm(x), true)
    assert len([size for size in made if size]) == 3


def test_networks_evaluate_as_under_dense_kernels() -> None:
    torch.manual_seed(0)
    model = residual()
    sparse = swatfx.compile(model, POLICY, kernels="sparse").eval()
    dense = swatfx.compile(model, POLICY, kernels="dense").eval()
    for batch in (1, 16, 1):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)


def test_no_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = swatfx.compile(nn.Conv2d(16, 32, 3), POLICY, kernels="sparse").eval()
    real = library.function

    def function(name: str, *args: Any, **options: Any) -> Callable[..., Any]:
        return (lambda *_: -1) if name == "sparse_conv_rows" else real(name, *args, **options)

    monkeypatch.setattr(library, "function", function)
    with torch.no_grad(), pytest.raises(MemoryError, match="laid out"):
        gm(torch.randn(2, 16, 8, 8))
