"""What is done to a layer after compile takes effect, or is refused by name."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.errors import ChangedModelError, InputError, SwatError
from tests.nets.small_nets import EagerMiddle, batches, loss_of, sgd

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """A user's container, whose call the graph stands for."""

    def __init__(self, width: int = 32, scale: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.conv(x))) * self.scale
        return y


class Net(nn.Module):
    """A dense stem, a block, an iterated container, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.block = Block()
        self.pool = nn.MaxPool2d(2)
        self.more = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.ReLU())
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(32 * 9, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.more(self.pool(self.block(self.stem(x))))
        y: Tensor = self.head(torch.relu(self.fc(self.drop(x.flatten(1)))))
        return y


def _compiled(policy: str = "swat-u:0.9,period=100") -> SwatModule:
    """After a step in which all thresholds were computed, in the middle of their period."""
    torch.manual_seed(0)
    gm = swatfx.compile(Net(), policy)
    loss_of(gm(X)).backward()
    gm.zero_grad()
    return gm


def _densities(gm: SwatModule) -> dict[str, float]:
    return {a.plan.name: float(a.keep().double().mean()) for a in sparse_layers(gm)}


def _masked(weight: Tensor, density: float) -> Tensor:
    """The plain formula: the k-th largest magnitude is the threshold."""
    count = weight.numel() - math.floor((1 - density) * weight.numel() + 1e-9)
    threshold = weight.abs().flatten().topk(count).values[-1]
    return weight * (weight.abs() >= threshold)


def _eager(gm: SwatModule, net: nn.Module, density: float = 0.1) -> nn.Module:
    """The plain model on Top-K weights, all by the formula."""
    sparse = {a.plan.name for a in sparse_layers(gm)}
    state = swatfx.dense_state_dict(gm)
    for name in state:
        if name.removesuffix(".weight") in sparse and name.endswith(".weight"):
            state[name] = _masked(state[name], density)
    net.load_state_dict(state)
    return net.eval()


# ---- Takes effect ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("selector", ["nchw", "chw", "channel", "random"])
@pytest.mark.parametrize("outputs", [10, 20])
def test_a_replaced_layer_has_thresholds_of_its_own(
    outputs: int, selector: str, training: bool
) -> None:
    gm = _compiled(f"swat-u:0.9,period=100,weight_selector={selector}")
    gm.train(training)
    gm.head = nn.Linear(32, outputs)
    nn.init.normal_(gm.head.weight, std=1e-4)
    y = gm(X)
    assert y.shape == (16, outputs)
    if training:
        loss_of(y).backward()
        assert gm.head.weight.grad is not None and gm.head.weight.grad.shape == (outputs, 32)
    assert _densities(gm)["head"] == pytest.approx(0.1, abs=0.05)
    layer = next(a for a in swatfx.report(gm, (X,)).layers if a.name == "head")
    assert layer.weight_shape == (outputs, 32)
    assert layer.realised_weight_density == pytest.approx(0.1, abs=0.05)


def _new_conv(gm: SwatModule) -> None:
    gm.block.conv = nn.Conv2d(32, 32, 3, padding=1)


def _new_parameter(gm: SwatModule) -> None:
    gm.fc.weight = nn.Parameter(torch.randn(32, 288) * 1e-3)


def _new_data(gm: SwatModule) -> None:
    gm.fc.weight = nn.Parameter(gm.fc.weight.detach() * 1e-3, requires_grad=False)


def _no_bias(gm: SwatModule) -> None:
    gm.fc.bias = None
    gm.block.conv.bias = None


def _new_norm(gm: SwatModule) -> None:
    gm.block.norm = nn.BatchNorm2d(32)
    gm.block.norm.running_mean += 1


def _new_stem(gm: SwatModule) -> None:
    gm.stem = nn.Conv2d(3, 32, 3)


def _new_child_of_a_sequential(gm: SwatModule) -> None:
    gm.more[0] = nn.Conv2d(32, 32, 1, bias=False)
    gm.more[1] = nn.ReLU()


def _new_sequential(gm: SwatModule) -> None:
    gm.more = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.ReLU())


def _pruned_for_good(gm: SwatModule) -> None:
    prune.l1_unstructured(gm.fc, "weight", 0.5)
    prune.remove(gm.fc, "weight")


FOLLOWED: list[Callable[[SwatModule], None]] = [
    _new_conv,
    _new_parameter,
    _new_data,
    _no_bias,
    _new_norm,
    _new_stem,
    _new_child_of_a_sequential,
    _new_sequential,
    _pruned_for_good,
]


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("change", FOLLOWED)
def test_what_takes_effect(change: Callable[[SwatModule], None], kernels: str) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(Net(), "swat-u:0.9,period=100", kernels=kernels)
    loss_of(gm(X)).backward()
    change(gm)
    gm.eval()
    net = Net()
    for name in ("fc", "block.conv"):
        if gm.get_submodule(name).bias is None:
            net.get_submodule(name).register_parameter("bias", None)
    with torch.no_grad():
        got, want = gm(X), _eager(gm, net)(X)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    gm.train()
    for _ in range(2):  # and it trains on, in the middle of the period
        loss_of(gm(X)).backward()


def test_a_copy_follows_by_itself() -> None:
    gm = _compiled()
    twin = copy.deepcopy(gm)
    gm.head = nn.Linear(32, 20)
    assert gm(X).shape == (16, 20) and twin(X).shape == (16, 10)
    twin.head = nn.Linear(32, 5)
    assert gm(X).shape == (16, 20) and twin(X).shape == (16, 5)
    twin.fc.register_forward_hook(print)
    gm(X)
    with pytest.raises(ChangedModelError, match=r"layer 'fc'.*forward hook"):
        twin(X)


def test_checkpoints_of_a_changed_model(tmp_path: Any) -> None:
    """State goes with the weights: into a file, and from one into a model changed likewise."""
    gm = _compiled("swat-u:0.9,period=100,weight_selector=channel-per-filter")
    gm.head = nn.Linear(32, 20)
    state = copy.deepcopy(gm.state_dict())
    other = _compiled("swat-u:0.9,period=100,weight_selector=channel-per-filter")
    other.head = nn.Linear(32, 20)
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(other.eval()(X), gm.eval()(X))
    dense = {k: v for k, v in state.items() if not k.startswith("swat.")}
    another = _compiled("swat-u:0.9,period=100,weight_selector=channel-per-filter")
    another.head = nn.Linear(32, 20)
    another.load_state_dict(dense)
    assert torch.equal(another.eval()(X), gm(X))


def test_assigned_weights_keep_the_state_that_came_with_them() -> None:
    gm, other = _compiled("swat-u:0.9,period=4"), _compiled("swat-u:0.9,period=4")
    optimizer = sgd(gm)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(gm(X)).backward()
        optimizer.step()
    other.load_state_dict(copy.deepcopy(gm.state_dict()), assign=True)
    gm.zero_grad(), other.zero_grad()
    for _ in range(2):
        one, two = loss_of(gm(X)), loss_of(other(X))
        assert torch.equal(one, two)
    for (name, value), theirs in zip(gm.swat.named_buffers(), other.swat.buffers(), strict=True):
        assert torch.equal(value, theirs), name


def test_masks_are_attached_anew() -> None:
    """The optimizer's hooks hold the old weight: training on wants another attach."""
    gm = swatfx.compile(Net(), "rigl:0.9,update_every=2")
    old = sgd(gm)
    handle = swatfx.attach(gm, old, steps_per_epoch=10, total_steps=20)
    gm.fc = nn.Linear(288, 32)
    with pytest.raises(SwatError, match=r"layer 'fc' has another weight.*swatfx\.attach"):
        gm(X)
    assert not old._optimizer_step_pre_hooks and not old._optimizer_step_post_hooks
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, steps_per_epoch=10, total_steps=20)
    handle.detach()  # of the old one: nothing
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(gm(X)).backward()
        optimizer.step()
    assert gm.fc.weight.count_nonzero() / gm.fc.weight.numel() == pytest.approx(0.1, abs=0.01)


