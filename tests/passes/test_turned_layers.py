"""Tensors between sparse linear layers lie as their kernels compute them: where, and nothing else.

Compared with formulas in float64 and with the same networks under dense kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.convnext import CNBlock, LayerNorm2d
from torchvision.models.vision_transformer import EncoderBlock

import swatfx
from swatfx import kernels
from swatfx.compiled.module import SwatModule
from swatfx.compiled.nodes import LayerNode, sparse_nodes
from swatfx.kernels import layout as layout_kernels
from swatfx.kernels import linear as linear_kernels
from swatfx.tensors import layouts
from swatfx.tensors.layouts import FEATURES_MAJOR, FEATURES_OUTERMOST, IMAGES_INNERMOST
from tests.nets.kernel_nets import assert_equal_training, pair
from tests.nets.saving_nets import kept_by

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
OPS = torch.ops.swatfx
POLICY = "swat-u:0.8,first_dense=False,period=4"
EXACT = POLICY + ",activation_sparsity=0.0"  # no activation can be another
NARROW, WIDE = 24, 96


def mlp(act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(NARROW, WIDE), act(), nn.Linear(WIDE, NARROW))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(NARROW, WIDE), nn.Linear(NARROW, WIDE)
        self.down = nn.Linear(WIDE, NARROW)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Reading(nn.Module):
    """An MLP between whose layers somebody else reads."""

    def __init__(self, reads: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.reads = nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW), reads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        read = self.reads(y)
        return self.two(F.gelu(y)), read


def told_layout(layer: LayerNode) -> str:
    """Of a linear layer's result, where it pays."""
    node = layer.node.kwargs.get("layout")
    return str(node.args[1]) if isinstance(node, fx.Node) else ""


def told(gm: SwatModule) -> list[str]:
    """Layers whose result comes with features outermost."""
    return [
        layer.plan.name for layer in sparse_nodes(gm) if told_layout(layer) in FEATURES_OUTERMOST
    ]


