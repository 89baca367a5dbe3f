"""Layers below eager code, and every way that eager code may take to them."""

import copy
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from tests.nets.compare import (
    DENSITY_1,
    HALF,
    assert_matches_at_density_1,
    loss_of,
    skipped,
    train_step,
)

torch.set_num_threads(1)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.raw = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.linear(self.fc(x), self.raw)
        return x if mask is None else x * mask


class RawBelow(nn.Module):
    """Eager; one child has a matrix of its own, one takes a mask, one is not a layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = Raw()
        self.masked = Masked()
        self.embed = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            x = self.masked(self.raw(x), mask=torch.ones(4)) + self.masked(x)
        return x + self.embed.weight[0]


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, self.matrix), 0.5, self.training)


def test_functional_layers_and_optional_arguments_below_eager_code() -> None:
    gm = assert_matches_at_density_1(RawBelow(), X)
    assert skipped(gm, X) == {"raw.matrix": None, "masked.fc": None, "masked.raw": None}
    assert gm.eager == {"": "untraceable: control flow on a tensor"}
    assert set(gm.parts) == {"raw", "masked", "masked.fc"}
    gm.train()
    gm.get_submodule("raw").eval()  # the part reads the flag of the module it stands in for
    assert torch.equal(gm.get_submodule("raw")(X), F.linear(X, gm.get_parameter("raw.matrix")))


class Walks(nn.Module):
    """Eager code that does not call what it holds, but what that holds."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
        self.block = Wide()

    def forward(self, x: Tensor, whole: bool) -> Tensor:
        if whole:
            return self.block(self.chain(x))
        for layer in self.chain:
            x = layer(x)
        return self.block.left(x) + self.block.right(x)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_layers_are_sparse_whichever_way_eager_code_takes_to_them() -> None:
    torch.manual_seed(0)
    model = Walks()
    grads = []
    for whole in (True, False):
        model.zero_grad()
        gm = swatfx.compile(model, HALF, example_inputs=(X, whole))
        assert gm.eager == {"": "untraceable: control flow on a tensor"}
        gm.train()
        loss_of(gm(X, whole)).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        layers = swatfx.report(gm, [X, whole]).layers
        assert [(layer.name, layer.skipped) for layer in layers] == [
            ("chain.0", None),
            ("chain.1.1", None),
            ("block.left", None),
            ("block.right", None),
        ]
        assert all(layer.dense_forward_macs == 48 for layer in layers)
        assert all(layer.sparse_forward_macs == 24 for layer in layers)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    # Of two graphs that hold a layer, one call at a time is made: they share its thresholds.
    assert list(gm.swat.get_submodule("chain_0")._modules) == [
        "weight_threshold",
        "activation_threshold",
        "pack",
    ]


class Patched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.conv(x)))


def test_a_forward_set_on_the_instance_is_what_runs() -> None:
    model = Patched()
    x = torch.randn(1, 3, 4, 4)
    model.conv.forward = lambda a: a * 3  # type: ignore[method-assign]
    model.block.forward = MethodType(lambda m, a: m[0](a).tanh(), model.block)  # type: ignore[method-assign]
    gm = swatfx.compile(model, DENSITY_1)
    assert torch.equal(gm(x), model(x))
    reason = "untraceable: forward replaced on the instance"
    assert skipped(gm, x) == {"conv": reason, "block.0": None, "last": None}
    model.forward = MethodType(lambda m, a: m.last(a) * 2, model)  # type: ignore[method-assign]
    gm = swatfx.compile(model, DENSITY_1)
    assert gm.eager[""] == reason
    assert torch.equal(gm(x), model(x))


class SharesAcross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = Masked()
        self.b = Masked()
        self.b.fc = self.a.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if x.shape[0] else x


def test_one_module_below_two_eager_modules() -> None:
    gm = assert_matches_at_density_1(SharesAcross(), X)
    assert skipped(gm, X)["a.fc"] is None
    train_step(swatfx.compile(SharesAcross(), HALF), X)


def test_a_copy_has_parts_of_its_own() -> None:
    model = RawBelow()
    gm = swatfx.compile(model, HALF)
    twin = copy.deepcopy(gm)
    before = gm.eval()(X)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin.eval()(X).any() and torch.equal(gm(X), before)
    twin.train()(X)
    assert (int(twin.swat.clock.iteration), int(gm.swat.clock.iteration)) == (1, 0)
    wide = copy.deepcopy(gm).to(torch.float64)
    assert wide(X.double()).dtype == torch.float64
    assert gm(X).dtype == torch.float32
