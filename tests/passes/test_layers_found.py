"""Which layers the report lists, and the reason for each that stays dense."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import swatfx
from swatfx.errors import InputError, PolicyError
from tests.nets.compare import DENSITY_1, HALF, assert_matches_at_density_1, skipped, train_step

torch.set_num_threads(1)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """A convolution subclass whose forward computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Fussy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] else x


def test_subclasses_with_their_own_forward() -> None:
    torch.manual_seed(0)  # a step of SGD moves some weights across the threshold
    head = nn.Sequential(nn.Flatten(), Scaled(4 * 36, 5))
    model = nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), Fussy(4, 4, 1), *head)
    gm = assert_matches_at_density_1(model, X)
    assert skipped(gm, X) == {"0": None, "2": "own forward: Fussy", "4": None}
    assert gm.eager == {"2": "untraceable: control flow on a tensor"}
    gm = swatfx.compile(model, HALF)
    train_step(gm, X)
    refreshed = swatfx.report(gm, [X]).layers[0]
    assert refreshed.realised_weight_density == pytest.approx(0.5, abs=0.01)


class Twice(nn.Module):
    """One computed weight, read by two calls in a part and by a part within it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def test_a_weight_cast_to_its_input_is_the_layers_weight() -> None:
    model = nn.Sequential(Cast(8, 6), nn.Tanh(), Cast(6, 4))
    gm = assert_matches_at_density_1(model, X)
    assert skipped(gm, X) == {"0": None, "2": None}
    gm = swatfx.compile(model, HALF)
    train_step(gm, X)
    assert gm(X.bfloat16()).dtype == torch.bfloat16


def test_a_computed_weight_is_one_layer() -> None:
    class Eager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = Twice()

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(x) + self.twice.conv(x) if x.shape[0] else x

    for model, name in ((Twice(), "conv"), (Eager(), "twice.conv")):
        gm = assert_matches_at_density_1(model, X)
        assert skipped(gm, X) == {name: None}
        train_step(swatfx.compile(model, HALF), X)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights(norm: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    getattr(parametrizations, norm)(model[0])
    getattr(parametrizations, norm)(model[3])
    gm = assert_matches_at_density_1(model, X)
    assert not gm.eager and skipped(gm, X) == {"0": None, "3": None}
    loss = train_step(swatfx.compile(model, HALF), X)
    assert loss.isfinite()
    shared = nn.Sequential(copy.deepcopy(model[0]), nn.ReLU())
    if norm == "weight_norm":
        twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        parametrizations.weight_norm(twice[0])
        shared = nn.Sequential(twice[0], twice[1], twice[0])
        assert skipped(assert_matches_at_density_1(shared, X), X) == {"0": None, "1": None}


def test_compiling_and_reporting_leave_power_iteration_where_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    parametrizations.spectral_norm(model[0])
    before = [b.clone() for b in model.buffers()]
    gm = swatfx.compile(model, HALF)
    swatfx.report(gm, [X])
    swatfx.refresh(gm)
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), before, strict=True))
    assert all(m.training for m in (*model.modules(), *gm.modules()))


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_old_style_norms_stay_eager(norm: str) -> None:
    old = getattr(nn.utils, norm)(nn.Conv2d(3, 3, 3))
    for model, names in (
        (nn.Sequential(old, nn.Conv2d(3, 3, 3)), ("0", "1")),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3)), nn.Sequential(old)), ("1.0", "0.0")),
    ):
        gm = swatfx.compile(model, DENSITY_1)  # a weight-normed model cannot be copied
        if norm == "weight_norm":
            assert torch.equal(gm(X), model(X))
        else:
            assert_matches_at_density_1(model, X)
        assert skipped(gm, X) == {names[0]: "hook on the module", names[1]: None}
        assert gm.eager == {names[0]: "hook on the module"}


class ReadAfter(nn.Module):
    """Calls a layer, and reads its parameters afterwards."""

    def __init__(self, layer: nn.Linear, read: Callable[[nn.Linear, Tensor, Tensor], Tensor]):
        super().__init__()
        self.stem, self.layer, self.read = nn.Linear(12, 12), layer, read

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.read(self.layer, x, self.layer(x))


class BelowEager(ReadAfter):
    """Such a forward in a part, with a branch on values above it."""

    def __init__(self, layer: nn.Linear, read: Callable[[nn.Linear, Tensor, Tensor], Tensor]):
        super().__init__(layer, read)
        self.inner = ReadAfter(layer, read)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.isfinite().all() else x


def halve(fc: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """Write in place: the call before saw the weight as it was, those behind see it as it is."""
    fc.weight.data.mul_(0.5)
    return fc(y) + fc.weight.sum() + F.linear(x, fc.weight)


READINGS: dict[str, Callable[[nn.Linear, Tensor, Tensor], Tensor]] = {
    "penalty": lambda fc, x, y: y + fc.weight.square().sum(),
    "dtype": lambda fc, x, y: y.to(fc.weight.dtype) * 2,
    "tied": lambda fc, x, y: F.linear(y, fc.weight.t()),
    "bias": lambda fc, x, y: y + fc.bias.sum(),
    "bias of another": lambda fc, x, y: F.linear(y, fc.weight.t(), fc.bias),
    "both": lambda fc, x, y: F.linear(F.linear(y, fc.weight) + fc.bias, fc.weight, fc.bias),
    "product": lambda fc, x, y: y @ fc.weight,
    "same input": lambda fc, x, y: y + F.linear(x, fc.weight.t()) + F.linear(x, fc.weight),
    "written": halve,
}


@pytest.mark.parametrize("kind", [ReadAfter, BelowEager])
@pytest.mark.parametrize("name", READINGS)
def test_a_layer_whose_parameters_are_read_after_its_call(name: str, kind: type[ReadAfter]) -> None:
    torch.manual_seed(0)
    model = kind(nn.Linear(12, 12), READINGS[name]).double()
    ref = copy.deepcopy(model)
    gm = swatfx.compile(model, "swat-u:0.0000001,first_dense=False")
    x = torch.randn(5, 12, dtype=torch.float64)
    for training in (True, False, True):
        gm.train(training)
        ref.train(training)
        got, want = gm(x), ref(x)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        got.square().sum().backward()
        want.square().sum().backward()
    for (path, p), q in zip(gm.named_parameters(), ref.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=path)


@pytest.mark.parametrize("name", ["penalty", "product", "bias"])
def test_what_reads_a_weight_after_its_layer_sees_it_dense(name: str) -> None:
    torch.manual_seed(0)
    read = READINGS[name]
    gm = swatfx.compile(ReadAfter(nn.Linear(12, 12), read), HALF)
    fc, x = gm.layer, torch.randn(5, 12)
    gm.eval()
    with torch.no_grad():
        h = x @ _half(gm.stem.weight).t() + gm.stem.bias
        y = h @ _half(fc.weight).t() + fc.bias
        torch.testing.assert_close(gm(x), read(fc, h, y))


def _half(weight: Tensor) -> Tensor:
    """The larger half of a weight."""
    return weight * (weight.abs() >= weight.abs().flatten().topk(weight.numel() // 2).values[-1])


class Rest(nn.Module):
    """Everything that has a reason of its own to stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2, output_padding=1)
        self.raw_up = nn.Parameter(torch.randn(4, 4, 2, 2))
        self.unused = nn.Linear(4, 4)
        self.borrowed = nn.Linear(4, 4)
        self.hyper = nn.Linear(4, 16)
        self.integer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x))
        x = F.conv_transpose2d(x, self.raw_up, stride=2).mean((-2, -1))
        x = x @ self.borrowed.weight.t()
        return F.linear(x, self.hyper(x).mean(0).view(4, 4))


