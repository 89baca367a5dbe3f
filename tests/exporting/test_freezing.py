"""`swatfx.freeze`: what evaluation computes, by kernels and layers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import swatfx
from swatfx import kernels
from swatfx.compiled.module import SwatModule
from swatfx.errors import InputError, SwatError
from swatfx.exporting import Frozen
from tests.nets.kernel_nets import Separable, block, chain, residual

POLICY = "swat-u:0.8,period=4"


class Twice(nn.Module):
    """A convolution that is called twice, behind which one norm or another stands."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(self.conv(self.first(x))))
        return self.two(self.conv(x)).flatten(1)


class Seen(nn.Module):
    """What is before the norm is read elsewhere, too; one norm follows two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.conv, self.other = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        y = self.conv(x)
        z = F.relu(self.norm(y)) + y
        out = z.clone()
        out += self.norm(self.other(z))
        return F.relu(out).flatten(1)


class Odd(nn.Module):
    """Norms that are not folded: of no statistics, of a matrix, before a convolution, hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.first = block(3, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.plain = nn.BatchNorm2d(16, track_running_stats=False)
        self.before, self.late = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1, bias=False)
        self.hooked = nn.BatchNorm2d(16, affine=False)
        self.hooked.register_forward_hook(lambda _, given, made: made * 2)
        self.line, self.flat = nn.Linear(16, 24), nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.conv(self.first(x)))
        x = self.hooked(self.late(self.before(x)))
        out: Tensor = self.flat(self.line(x.mean((2, 3))))
        return out


class Parts(nn.Module):
    """Tracing cannot follow the forward: its children are graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = block(3, 16), block(16, 16), block(16, 24)
        self.line = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x))
        if float(x.detach().sum()) > 1e9:
            return x
        out: Tensor = self.line(self.two(x).mean((2, 3)))
        return out


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "residual": residual,
    "separable": Separable,
    "twice": Twice,
    "seen": Seen,
    "odd": Odd,
    "parts": Parts,
}


def trained(model: nn.Module, policy: str, **options: Any) -> SwatModule:
    """After two steps, so that norms have statistics."""
    torch.manual_seed(0)
    gm = swatfx.compile(model, policy, **options)
    for module in gm.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias, -1, 1)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    for _ in range(2):
        gm(torch.randn(16, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return gm


def assert_same(frozen: Frozen, gm: SwatModule, x: Tensor, near: float = 1e-5) -> None:
    with torch.no_grad():
        true = gm.eval()(x)
        for _ in range(2):
            found = frozen(x)
            assert found.dtype is true.dtype and not found.requires_grad
            assert (found - true).norm() <= near * true.norm()


@pytest.mark.parametrize("chosen", ["sparse", "dense", "auto"])
@pytest.mark.parametrize("policy", [POLICY, "swat-erk:0.8", "rigl:0.8", "meprop:0.8", "dense"])
@pytest.mark.parametrize("name", NETS)
def test_it_computes_what_evaluation_computes(name: str, policy: str, chosen: str) -> None:
    gm = swatfx.compile(NETS[name](), policy, kernels=chosen)
    if policy != "rigl:0.8":  # which wants to be attached
        gm = trained(NETS[name](), policy, kernels=chosen)
    frozen = swatfx.freeze(gm)
    for batch in (1, 3, 16):
        assert_same(frozen, gm, torch.randn(batch, 3, 8, 8))


@pytest.mark.parametrize("name", ["chain", "residual", "separable"])
def test_in_half_precision(name: str) -> None:
    gm = trained(NETS[name](), POLICY, kernels="sparse")
    x = torch.randn(3, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(swatfx.freeze(gm), gm, x, 0.02)
    half = gm.bfloat16()
    assert_same(swatfx.freeze(half), half, x.bfloat16(), 0.03)
    later = swatfx.freeze(gm.float()).bfloat16()
    assert_same(later, gm.bfloat16(), x.bfloat16(), 0.03)


def test_nothing_but_layers_is_left() -> None:
    frozen = swatfx.freeze(trained(residual(), POLICY, kernels="sparse"))
    targets = [str(n.target) for n in frozen.graph_module.graph.nodes if n.op == "call_module"]
    assert not any("swat" in t or "bn" in t for t in targets)
    buffers = dict(frozen.named_buffers())
    assert not any("threshold" in name for name in buffers)
    assert not any("conv1.weight" in name for name, _ in frozen.named_parameters())
    shares = [float((b == 0).float().mean()) for n, b in buffers.items() if "weight" in n]
    assert len(shares) == 7 and all(0.75 < share < 0.85 for share in shares)


def test_the_model_goes_its_own_way() -> None:
    gm = trained(residual(), POLICY)
    before = copy.deepcopy(gm.state_dict())
    frozen = swatfx.freeze(gm)
    assert gm.training
    for name, value in gm.state_dict().items():
        assert torch.equal(value, before[name]), name
    x = torch.randn(4, 3, 8, 8)
    true = frozen(x)
    with torch.no_grad():
        for p in gm.parameters():
            p.mul_(2)
    for module in gm.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    assert torch.equal(frozen(x), true)
    gm(torch.randn(16, 3, 8, 8)).sum().backward()


def test_copies_and_moves_compute_the_same() -> None:
    gm = trained(residual(), POLICY, kernels="sparse")
    frozen = swatfx.freeze(gm)
    x = torch.randn(4, 3, 8, 8)
    true = frozen(x)
    twin = copy.deepcopy(frozen)
    assert torch.equal(twin(x), true)
    assert torch.equal(twin.float()(x), true)
    state = {k: v * 0 if v.is_floating_point() else v for k, v in twin.state_dict().items()}
    twin.load_state_dict(state)
    assert not torch.equal(twin(x), true) and torch.equal(frozen(x), true)


def test_without_compiled_kernels() -> None:
    gm = trained(chain(), POLICY)
    with kernels.reference_only():
        assert_same(swatfx.freeze(gm), gm, torch.randn(3, 3, 8, 8))


def test_torchvision_and_transformer_networks() -> None:
    for build in (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        lambda: torchvision.models.convnext_tiny(num_classes=10),
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128),
    ):
        torch.manual_seed(0)
        gm = swatfx.compile(build(), "swat-u:0.8", kernels="sparse")
        assert_same(swatfx.freeze(gm), gm, torch.randn(2, 3, 32, 32))


def test_what_cannot_be() -> None:
    frozen = swatfx.freeze(swatfx.compile(chain(), POLICY))
    with pytest.raises(InputError, match="does not train"):
        frozen.train()
    assert frozen.eval() is frozen and not frozen.training
    with torch.device("meta"):
        model = chain()
    with pytest.raises(InputError, match="no weights"):
        swatfx.freeze(swatfx.compile(model, POLICY))
    with pytest.raises(SwatError):
        swatfx.freeze(chain())
