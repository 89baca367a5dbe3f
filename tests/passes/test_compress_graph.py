"""compress_saves: what the graph becomes, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import swatfx
from passes.compress_saves import compress_saves
from swatfx import pipeline
from swatfx.compiled import saves
from swatfx.compiled.module import SwatModule
from swatfx.compiled.parts import all_parts
from swatfx.passing import Context
from tests.nets.saving_nets import (
    NETS,
    POLICY,
    Functions,
    Preactivated,
    inplace,
    leaves,
    pair,
)
from tests.nets.small_nets import Residual, assert_same, batches, sgd, snapshot, train

# Values are compared bit for bit.
pytestmark = pytest.mark.usefixtures("reference_kernels")


# ---- What the graph becomes ----------------------------------------------------------------------

GOLDEN = """
input_1 = input
step = self.swat.clock(input_1)
_0 = getattr(self, "0")(input_1)
_2 = self.swat.saves.of_1(_0, relu = True, inplace = True)
_3 = self.swat.saves.max_pool2d(_2, (3, 3), (2, 2), (1, 1), (1, 1), False)
_5 = self.swat.saves.relu(_4, inplace = True)
_8 = self.swat.saves.of_7(_6, relu = True, inplace = True)
_9 = self.swat.saves.avg_pool2d(_8, (2, 2), (2, 2), (0, 0), False, True, None)
_10 = getattr(self, "10")(_9)
_11 = self.swat.saves.of_11(_10)
return _12
""".strip()


def test_golden_graph() -> None:
    gm = swatfx.compile(inplace(), POLICY)
    lines = [line.strip().partition(";")[0] for line in gm.code.strip().splitlines()[1:]]
    shown = ("_t =", "_kept =", "weight =", "bias =", "swatfx.conv", "swatfx.linear")
    assert "\n".join(x for x in lines if not any(s in x for s in shown)) == GOLDEN


def test_functions_are_recognised() -> None:
    gm = swatfx.compile(Functions(), POLICY)
    assert sorted(leaves(gm).values()) == sorted(
        ["Norm"] * 4 + ["Relu", "MaxPool2d", "AvgPool2d", "Dropout", "Dropout"]
    )
    code = gm.code
    assert code.count("residual = ") == 3 and code.count("relu = True") == 4
    assert "F.relu" not in code and "torch.relu" not in code and "operator.iadd" not in code


def test_a_norm_called_twice_is_one_leaf() -> None:
    gm = swatfx.compile(Preactivated(), POLICY)
    assert gm.code.count("self.swat.saves.bn3(") == 2
    assert [n for n, _ in gm.swat.saves.named_children()] == ["bn1", "bn2", "bn3"]
    assert "self.swat.saves.bn3(conv1, residual = bn3, relu = True)" in gm.code


class Ordered(nn.Module):
    """One norm twice: its ReLU behind the second call does not move the first call behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.bn, self.out = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn(self.a(x))
        second = self.bn(self.b(x))
        return self.out(F.relu(first) * second)


def test_calls_of_one_norm_keep_their_order() -> None:
    torch.manual_seed(0)
    model = Ordered()
    passes = [p for p in pipeline.default_passes() if p is not compress_saves]
    policy = "swat-u:0.9"
    without = swatfx.compile(copy.deepcopy(model), policy, passes=passes)
    gm = swatfx.compile(model, policy)
    assert gm.code.count("self.swat.saves.bn(") == 2 and "relu = True" not in gm.code
    assert train(gm, sgd(gm), batches(2)) == train(without, sgd(without), batches(2))
    assert_same(snapshot(gm), snapshot(without))


def test_names_that_are_taken() -> None:
    net = nn.Sequential()
    net.add_module("saves", nn.Conv2d(3, 4, 3))
    net.add_module("relu", nn.BatchNorm2d(4))
    net.add_module("act", nn.ReLU())
    net.add_module("act2", nn.ReLU())
    net.add_module("batch_norm", nn.Dropout(0.1))
    gm = swatfx.compile(net, "swat-u:0.5,first_dense=False")
    assert isinstance(gm.swat.saves_1, saves.Saves)
    gm(torch.randn(2, 3, 5, 5)).sum().backward()


@pytest.mark.parametrize("name", NETS)
def test_second_run_changes_nothing(name: str) -> None:
    gm, _ = pair(name)
    code = [(path, part.code) for path, part in all_parts(gm)]
    children = [n for n, _ in gm.swat.named_modules()]
    result = compress_saves(gm, Context(swatfx.swat_u(0.9)))
    assert not result.modified
    assert [(path, part.code) for path, part in all_parts(gm)] == code
    assert [n for n, _ in gm.swat.named_modules()] == children


@pytest.mark.parametrize(
    "policy",
    [
        "dense",
        "swat-u:0",
        "swat-u:0,first_dense=False",
        "meprop:0.9",
        "swat-u:0.9,activation_sparsity=0",
    ],
)
def test_nothing_packed_nothing_rewritten(policy: str) -> None:
    gm = swatfx.compile(Residual(0.5), policy)
    assert not leaves(gm) and "saves" not in gm.code
    records = {r.name: r.notes for r in gm.__dict__["pass_records"]}
    assert "no weight gradient is sparse" in records["compress_saves"][0]


def test_one_packed_layer_is_enough() -> None:
    policy = swatfx.per_layer({"block2.conv2": "swat-u:0.9,first_dense=False"})
    assert leaves(swatfx.compile(Residual(), policy))