def test_every_skip_has_a_reason() -> None:
    gm = assert_matches_at_density_1(Rest(), X)
    reasons = skipped(gm, X)
    assert reasons == {
        "conv": None,
        "up": "transposed convolution",
        "raw_up": "transposed convolution",
        "hyper": None,
        "linear": "weight computed from the input",
        "borrowed": "weight used outside conv and linear calls",
        "unused": "not called in forward",
        "integer": "not called in forward",
    }
    assert str(swatfx.report(gm, [X])).count("not called in forward") == 2
    layer = {layer.name: layer for layer in swatfx.report(gm, [X]).layers}["unused"]
    assert (layer.dense_forward_macs, layer.parameters, layer.weight_density) == (0, 16, 1.0)


def test_policies_see_unreached_layers_by_name() -> None:
    rules = {"unused": swatfx.dense(), "conv": HALF}
    gm = swatfx.compile(Rest(), swatfx.per_layer(rules, default=swatfx.dense()))
    assert skipped(gm, X)["conv"] is None
    with pytest.raises(PolicyError, match="matches no layer"):
        swatfx.compile(Rest(), swatfx.per_layer({"nowhere": swatfx.dense()}, default=HALF))
    with pytest.raises(InputError, match=r"a.fc: not called in forward"):
        swatfx.compile(Outer(), HALF)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = Unused()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Reads(nn.Module):
    """Eager code that computes with a layer's weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.read = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x)
        return F.linear(x, self.read.weight) if x.shape[0] else x


def test_what_eager_code_does_by_itself_is_not_called_sparse() -> None:
    x = X[..., :3]
    gm = assert_matches_at_density_1(Reads(), x)
    assert skipped(gm, x) == {"used": None, "read": "not called by these inputs"}


def test_idempotent_and_kept_by_deepcopy() -> None:
    from swatfx.passing import Context
    from swatfx.pipeline import default_passes, run_passes

    gm = swatfx.compile(Rest(), DENSITY_1)
    code, unreached, state = gm.code, dict(gm.unreached), list(gm.state_dict())
    twin = copy.deepcopy(gm)
    run_passes(gm, default_passes(), Context(DENSITY_1))
    assert (gm.code, gm.unreached, list(gm.state_dict())) == (code, unreached, state)
    assert twin.unreached == unreached and skipped(twin, X) == skipped(gm, X)


def test_first_layers_of_two_branches_and_last_layers() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.join, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.side = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            both = self.join(self.a(x).relu() + self.b(y))
            return self.out(both), self.side(both)

    policy = swatfx.swat_u(0.5, last_dense=True)
    gm = swatfx.compile(Branches(), policy)
    assert skipped(gm, X, X) == {
        "a": "first layer",
        "b": "first layer",
        "join": None,
        "out": "last layer",
        "side": "last layer",
    }
    train_step(gm, X, X)


class _EagerAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 0
        product: Tensor = self.query(x) * self.key(x)
        return product


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = _EagerAttention(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.attention(x)) + x
        return result


class _EagerBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 0
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


def test_the_first_layer_below_eager_code_in_a_traced_part() -> None:
    gm = swatfx.compile(_EagerBlocks(), "swat-u:0.5,last_dense=True")
    assert set(gm.eager) == {"", "blocks.0.attention", "blocks.1.attention"}
    dense = {name: why for name, why in skipped(gm, torch.randn(2, 8)).items() if why}
    assert dense == {"blocks.0.attention.query": "first layer", "head": "last layer"}


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [1, (2, 1)])
def test_a_convolution_that_is_the_root_packs_what_its_caller_gave(mode: str, padding: Any) -> None:
    """Traced from within, its padding is not part of the activation that Top-K ranks."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=padding, padding_mode=mode)
    inner = copy.deepcopy(conv)
    policy = swatfx.swat_u(0.5, first_dense=False)
    root, child = swatfx.compile(conv, policy), swatfx.compile(nn.Sequential(inner), policy)
    x = torch.randn(2, 4, 6, 6)
    for gm in (root, child):
        gm(x).square().sum().backward()
    assert torch.equal(root(x), child(x))
    assert conv.weight.grad is not None and inner.weight.grad is not None
    assert torch.equal(conv.weight.grad, inner.weight.grad)
    assert swatfx.report(root, (x,)).layers[0].input_shape == (2, 4, 6, 6)