def test_learned_thresholds_start_anew() -> None:
    gm = swatfx.compile(Net(), "dst:1e-4")
    optimizer = sgd(gm)
    handle = swatfx.attach(gm, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(gm(X)).backward()
        optimizer.step()
    handle.detach()
    gm.head = nn.Linear(32, 20)
    swatfx.refresh(gm)
    layer = next(a for a in sparse_layers(gm) if a.plan.name == "head")
    assert layer.weight_threshold.threshold.shape[0] == 20
    assert not layer.weight_threshold.threshold.any()
    swatfx.attach(gm, sgd(gm))
    assert gm(X).shape == (16, 20)


# ---- Is refused ----


class LoRA(nn.Module):
    """A wrapper as adapters make it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _lora(gm: SwatModule) -> None:
    gm.fc = LoRA(gm.fc)


def _pre_hook(gm: SwatModule) -> None:
    gm.fc.register_forward_pre_hook(lambda m, args: None)


def _backward_hook(gm: SwatModule) -> None:
    gm.fc.register_full_backward_hook(lambda m, a, b: None)


def _backward_pre_hook(gm: SwatModule) -> None:
    gm.fc.register_full_backward_pre_hook(lambda m, a: None)


def _hook_with_kwargs(gm: SwatModule) -> None:
    gm.block.conv.register_forward_hook(lambda m, a, k, o: o, with_kwargs=True, always_call=True)


def _hook_on_a_container(gm: SwatModule) -> None:
    gm.block.register_forward_hook(lambda m, a, o: o)


def _hook_on_an_activation(gm: SwatModule) -> None:
    gm.block.act.register_forward_hook(lambda m, a, o: o)


def _hook_on_a_pool(gm: SwatModule) -> None:
    gm.pool.register_forward_hook(lambda m, a, o: o)


def _gelu(gm: SwatModule) -> None:
    gm.block.act = nn.GELU()


def _other_pool(gm: SwatModule) -> None:
    gm.pool = nn.MaxPool2d(2, stride=1)


def _pool_option(gm: SwatModule) -> None:
    gm.pool.kernel_size = 3


def _other_block(gm: SwatModule) -> None:
    gm.block = Block(scale=3.0)


def _appended(gm: SwatModule) -> None:
    gm.more.append(nn.Tanh())


def _wider_kernel(gm: SwatModule) -> None:
    gm.block.conv = nn.Conv2d(32, 32, 5, padding=2)


def _strided(gm: SwatModule) -> None:
    gm.block.conv.stride = (2, 2)


def _padded(gm: SwatModule) -> None:
    gm.block.conv.padding = (0, 0)


def _grouped(gm: SwatModule) -> None:
    gm.block.conv = nn.Conv2d(32, 32, 3, padding=1, groups=2)


def _biased(gm: SwatModule) -> None:
    gm.more[0].bias = nn.Parameter(torch.randn(32))


def _deleted(gm: SwatModule) -> None:
    del gm.fc


def _none(gm: SwatModule) -> None:
    gm.fc = None


def _identity(gm: SwatModule) -> None:
    gm.head = nn.Identity()


def _patched(gm: SwatModule) -> None:
    gm.fc.forward = lambda x: x


def _patched_container(gm: SwatModule) -> None:
    gm.block.forward = lambda x: x


def _subclass(gm: SwatModule) -> None:
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    gm.fc = Mine(288, 32)


def _reclassed(gm: SwatModule) -> None:
    gm.fc.__class__ = type("Mine", (nn.Linear,), {})


def _parametrized(gm: SwatModule) -> None:
    parametrize.register_parametrization(gm.fc, "weight", Doubled())


def _weight_normed(gm: SwatModule) -> None:
    parametrizations.weight_norm(gm.fc)


def _spectral_normed(gm: SwatModule) -> None:
    nn.utils.spectral_norm(gm.block.conv)


def _pruned(gm: SwatModule) -> None:
    prune.l1_unstructured(gm.fc, "weight", 0.5)


def _observed(gm: SwatModule) -> None:
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    gm.train()
    gm.fc.qconfig = get_default_qat_qconfig("fbgemm")
    prepare_qat(gm, inplace=True)


def _vector_weight(gm: SwatModule) -> None:
    gm.fc.weight = nn.Parameter(torch.randn(288 * 32))


def _plain_tensor(gm: SwatModule) -> None:
    weight = gm.fc.weight.detach()
    del gm.fc.weight
    gm.fc.weight = weight


REFUSED: dict[Callable[[SwatModule], None], str] = {
    _lora: r"layer 'fc': is now a .*LoRA, but a Linear was compiled",
    _pre_hook: r"layer 'fc'.*forward pre-hook.*swatfx\.report",
    _backward_hook: r"layer 'fc'.*backward hook",
    _backward_pre_hook: r"layer 'fc'.*backward pre-hook",
    _hook_with_kwargs: r"layer 'block\.conv'.*forward hook",
    _hook_on_a_container: r"layer 'block'.*forward hook",
    _hook_on_an_activation: r"layer 'block\.act'.*forward hook",
    _hook_on_a_pool: r"layer 'pool'.*forward hook",
    _gelu: r"layer 'block\.act': is now a GELU, but a ReLU was compiled",
    _other_pool: r"layer 'pool': stride is 1, but was compiled as 2",
    _pool_option: r"layer 'pool': kernel_size is 3",
    _other_block: r"layer 'block'.*replaced by another module",
    _appended: r"layer 'more': has 3 children, but was compiled with 2",
    _wider_kernel: r"layer 'block\.conv': (padding|kernel_size)",
    _strided: r"layer 'block\.conv': stride is \(2, 2\), but was compiled as \(1, 1\)",
    _padded: r"layer 'block\.conv': padding",
    _grouped: r"layer 'block\.conv': groups",
    _biased: r"layer 'more\.0': has a bias",
    _deleted: r"layer 'fc': was removed",
    _none: r"layer 'fc': was removed",
    _identity: r"layer 'head': is now a Identity",
    _patched: r"layer 'fc'.*forward was replaced",
    _patched_container: r"layer 'block'.*forward was replaced",
    _subclass: r"layer 'fc': is now a .*Mine",
    _reclassed: r"layer 'fc': is now a .*Mine",
    _parametrized: r"layer 'fc': is now a .*Parametrized",
    _weight_normed: r"layer 'fc': is now a .*Parametrized",
    _spectral_normed: r"layer 'block\.conv'.*pre-hook.*SpectralNorm",
    _pruned: r"layer 'fc'.*pre-hook.*L1Unstructured",
    _observed: r"layer 'fc': is now a .*qat",
    _vector_weight: r"layer 'fc': its weight.*\[9216\]",
    _plain_tensor: r"layer 'fc': 'weight' is no parameter any more",
}


# torch.ao is deprecated, but there.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", REFUSED)
def test_what_is_refused(change: Callable[[SwatModule], None], training: bool) -> None:
    gm = _compiled()
    gm.train(training)
    before = {n: b.clone() for n, b in gm.swat.named_buffers()}
    change(gm)
    for run in (lambda: gm(X), lambda: swatfx.report(gm, (X,)), lambda: swatfx.refresh(gm)):
        with pytest.raises(ChangedModelError) as caught:
            run()
        assert re.search(REFUSED[change], str(caught.value)), str(caught.value)
        assert "compile" in str(caught.value)
    for name, value in gm.swat.named_buffers():
        assert torch.equal(value, before[name]), name


def test_undone_is_as_before() -> None:
    gm = _compiled().eval()
    want = gm(X)
    fc, handle = gm.fc, gm.fc.register_forward_hook(lambda m, a, o: o)
    with pytest.raises(ChangedModelError):
        gm(X)
    handle.remove()
    assert torch.equal(gm(X), want)
    gm.fc = LoRA(fc)
    with pytest.raises(ChangedModelError):
        gm(X)
    gm.fc = fc
    assert torch.equal(gm(X), want)


def test_hooks_run_where_modules_stay() -> None:
    """On the model, on dense layers, on norms and dropouts whose calls are looked up."""
    gm, seen = _compiled(), []
    names = ("", "stem", "block.norm", "drop")
    for name in names:
        gm.get_submodule(name).register_forward_hook(lambda m, a, o: seen.append(type(m)))
        gm.get_submodule(name).register_full_backward_hook(lambda m, a, b: seen.append(type(m)))
    loss_of(gm(X.clone().requires_grad_())).backward()
    kinds = [type(gm), nn.Conv2d, nn.BatchNorm2d, nn.Dropout]
    assert sorted(map(str, seen)) == sorted(map(str, kinds * 2))


def test_a_patched_norm_runs_its_own_forward() -> None:
    gm = _compiled().eval()
    want = gm(X)
    norm = gm.block.norm
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) + 100
    assert not torch.allclose(gm(X), want)


def test_a_layer_in_another_dtype_fails_as_in_eager() -> None:
    gm = _compiled()
    gm.fc.half()
    with pytest.raises(RuntimeError, match="dtype"):
        gm(X)


# ---- Below eager code ----


@pytest.mark.parametrize("training", [True, False])
def test_parts_and_eager_roots(training: bool) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Linear(8, 32), nn.Linear(32, 32)
            self.inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            while x.sum() > 1e9:
                x = x / 2
            y: Tensor = self.act(self.inner(self.fc(x)))
            return y

    x = torch.randn(16, 8)
    gm = swatfx.compile(Loop(), "swat-u:0.5,period=100").train(training)
    assert "" in gm.eager
    gm(x)
    gm.fc = nn.Linear(32, 32)
    gm.inner[0] = nn.Linear(32, 32)
    gm.act = nn.Sigmoid()  # the eager forward calls it as it is
    gm.eval()
    got = gm(x)
    want = copy.deepcopy(_eager(gm, Loop(), 0.5))
    want.act = nn.Sigmoid()
    torch.testing.assert_close(got, want(x))
    gm.train(training)
    gm.inner.register_forward_hook(lambda m, a, o: o * 0)  # a part's own hooks run
    assert (gm(x) == 0.5).all()
    gm.inner[0].register_forward_hook(lambda m, a, o: o)
    with pytest.raises(ChangedModelError, match=r"layer 'inner\.0'.*forward hook"):
        gm(x)
    gm = swatfx.compile(Loop(), "swat-u:0.5,period=100").train(training)
    gm.fc = LoRA(gm.fc)
    with pytest.raises(ChangedModelError, match=r"layer 'fc': is now a .*LoRA"):
        gm(x)


def test_middle_that_stays_eager() -> None:
    gm = swatfx.compile(EagerMiddle(), "swat-u:0.8")
    x = batches(1)[0]
    gm(x)
    part = next(iter(gm.parts))
    owner = gm.get_submodule(part)
    owner.forward = lambda *args: args[0]
    with pytest.raises(ChangedModelError, match=re.escape(part)):
        gm(x)


def test_tied_weights_that_are_torn() -> None:
    class Tongue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.relu(self.a(x)))
            return y

    gm, x = swatfx.compile(Tongue(), "swat-u:0.5,first_dense=False"), torch.randn(16, 16)
    gm(x)
    weight = nn.Parameter(torch.randn(16, 16))
    gm.a.weight = gm.b.weight = weight
    gm(x)
    gm.b.weight = nn.Parameter(torch.randn(16, 16))
    with pytest.raises(ChangedModelError, match=r"a\.weight and b\.weight"):
        gm(x)


class Bare(nn.Module):
    """Layers with a bias and without, called, read by functions, and sharing a weight."""

    def __init__(self, called: bool, read: bool, bias: bool) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(16, 16), nn.Linear(16, 16, bias=bias)
        self.conv = nn.Conv1d(16, 16, 1, bias=bias)
        self.twin = nn.Linear(16, 16, bias=bias)
        self.twin.weight = self.fc.weight
        self.called, self.read = called, read

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.read:
            x = F.linear(x, self.fc.weight)
            x = F.conv1d(x.unsqueeze(-1), self.conv.weight, None).squeeze(-1)
        if self.called:
            x = self.twin(self.fc(x))
            x = self.conv(x.unsqueeze(-1)).squeeze(-1)
        return x


USES = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("called", "read"), USES)
def test_a_bias_that_a_call_leaves_out_is_no_change(
    called: bool, read: bool, training: bool
) -> None:
    torch.manual_seed(0)
    model = Bare(called, read, bias=True)
    ref = copy.deepcopy(model)
    gm = swatfx.compile(model, "swat-u:0.0000001,first_dense=False").train(training)
    x = torch.randn(8, 16)
    torch.testing.assert_close(gm(x), ref(x))
    for net in (gm, ref):
        net.fc.bias = net.conv.bias = net.twin.bias = None
    torch.testing.assert_close(gm(x), ref(x))
    for net in (gm, ref):
        for module in (net.fc, net.conv, net.twin):
            module.bias = nn.Parameter(torch.ones(16))
    torch.testing.assert_close(gm(x), ref(x))


@pytest.mark.parametrize("name", ["fc", "conv", "twin"])
@pytest.mark.parametrize(("called", "read"), USES)
def test_a_bias_that_no_graph_would_read_is_refused(name: str, called: bool, read: bool) -> None:
    """Each of the modules that share a weight has a bias of its own."""
    gm = swatfx.compile(Bare(called, read, bias=False), "swat-u:0.5,first_dense=False")
    x = torch.randn(8, 16)
    want = gm.eval()(x)
    module = gm.get_submodule(name)
    module.bias = nn.Parameter(torch.ones(16))
    if name == "twin" and not called:  # of which nothing is read but the weight
        assert torch.equal(gm(x), want)
        return
    with pytest.raises(ChangedModelError, match=rf"layer '{name}': has a bias"):
        gm(x)
    module.bias = None
    assert torch.equal(gm(x), want)


def test_functional_calls_are_no_change() -> None:
    gm = _compiled().eval()
    want = gm(X)
    values = {k: v.detach().clone() for k, v in gm.named_parameters()}
    assert torch.equal(torch.func.functional_call(gm, values, (X,)), want)
    assert torch.equal(gm(X), want)


# ---- Tools ----


def _thop(gm: SwatModule) -> Any:
    return pytest.importorskip("thop").profile(gm, (X,), verbose=False)


def _ptflops(gm: SwatModule) -> Any:
    tool = pytest.importorskip("ptflops")
    return tool.get_model_complexity_info(gm, (3, 8, 8), print_per_layer_stat=False, verbose=False)


def _torchinfo(gm: SwatModule) -> Any:
    return pytest.importorskip("torchinfo").summary(gm, input_data=X, verbose=0)


def _fvcore(gm: SwatModule) -> Any:
    return pytest.importorskip("fvcore.nn").FlopCountAnalysis(gm, X).total()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", [_thop, _ptflops, _torchinfo, _fvcore])
def test_tools_that_count_are_told(tool: Callable[[SwatModule], Any], capfd: Any) -> None:
    gm, told = _compiled(), ""
    try:
        assert tool(gm) in (None, (None, None))  # ptflops catches it, and prints what it says
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            told, cause = told + str(cause), cause.__cause__ or cause.__context__
    printed = capfd.readouterr()
    assert "swatfx.report" in told + printed.out + printed.err
    swatfx.report(swatfx.compile(Net(), "swat-u:0.9"), (X,))


@pytest.mark.filterwarnings("ignore")
def test_peft_is_told() -> None:
    peft = pytest.importorskip("peft")
    gm = _compiled()
    peft.get_peft_model(gm, peft.LoraConfig(target_modules="fc"))
    with pytest.raises(ChangedModelError, match=r"layer 'fc': is now a peft.*compile"):
        gm(X)


def test_data_parallel_is_refused() -> None:
    gm = _compiled()
    with pytest.raises(InputError, match="DistributedDataParallel"):
        nn.Sequential(gm)[0]._replicate_for_data_parallel()  # what DataParallel calls of each


def test_the_look_is_cheap() -> None:
    """Some tens of microseconds for fifty layers; here with room for a busy machine."""
    import timeit

    gm = swatfx.compile(torchvision.models.resnet50(), "swat-u:0.9")
    assert min(timeit.repeat(gm.follow, number=20, repeat=10)) / 20 < 1e-3