# ---- What stays as it is -------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def _small(norm: nn.Module, act: nn.Module) -> nn.Sequential:
    """Ends in its largest layer, so that there is one to pack."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, act, nn.Conv2d(8, 8, 3), nn.Flatten())


def test_modules_with_a_life_of_their_own_stay() -> None:
    calls = []
    hooked, hooked_relu = nn.BatchNorm2d(8), nn.ReLU()
    hooked.register_forward_hook(lambda *_: calls.append("norm"))
    hooked_relu.register_forward_pre_hook(lambda *_: calls.append("relu"))
    parametrized = nn.BatchNorm2d(8)
    parametrize.register_parametrization(parametrized, "weight", Scaled())
    patched = nn.BatchNorm2d(8)
    patched.forward = lambda x: x + 1  # type: ignore[method-assign]
    for norm in (hooked, parametrized, patched, OwnNorm(8), nn.SyncBatchNorm(8)):
        gm = swatfx.compile(_small(norm, nn.ReLU()), POLICY)
        assert "NormOf" not in leaves(gm).values(), type(norm)
        if not isinstance(norm, nn.SyncBatchNorm):
            assert_matches_eager(gm, _small(copy.deepcopy(norm), nn.ReLU()))
    gm = swatfx.compile(_small(nn.BatchNorm2d(8), hooked_relu), POLICY)
    assert list(leaves(gm).values()) == ["NormOf"] and "relu = True" not in gm.code
    assert calls.count("norm") == 2
    gm(torch.randn(2, 3, 8, 8))
    assert calls.count("relu") == 1
    for act in (nn.ReLU6(), nn.LeakyReLU(), nn.GELU(), nn.Dropout2d()):
        gm = swatfx.compile(_small(nn.BatchNorm2d(8), act), POLICY)
        assert list(leaves(gm).values()) == ["NormOf"]


def assert_matches_eager(gm: SwatModule, model: nn.Module) -> None:
    """The norm's part of both, which the sparse layer does not reach: forwards of the buffers."""
    model.load_state_dict(swatfx.dense_state_dict(gm))
    x = torch.randn(4, 3, 8, 8)
    gm.train()(x), model.train()(x)
    for name, value in model.named_buffers():
        assert torch.equal(gm.get_buffer(name), value), name


def test_indices_and_late_arguments_stay() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.pool = nn.MaxPool2d(2, return_indices=True)
            self.fc = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y, where = self.pool(self.conv(x))
            z = F.max_pool2d(self.fc(y), y.shape[-1])
            return F.max_pool2d(z, 1, return_indices=True)[0] + where.sum()

    gm = swatfx.compile(Pools(), POLICY)
    assert leaves(gm) == {}
    assert gm(torch.randn(2, 3, 8, 8)).shape == (2, 8, 1, 1)


def test_windows_of_more_than_a_byte_of_cells() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(17), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2))
    gm = swatfx.compile(net, POLICY)
    passes = [p for p in pipeline.default_passes() if p is not compress_saves]
    without = swatfx.compile(copy.deepcopy(net), POLICY, passes=passes)
    x = torch.randn(2, 3, 34, 34)
    assert torch.equal(gm(x), without(x))
    unbatched = torch.randn(3, 34, 34)
    assert torch.equal(gm(unbatched), without(unbatched))


class Reads(nn.Module):
    """In-place ReLUs on tensors that others read, before, after, or under another name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "input":
            self.relu(x)
            return self.b(self.a(x))
        a = self.a(x)
        if self.kind == "later":
            y = self.relu(a)
            return self.b(y) + a
        if self.kind == "view":
            y = a.view(a.shape)
            self.relu(y)
            return self.b(a)
        if self.kind == "norm later":
            y = self.bn(a)
            z = self.relu(y)
            return self.b(z) + y
        if self.kind == "written between":
            y = self.bn(a)
            a2 = a.detach()
            a2.mul_(2)
            return self.b(F.relu(y + a2))
        if self.kind == "residual written":
            y = self.bn(a)
            other = x.mean() + a.detach()
            z = y + other
            other.mul_(3)
            return self.b(F.relu(z)) + other
        if self.kind == "total read":
            y = self.bn(a) + a
            return self.b(F.relu(y)) + y
        if self.kind == "sum first":
            y = a * 1
            y += self.bn(a)
            return self.b(F.relu(y))
        assert self.kind == "earlier"
        y = a.mean()
        return self.b(self.relu(a)) + y


KINDS = [
    "input",
    "later",
    "view",
    "norm later",
    "written between",
    "residual written",
    "total read",
    "sum first",
    "earlier",
]


@pytest.mark.filterwarnings("ignore:.*non-leaf.*")
@pytest.mark.parametrize("kind", KINDS)
def test_writes_that_others_see(kind: str) -> None:
    torch.manual_seed(0)
    model = Reads(kind)
    passes = [p for p in pipeline.default_passes() if p is not compress_saves]
    without = swatfx.compile(copy.deepcopy(model), POLICY, passes=passes)
    gm = swatfx.compile(model, POLICY)
    for grad in (True, False):
        results = []
        for module in (gm, without):
            x = batches(1)[0]
            with torch.set_grad_enabled(grad):
                y = module(x)
            if grad and kind != "written between":
                y.sum().backward()
            results.append((y.detach(), x))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(*(r[1] for r in results))
    for p, q in zip(gm.parameters(), without.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    kept = set(leaves(gm).values())
    alone = ("written between", "residual written", "total read", "earlier")
    assert ("Relu" in kept) == (kind in alone)


def test_relu_that_a_dense_layer_keeps_anyway_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    net.append(nn.ConvTranspose2d(8, 4, 3))
    gm = swatfx.compile(net, POLICY)
    assert leaves(gm) == {"_1": "Relu"}