def formula(gm: SwatModule, x: Tensor, wide: nn.Sequential) -> Tensor:
    """What `mlp` under SWAT is, by thresholds of `gm`; `wide` receives its gradients."""
    for name, module in wide.named_children():
        if not isinstance(module, nn.Linear):
            x = module(x)
            continue
        state = gm.swat.get_submodule(f"layer_{name}")
        least = state.get_submodule("weight_threshold").threshold.double()
        least_kept = state.get_submodule("activation_threshold").threshold.double()
        kept = (x * (x.abs() >= least_kept)).detach()
        by_kept = F.linear(kept, module.weight)
        used = (module.weight * (module.weight.abs() >= least)).detach()
        x = F.linear(x, used, module.bias) + by_kept - by_kept.detach()
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lead", [(16,), (17,), (32,), (33,), (1568,), (1576,), (4, 8), (3, 11), (2, 4, 8)], ids=str
)
def test_training_step_equals_the_formula(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(mlp().to(dtype), EXACT, kernels="sparse")
    assert told(gm) == ["0"]
    x = torch.randn(*lead, NARROW, dtype=dtype).requires_grad_()
    y = gm(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    wide = mlp().double()
    wide.load_state_dict({k: v for k, v in gm.state_dict().items() if not k.startswith("swat.")})
    seen = x.detach().double().requires_grad_()
    true = formula(gm, seen, wide)
    true.backward(grad.double())
    found = [y, x.grad, *(p.grad for p in gm.parameters())]
    limit = 1e-5 if dtype is torch.float32 else 0.02
    wanted = [true, seen.grad, *(p.grad for p in wide.parameters())]
    for one, other in zip(found, wanted, strict=True):
        assert one is not None and other is not None
        assert (one.double() - other).norm() <= limit * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_wide_tensor_is_never_turned(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = swatfx.compile(mlp().to(dtype), POLICY, kernels="sparse")
    turned: list[tuple[int, ...]] = []

    def transpose(x: Tensor, y: Tensor) -> None:
        turned.append(tuple(x.shape))
        true(x, y)

    true = layout_kernels.transpose_into
    for module in (layout_kernels, linear_kernels):
        monkeypatch.setattr(module, "transpose_into", transpose)
    strides = []
    leaf = gm.swat.get_submodule("saves.gelu")
    leaf.register_forward_hook(lambda _, given, made: strides.extend([given[0], made]))
    leaf.register_full_backward_hook(lambda _, made, given: strides.extend([*given, *made]))
    x = torch.randn(4, 16, NARROW, dtype=dtype, requires_grad=True)
    gm(x).sum().backward()
    assert [t.stride() for t in strides] == [(16, 1, 64)] * 4
    assert len(turned) == 5 and not any(WIDE in shape for shape in turned)


@pytest.mark.parametrize(
    "build",
    [
        lambda: mlp(nn.ReLU),
        lambda: mlp(nn.SiLU),
        lambda: nn.Sequential(mlp(), mlp()),
        Gated,
        lambda: nn.Sequential(EncoderBlock(4, NARROW, WIDE, 0.0, 0.0)),
        lambda: nn.Sequential(nn.Conv2d(8, NARROW, 1), CNBlock(NARROW, 0.5, 0.0), nn.Flatten(2)),
    ],
    ids=["relu", "silu", "two", "gated", "vit", "convnext"],
)
def test_networks_train_as_under_dense_kernels(build: Callable[[], nn.Module]) -> None:
    sparse, dense = pair(build, POLICY)
    assert told(sparse) and not told(dense)
    image = any(isinstance(m, CNBlock) for m in sparse.modules())
    torch.manual_seed(1)
    data = [torch.randn((16, 8, 4, 4) if image else (4, 16, NARROW)) for _ in range(2)]
    assert_equal_training(sparse, dense, data)
    with torch.no_grad():
        assert_equal_training(sparse.eval(), dense.eval(), data, backward=False)


class Stages(nn.Module):
    """As ConvNeXt has them: blocks, a norm with channels second, a convolution between stages."""

    def __init__(self, block: Callable[[], nn.Module], channels: int = NARROW) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(8, channels, 1), block(), block()
        self.norm = LayerNorm2d(channels)
        self.down = nn.Conv2d(channels, channels, 2, 2)
        self.three = block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.stem(x)))
        out: Tensor = self.three(self.down(self.norm(x)))
        return out.flatten(2)


class OtherBlock(nn.Module):
    """As `CNBlock`, by methods; `spoils` makes somebody see more than the block does."""

    def __init__(self, spoils: Callable[[Tensor], Tensor] | None = None, at: str = "") -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(NARROW, NARROW, 3, padding=1, groups=NARROW)
        self.norm = nn.LayerNorm(NARROW)
        self.up, self.down = nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW)
        self.spoils, self.at = spoils, at

    def _spoilt(self, x: Tensor, at: str) -> Tensor:
        return x + self.spoils(x) if self.spoils is not None and at == self.at else x

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self._spoilt(self.norm(self._spoilt(y, "seen")), "norm")
        y = self._spoilt(self.down(F.gelu(self.up(y))), "made")
        y = self._spoilt(y.permute(0, -1, 1, 2), "back")
        return x + y


SPOILERS: dict[str, Callable[[Tensor], Tensor]] = {
    "stride": lambda y: y.stride(1) * y.new_ones(()),
    "view": lambda y: y.reshape(-1)[0],
    "item": lambda y: y[0],
    "matmul": lambda y: y @ y.transpose(-1, -2) @ y,
}


def images(gm: SwatModule) -> list[str]:
    """Linear layers that compute with images innermost."""
    return [layer.plan.name for layer in sparse_nodes(gm) if told_layout(layer) == IMAGES_INNERMOST]


