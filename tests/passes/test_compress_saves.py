"""compress_saves: the same values, names and files; modules go on to rule."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from passes.compress_saves import compress_saves
from swatfx import pipeline
from tests.nets.saving_nets import (
    NETS,
    POLICY,
    inplace,
    inputs_of,
    kept_by,
    leaves,
    pair,
    seeded,
)
from tests.nets.small_nets import (
    Block,
    Residual,
    assert_same,
    batches,
    loss_of,
    plain,
    sgd,
    snapshot,
    train,
)

# Values are compared bit for bit.
pytestmark = pytest.mark.usefixtures("reference_kernels")


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_training_is_bit_for_bit_what_it_was(name: str, last: bool) -> None:
    gm, without = pair(name)
    assert leaves(gm) and not leaves(without)
    data = inputs_of(name, 3)
    if last:
        data = [x.contiguous(memory_format=torch.channels_last) for x in data]
    losses = []
    for module in (gm, without):
        torch.manual_seed(7)
        losses.append(train(module, sgd(module), data))
    assert losses[0] == losses[1]
    assert_same(snapshot(gm), snapshot(without))
    for module in (gm, without):
        module.eval()
    for x in data:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(seeded(gm, x), seeded(without, x))
    assert_same(snapshot(gm), snapshot(without))


@pytest.mark.parametrize("name", ["residual", "functions", "inplace", "odd norms"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    gm, without = pair(name)
    data = [x.to(dtype) for x in inputs_of(name, 2)]
    losses = []
    for module in (gm.to(dtype), without.to(dtype)):
        torch.manual_seed(7)
        losses.append(train(module, sgd(module), data))
    assert losses[0] == losses[1]
    assert_same(snapshot(gm), snapshot(without))


@pytest.mark.parametrize("name", ["residual", "functions", "inplace"])
def test_autocast(name: str) -> None:
    gm, without = pair(name)
    data, losses = inputs_of(name, 3), []
    for module in (gm, without):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(train(module, sgd(module), data))
    assert losses[0] == losses[1]
    assert_same(snapshot(gm), snapshot(without))


@pytest.mark.parametrize("name", ["residual", "odd norms", "functions"])
def test_frozen_norms_and_weights(name: str) -> None:
    """Norms in evaluation inside a model in training, and parameters that do not train."""
    gm, without = pair(name)
    data, losses = inputs_of(name, 3), []
    for module in (gm, without):
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.eval()
                if child.weight is not None:
                    child.weight.requires_grad_(False)
        torch.manual_seed(7)
        losses.append(train(module, sgd(module), data))
    assert losses[0] == losses[1]
    assert_same(snapshot(gm), snapshot(without))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_under_torch_compile(backend: str) -> None:
    torch._dynamo.reset()
    gm, without = pair("residual")
    for module in (gm, without):
        module.drop.p = 0.0
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    optimizers = [sgd(m) for m in (gm, without)]
    for x in inputs_of("residual", 3):
        results = []
        for run, optimizer in zip((compiled, without), optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(run(x))
            loss.backward()
            optimizer.step()
            results.append(loss)
        torch.testing.assert_close(*results)
    for (name, a), b in zip(gm.state_dict().items(), without.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    if backend == "aot_eager":
        assert_same(snapshot(gm), snapshot(without))
    torch._dynamo.reset()


def test_checkpointed_blocks_run_twice() -> None:
    """Recomputation in backward: norms count twice, as in eager."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), Block(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.stem(x), use_reentrant=False)

    torch.manual_seed(0)
    model = Checkpointed()
    passes = [p for p in pipeline.default_passes() if p is not compress_saves]
    without = swatfx.compile(copy.deepcopy(model), POLICY, passes=passes)
    gm = swatfx.compile(model, POLICY)
    assert set(leaves(gm).values()) == {"NormOf"}
    assert train(gm, sgd(gm), batches(2)) == train(without, sgd(without), batches(2))
    assert_same(snapshot(gm), snapshot(without))