@pytest.mark.parametrize(
    "block",
    [lambda: CNBlock(NARROW, 0.5, 0.0), OtherBlock],
    ids=["torchvision", "own"],
)
def test_between_convolutions_nothing_is_converted(
    block: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, dense = pair(lambda: Stages(block), POLICY)
    assert len(images(sparse)) == 6 and not images(dense)
    torch.manual_seed(1)
    data = [torch.randn(batch, 8, 4, 4) for batch in (16, 2, 4)]
    assert_equal_training(sparse, dense, data)
    turned: list[tuple[int, ...]] = []
    real = linear_kernels.transpose_into

    def transpose(x: Tensor, y: Tensor) -> None:
        turned.append(tuple(x.shape))
        real(x, y)

    monkeypatch.setattr(linear_kernels, "transpose_into", transpose)
    for gm in (sparse, dense):
        gm(data[0]).sum().backward()
    assert not turned
    with torch.no_grad():
        assert_equal_training(sparse.eval(), dense.eval(), data, backward=False)


@pytest.mark.parametrize("saves", ["exact", "int8"])
def test_blocks_stay_when_kernels_are_chosen_again(saves: str) -> None:
    gm = swatfx.compile(
        Stages(lambda: CNBlock(NARROW, 0.5, 0.0)), POLICY, kernels="sparse", norm_saves=saves
    )
    found, graph = images(gm), str(gm.graph)
    assert len(found) == 6
    gm.bfloat16()
    assert images(gm) == found and str(gm.graph) == graph
    gm.float()
    assert images(gm) == found and str(gm.graph) == graph
    gm(torch.randn(16, 8, 4, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gm.parameters())


class ByKeyword(OtherBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.permute(input=self.depthwise(x), dims=(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(self.norm(y))))
        return x + torch.permute(input=y, dims=(0, 3, 1, 2))


def test_permutations_by_keyword() -> None:
    sparse, dense = pair(lambda: Stages(ByKeyword), POLICY)
    torch.manual_seed(1)
    assert_equal_training(sparse, dense, [torch.randn(16, 8, 4, 4) for _ in range(2)])


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_stochastic_depth_draws_as_it_did(probability: float) -> None:
    sparse, dense = pair(lambda: Stages(lambda: CNBlock(NARROW, 0.5, probability)), EXACT)
    assert len(images(sparse)) == 6
    x = torch.randn(16, 8, 4, 4)
    grads = []
    for gm in (sparse, dense):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(gm(x).square().sum(), list(gm.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(16, 3, 3), (3, 4, 4), (5, 5, 3), (16, 1, 2), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_blocks_of_any_size_are_the_formula(size: tuple[int, int, int], half: bool) -> None:
    """Where images do not fill lines, tensors lie as in eager, and values are no other."""
    torch.manual_seed(0)
    both = pair(lambda: Stages(OtherBlock), EXACT)
    assert images(both[0])
    x = torch.randn(size[0], 8, *[2 * s for s in size[1:]])
    results = []
    for gm in both:
        seen = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = gm(seen)
        grads = torch.autograd.grad(y.float().square().sum(), [seen, *gm.parameters()])
        results.append((y.detach(), *grads))
    for one, other in zip(*results, strict=True):
        error = float((one - other).norm()) / max(float(other.norm()), 1e-30)
        assert error < (0.05 if half else 1e-4)


@pytest.mark.parametrize("at", ["seen", "norm", "made", "back"])
@pytest.mark.parametrize("name", SPOILERS)
def test_blocks_that_others_see_into_are_left_alone(name: str, at: str) -> None:
    def build() -> nn.Module:
        return Stages(lambda: OtherBlock(SPOILERS[name], at))

    sparse, dense = pair(build, EXACT)
    if at != "seen":
        assert not images(sparse)
    torch.manual_seed(1)
    assert_equal_training(sparse, dense, [torch.randn(16, 8, 4, 4) for _ in range(2)])


@pytest.mark.parametrize("which", ["norm", "up", "down"])
def test_hooks_in_a_block_see_what_they_saw(which: str) -> None:
    strides: dict[str, list[tuple[int, ...]]] = {"sparse": [], "dense": []}
    model = Stages(OtherBlock)
    for kind, found in strides.items():
        twin = copy.deepcopy(model)
        assert isinstance(twin.one, OtherBlock)
        twin.one.get_submodule(which).register_forward_hook(
            lambda _, given, made, found=found: found.append(made.stride())
        )
        gm = swatfx.compile(twin, POLICY, kernels=kind)
        gm(torch.ones(16, 8, 4, 4))
        assert not any(name.startswith("one.") for name in images(gm))
    assert strides["sparse"] == strides["dense"] and strides["dense"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_block_is_one_graph_under_torch_compile() -> None:
    gm = swatfx.compile(Stages(OtherBlock), POLICY, kernels="sparse")
    x = torch.randn(16, 8, 4, 4)
    gm(x).sum().backward()
    wanted = [p.grad.clone() for p in gm.parameters() if p.grad is not None]
    gm.zero_grad()
    torch.compile(gm, backend="aot_eager", fullgraph=True)(x).sum().backward()
    for p, grad in zip(gm.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "reads",
    [
        lambda y: y,
        lambda y: y.flatten(1),
        lambda y: y.view(-1, WIDE),
        lambda y: y[0],
        lambda y: F.layer_norm(y, (WIDE,)),
        lambda y: torch.relu(y).stride(0) * y.new_ones(()),
    ],
    ids=["output", "flatten", "view", "item", "norm", "stride"],
)
def test_other_readers_see_what_they_saw(reads: Callable[[Tensor], Tensor]) -> None:
    sparse, dense = pair(lambda: Reading(reads), POLICY)
    assert told(sparse) == []
    x = torch.randn(4, 16, NARROW)
    for one, other in zip(sparse(x), dense(x), strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()


def test_hooked_functions_see_what_they_saw() -> None:
    strides = []
    model = mlp()
    model[1].register_forward_hook(lambda _, given, made: strides.append(made.stride()))
    gm = swatfx.compile(model, POLICY, kernels="sparse")
    gm(torch.randn(4, 16, NARROW))
    assert strides == [(16 * WIDE, WIDE, 1)]


@pytest.mark.parametrize("rows", [(31,), (32,), (33,), (4, 17), (2, 8, 2), (0,), (4, 0)], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_where_rows_fill_cache_lines(rows: tuple[int, ...], half: bool) -> None:
    torch.manual_seed(0)
    count = torch.Size(rows).numel()
    turned = count > 0 and count % 32 == 0
    sparse, dense = pair(mlp, EXACT)
    strides: list[tuple[int, ...]] = []
    x = torch.randn(*rows, NARROW, requires_grad=True)
    results = []
    for gm in (sparse, dense):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            strides.append(_first_stride(gm, x))
            y = gm(x)
        grads = torch.autograd.grad(y.float().square().sum(), [x, *gm.parameters()])
        results.append((y.detach(), *grads))
    wide = (*rows, WIDE)
    if count:
        lies = FEATURES_MAJOR if turned else layouts.ROW_MAJOR
        assert strides[0] == tuple(layouts.strides_of(wide, lies))
    for one, other in zip(*results, strict=True):
        error = float((one - other).norm()) / max(float(other.norm()), 1e-30)
        assert error < (0.02 if half else 1e-5)


def _first_stride(gm: SwatModule, x: Tensor) -> tuple[int, ...]:
    """Of what the first layer makes."""
    found: list[tuple[int, ...]] = []

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if n.target is OPS.linear.default or n.target is OPS.linear:
                found.append(out.stride())
            return out

    Noting(gm).run(x)
    return found[0]


@pytest.mark.parametrize("shape", [(33, 40), (4, 8, 40)], ids=str)
def test_elementwise_ops_keep_the_order(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = layouts.as_layout(torch.randn(shape), FEATURES_MAJOR).detach().requires_grad_()
    strides = tuple(layouts.strides_of(shape, FEATURES_MAJOR))
    grad = torch.randn(shape)
    assert layouts.elementwise_layout_of(x) == FEATURES_MAJOR
    calls: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
        "relu": (lambda: OPS.relu(x)[0], torch.relu),
        "gelu": (lambda: OPS.elementwise(x, "gelu", "int8")[0], F.gelu),
        "silu": (lambda: OPS.elementwise(x, "silu", "int8")[0], F.silu),
    }
    for name, (call, plain) in calls.items():
        wide = x.detach().double().requires_grad_()
        true = plain(wide)
        (wanted,) = torch.autograd.grad(true, wide, grad.double())
        y = call()
        (found,) = torch.autograd.grad(y, x, grad)
        assert y.stride() == found.stride() == strides, name
        torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.double(), wanted, rtol=0.0, atol=0.03)
    y = OPS.dropout(x, 0.5)[0]
    (found,) = torch.autograd.grad(y, x, grad)
    assert y.stride() == found.stride() == strides
    assert torch.equal(y, torch.where(y == 0, 0.0, 2 * x))
    assert torch.equal(found, torch.where(y == 0, 0.0, 2 * grad))


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (POLICY, {"norm_saves": "int8"}),
        (POLICY, {"value_dtype": "bf16"}),
        (POLICY + ",weight_selector=block-4x1", {}),
        ("static:0.8,first_dense=False", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("half", [False, True])
def test_options_go_with_it(policy: str, options: dict[str, str], half: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(mlp(), mlp())
    both = [
        swatfx.compile(copy.deepcopy(model), policy, kernels=k, **options)
        for k in ("sparse", "dense")
    ]
    assert len(told(both[0])) == 3  # all but the last
    x = torch.randn(4, 16, NARROW)
    for gm in both:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = gm(x).float().square().mean()
        loss.backward()
    for (name, p), q in zip(both[0].named_parameters(), both[1].parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        error = float((p.grad - q.grad).norm() / q.grad.norm())
        assert error < (0.05 if half else 0.02), (name, error)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_under_torch_compile() -> None:
    gm = swatfx.compile(mlp(), POLICY, kernels="sparse")
    x = torch.randn(4, 16, NARROW)
    gm(x).sum().backward()
    wanted = [p.grad.clone() for p in gm.parameters() if p.grad is not None]
    gm.zero_grad()
    torch.compile(gm, backend="aot_eager", fullgraph=True)(x).sum().backward()
    for p, grad in zip(gm.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("lies", [layouts.ROW_MAJOR, FEATURES_MAJOR])
@pytest.mark.parametrize("shape", [(20, 30), (4, 8, 30), (3, 30), (4, 8, 1)], ids=str)
def test_opcheck(shape: tuple[int, ...], lies: str) -> None:
    x = layouts.empty(shape, lies, dtype=torch.float32).normal_().requires_grad_()
    w = torch.randn(40, shape[-1], requires_grad=True)
    kept = OPS.pack(x.detach(), torch.tensor(0.8), 0, "nchw", x.dtype)
    args = (x, w, None, torch.tensor(0.7), kept)
    options = {"sparse_kernels": True, "layout": FEATURES_MAJOR}
    torch.library.opcheck(OPS.linear, args, options)
    y = OPS.linear(*args, **options)
    with kernels.reference_only():
        assert OPS.linear(*args, **options).stride() == y.stride()
    assert layouts.lies_in(y, FEATURES_MAJOR)


def test_chosen_again_nothing_is_left() -> None:
    gm = swatfx.compile(mlp(), POLICY, kernels="sparse")
    packs = [layer.pack_module for layer in sparse_nodes(gm)]
    assert [p.layout for p in packs if p is not None] == [FEATURES_MAJOR] * 2
    gm.double()  # no sparse kernels
    assert told(gm) == []
    packs = [layer.pack_module for layer in sparse_nodes(gm)]
    assert [p.layout for p in packs if p is not None] == [layouts.ROW_MAJOR] * 2
    gm.float()
    assert told(gm) == ["0"]


@pytest.mark.parametrize("saves", ["exact", "int8"])
def test_predicted_bytes_are_measured_ones(saves: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 4, 1, 2, 32, 64, num_classes=10)
    gm = swatfx.compile(net, POLICY, kernels="sparse", norm_saves=saves)
    assert told(gm)
    x = torch.randn(4, 3, 32, 32)
    result = swatfx.report(gm, x)
    twin = copy.deepcopy(gm)
    assert result.totals["saved_bytes"] == kept_by(lambda: twin(x), twin)


def test_an_export_leaves_rows_open(tmp_path: Path) -> None:
    gm = swatfx.compile(mlp(), POLICY, kernels="sparse")
    x = torch.randn(64, NARROW)
    swatfx.export(gm, tmp_path / "a.pt2", (x,), training=True)
    read = torch.export.load(tmp_path / "a.pt2").module()
    for rows in (33, 96):
        assert read(torch.randn(rows, NARROW)).shape == (rows, NARROW)
    open_rows = ({0: torch.export.Dim("rows", min=20)},)
    program = torch.export.export(gm.eval(), (x,), dynamic_shapes=open_rows)
    for rows in (33, 96):
        data = torch.randn(rows, NARROW)
        torch.testing.assert_close(program.module()(data), gm(data))


class Chosen(nn.Module):
    """Rows whose number depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        out: Tensor = self.mlp(x[keep])
        return out


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [None, True])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_depend_on_data_are_compiled(dynamic: bool | None) -> None:
    gm = swatfx.compile(Chosen(), EXACT, kernels="sparse")
    assert told(gm)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (80, 64, 128):
        x, keep = torch.randn(rows, NARROW), torch.arange(rows) % 2 == 0
        grads = [
            torch.autograd.grad(call(x, keep).square().sum(), list(gm.parameters()))
            for call in (gm, compiled)
        ]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", FEATURES_OUTERMOST)
@pytest.mark.parametrize("rows", [(17,), (33,), (3, 7), (2, 3, 5), (4, 8)], ids=str)
def test_an_op_that_is_told_obeys(rows: tuple[int, ...], layout: str) -> None:
    """Also where rows fill no lines, which graphs do not ask for."""
    x = torch.randn(*rows, NARROW)
    w = torch.randn(WIDE, NARROW)
    y = OPS.linear(x, w, None, torch.tensor(0.0), None, sparse_kernels=True, layout=layout)
    assert layouts.as_layout(y, layout).data_ptr() == y.data_ptr()
    torch.testing.assert_close(y.double(), F.linear(x.double(), w.double()), rtol=1e-4, atol=1e-4)