def test_one_value_a_channel_is_eagers_error() -> None:
    gm = swatfx.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)), POLICY)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        gm(torch.randn(1, 4))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        gm(torch.randn(2, 2, 2, 4))
    assert gm.eval()(torch.randn(1, 4)).shape == (1, 4)
    assert gm.train()(torch.randn(0, 4)).shape == (0, 4)


# ---- The model's modules go on to rule -----------------------------------------------------------


def test_modes_and_options_are_read_when_it_runs() -> None:
    gm, without = pair("residual")
    x = batches(1)[0]
    for change in (
        lambda m: m.block1.bn1.eval(),
        lambda m: setattr(m.drop, "p", 0.9),
        lambda m: setattr(m.block2.bn2, "momentum", 0.5),
        lambda m: setattr(m.bn, "eps", 0.1),
        lambda m: m.drop.eval(),
        lambda m: setattr(m.drop, "p", 1.0),
        lambda m: m.train(),
        lambda m: setattr(m.drop, "p", 0.0),
    ):
        outputs = []
        for module in (gm, without):
            change(module)
            torch.manual_seed(3)
            outputs.append(module(x))
        assert torch.equal(*outputs)
    assert_same(snapshot(gm), snapshot(without))


def test_a_module_changed_for_another_is_called() -> None:
    """convert_sync_batchnorm and hooks, after compile."""
    gm, _ = pair("residual")
    x = batches(1)[0]
    seen: list[str] = []
    handle = gm.block1.bn1.register_forward_hook(lambda m, a, out: seen.append("hook"))
    gm(x)
    handle.remove()
    gm(x)
    assert seen == ["hook"]
    before = gm(x)
    gm.block1.bn1 = nn.Identity()
    assert not torch.equal(gm(x), before)
    gm = nn.SyncBatchNorm.convert_sync_batchnorm(gm)
    assert isinstance(gm.swat.saves.bn.module, nn.SyncBatchNorm)
    gm.eval()
    assert gm(x).shape == before.shape


def test_no_gradient_nothing_kept() -> None:
    gm, without = pair("residual")
    gm.requires_grad_(False)
    without.requires_grad_(False)
    torch.manual_seed(1)
    y = gm(batches(1)[0])
    torch.manual_seed(1)
    assert torch.equal(y, without(batches(1)[0])) and not y.requires_grad
    assert kept_by(lambda: gm(batches(1)[0]), gm) == 0


# ---- State ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_keys_and_strict_loading(name: str, tmp_path: pathlib.Path) -> None:
    gm, without = pair(name)
    assert list(gm.state_dict()) == list(without.state_dict())
    assert [n for n, _ in gm.named_parameters()] == [n for n, _ in without.named_parameters()]
    model = NETS[name]()
    assert list(swatfx.dense_state_dict(gm)) == list(model.state_dict())
    gm.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(swatfx.dense_state_dict(gm), strict=True)
    twin = copy.deepcopy(gm)
    x = inputs_of(name, 1)
    torch.manual_seed(1)
    first = train(twin, sgd(twin), x)
    torch.manual_seed(1)
    assert train(gm, sgd(gm), x) == first
    assert_same(snapshot(gm), snapshot(twin))


@pytest.mark.parametrize("options", [{}, {"norm_saves": "int8", "value_dtype": torch.bfloat16}])
def test_checkpoint_makes_the_same_graph_again(options: Any, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(Residual(), "swat-u:0.8,period=2", **options)
    optimizer = sgd(gm)
    train(gm, optimizer, batches(3))
    swatfx.save(gm, tmp_path / "a.ckpt", optimizer=optimizer)
    other = Residual()
    second = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    again = swatfx.load(tmp_path / "a.ckpt", other, optimizer=second)
    assert again.code == gm.code and again.swat.options == gm.swat.options
    assert again.swat.options.value_dtype == ("bf16" if options else None)
    assert train(again, second, batches(2)) == train(gm, optimizer, batches(2))
    assert_same(snapshot(gm), snapshot(again))
    copied = copy.deepcopy(gm)
    assert copied.swat.options == gm.swat.options and copied.code == gm.code


def test_a_checkpoint_without_options_loads(tmp_path: pathlib.Path) -> None:
    """One that was written before there were any."""
    import json

    gm = swatfx.compile(plain(), POLICY)
    swatfx.save(gm, tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt")
    plan = json.loads(content["plan"])
    del plan["options"]
    old = {"version": 1, "plan": json.dumps(plan)}
    torch.save(content | old, tmp_path / "old.ckpt")
    assert swatfx.load(tmp_path / "old.ckpt", plain()).swat.options.norm_saves == "exact"


class Repeat(nn.Module):
    """A loop that tracing cannot follow, and export can; what it calls is a part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = inplace()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.shape[1]) - 2):
            y = self.inner(x)
        return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["functions", "inplace", "preactivated", "odd norms", "part"])
def test_exports_are_plain(name: str, tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(Repeat(), POLICY) if name == "part" else pair(name)[0]
    assert leaves(gm) and (name != "part" or gm.parts)
    x = inputs_of(name, 1)[0]
    train(gm, sgd(gm), [x])
    before = gm.code
    swatfx.export(gm, tmp_path / "a.pt2", x)
    program = torch.export.load(tmp_path / "a.pt2")
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets and not any("swat" in t for t in targets)
    swatfx.refresh(gm)
    gm.eval()
    assert torch.equal(seeded(program.module(), x), seeded(gm, x)) and gm.code == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_training_export_keeps_the_ops(tmp_path: pathlib.Path) -> None:
    gm, _ = pair("inplace", norm_saves="int8")
    x = inputs_of("inplace", 1)[0]
    swatfx.export(gm, tmp_path / "a.pt2", x, training=True)
    program = torch.export.load(tmp_path / "a.pt2")
    targets = {
        str(n.target).split(".")[1] for n in program.graph.nodes if "swatfx" in str(n.target)
    }
    assert {"batch_norm", "relu", "max_pool2d", "avg_pool2d", "dropout", "conv"} <= targets
    module = program.module()
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


class Pooled(nn.Module):
    """A pool as a function between two layers."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.pool = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), pool
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.second(self.first(x))))


REFUSED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "max pool": lambda: nn.MaxPool2d(2, 0),
    "average pool": lambda: nn.AvgPool2d(2, 0),
    "max pool function": lambda: lambda x: F.max_pool2d(x, 2, 0),
    "average pool function": lambda: lambda x: F.avg_pool2d(x, 2, (0, 0)),
    "eps": lambda: nn.BatchNorm2d(16, eps=0.0),
    "negative eps": lambda: nn.BatchNorm2d(16, eps=-1e-3),
    "mean that trains": lambda: _norm_whose_mean_trains(),
}


def _norm_whose_mean_trains() -> nn.Module:
    norm = nn.BatchNorm2d(16).eval()
    assert norm.running_mean is not None
    norm.running_mean.requires_grad_()
    return norm


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_eager_refuses_is_refused(name: str, kernels: str) -> None:
    model = Pooled(REFUSED[name]())
    x = torch.randn(16, 3, 8, 8)
    gm = swatfx.compile(model, "swat-u:0.8", kernels=kernels)
    errors = []
    for net in (model, gm):
        if name == "mean that trains":
            net.eval()
        try:
            net(x).sum().backward()
        except Exception as error:
            errors.append(error)
    if not errors and name.endswith("eps"):
        pytest.skip("this torch takes such an eps")
    eager, ours = errors
    assert type(ours) is type(eager)
    assert str(ours).splitlines()[0] == str(eager).splitlines()[0]
