"""Every matrix product counts: totals of reports against torch's own FlopCounterMode."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import swatfx
from swatfx.costs.records import Report

aten = torch.ops.aten


def _swapped(shape: Any) -> list[int]:
    return [shape[1], shape[0], *shape[2:]]


def _backward_of_convolution(
    grad: Any, x: Any, w: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Torch's own formula, but for its weight gradient of groups, which it counts groups times."""
    transposed, _, groups, wanted = args[4:8]
    flops = 0
    if wanted[0]:
        flops += conv_flop_count(grad, w, out_shape[0], not transposed)
    if wanted[1]:
        a, g = (grad, x) if transposed else (x, grad)
        flops += conv_flop_count(_swapped(a), _swapped(g), _swapped(out_shape[1])) // groups
    return flops


def counted(
    model: nn.Module,
    inputs: tuple[Any, ...],
    backward: bool,
    call: Callable[..., Any] | None = None,
) -> int:
    """MACs that FlopCounterMode counts of the dense model; attention as two products."""
    mapping = {
        aten.convolution_backward: _backward_of_convolution,
        aten._grouped_mm: lambda a, b, *args, out_shape=None, **kwargs: 2 * math.prod(a) * b[-1],
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    model.train()
    attention: Any = nullcontext() if inputs[0].is_meta else sdpa_kernel(SDPBackend.MATH)
    with counter, attention:
        out = (call or model)(*inputs)
        if backward:
            leaves = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            leaves = [t for t in leaves if t.requires_grad]
            torch.autograd.backward(leaves, [torch.ones_like(t) for t in leaves])
    return counter.get_total_flops() // 2


def dense_macs(result: Report, which: str = "dense") -> tuple[int, int]:
    """(forward, all three passes)."""
    t = result.totals
    passes = ("forward", "input_gradient", "weight_gradient")
    return t[f"{which}_forward_macs"], sum(t[f"{which}_{p}_macs"] for p in passes)


VISION = {
    "resnet18": 224,
    "vgg11_bn": 224,
    "densenet121": 64,
    "mobilenet_v2": 96,
    "mobilenet_v3_small": 96,
    "efficientnet_b0": 96,
    "convnext_tiny": 64,
    "vit_b_16": 224,
    "swin_t": 96,
    "maxvit_t": 224,
    "googlenet": 96,
    "inception_v3": 299,
    "squeezenet1_1": 96,
    "shufflenet_v2_x1_0": 96,
    "regnet_y_400mf": 96,
    "mnasnet0_5": 96,
}
FAST = ("resnet18", "mobilenet_v2", "vit_b_16")


def _vision(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # regnet computes its widths with tensors, which meta has no values of.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = getattr(torchvision.models, name)(**options)
    images = torch.empty(2, 3, VISION[name], VISION[name], device="meta")
    return model.to("meta"), (images,)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in VISION]
)
def test_torchvision(name: str) -> None:
    """Forward under "paper" and "torch" accounting, and the whole step under "torch"."""
    model, inputs = _vision(name)
    forward, step = (counted(model, inputs, backward) for backward in (False, True))
    gm = swatfx.compile(model, "swat-u:0.9")
    result = swatfx.report(gm, inputs, accounting="torch")
    ours = dense_macs(result)
    assert ours[0] == pytest.approx(forward, rel=0.01)
    assert ours[1] == pytest.approx(step, rel=0.01)
    paper = swatfx.report(gm, inputs)
    assert dense_macs(paper)[0] == pytest.approx(forward, rel=0.01)


# ---- Networks that are more than convolutions and linear layers ----------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.rnn = kind(16, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.LSTMCell(8, 16), nn.GRUCell(16, 16), nn.RNNCell(16, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.a(x)
        return self.out(self.c(self.b(h + c)))


class Detector(nn.Module):
    """As DETR: a backbone, an encoder and decoder over its positions, queries, a mask head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 7, 4, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)
        )
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.queries = nn.Parameter(torch.randn(10, 32))
        self.boxes, self.mask = nn.Linear(32, 4), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x)
        tokens = features.flatten(2).transpose(1, 2)
        found = self.transformer(tokens, self.queries.expand(len(x), -1, -1))
        return self.boxes(found), torch.einsum("bqc,bchw->bqhw", self.mask(found), features)


class Products(nn.Module):
    """A product a line, each of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y @ self.w
        y = torch.matmul(y, self.w.t())
        y = torch.mm(y, self.w)
        y = torch.addmm(self.bias, y, self.w)
        y = torch.einsum("ni,ij->nj", y, self.w)
        y = torch.tensordot(y, self.w, dims=([1], [0]))
        z = torch.bmm(y.expand(3, -1, -1), self.experts)
        z = torch.baddbmm(z, y.expand(3, -1, -1), self.experts)
        z = z + torch.stack([y @ self.experts[i] for i in range(3)])
        scores = torch.softmax(z @ z.transpose(1, 2), -1)
        y = (scores @ z).sum(0)
        return self.last(y * torch.sigmoid(y @ y.t() @ y))


class Computed(nn.Module):
    """A weight that the graph computes, and one that eager code does."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(4, 16)
        self.loop = Looping()

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.base.weight + self.b.weight @ self.a.weight, self.base.bias)
        return self.loop(self.b(self.a(x)))


class Looping(nn.Module):
    """Eager: tracing cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rnn, self.norm = nn.Linear(16, 16), nn.GRU(16, 16), nn.BatchNorm1d(16)
        self.w = nn.Parameter(torch.randn(16, 16))
        self.conv = nn.Parameter(torch.randn(16, 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > len(x.shape) and bool(x.is_floating_point()) and self._loops(x):
            x = x + 1
        x = self.norm(self.fc(x)) @ self.w
        x = F.conv1d(x.t().unsqueeze(0), self.conv, padding=1)[0].t()
        return self.rnn(x @ x.t() @ F.linear(x, self.fc.weight))[0]

    def _loops(self, x: Tensor) -> bool:
        for _ in x:
            return False
        return True


class Upwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, groups=1), nn.ConvTranspose2d(8, 8, 4, 2, groups=2)
        self.c = nn.ConvTranspose1d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).flatten(2))


class Pairwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.scaled_dot_product_attention(y[None], y[None], y[None])[0])


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "lstm": (Recurrent, lambda: torch.randint(50, (3, 7))),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randint(50, (3, 7))),
    "rnn": (lambda: Recurrent(nn.RNN), lambda: torch.randint(50, (3, 7))),
    "cells": (Cells, lambda: torch.randn(3, 8)),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2
        ),
        lambda: torch.randn(5, 3, 16),
    ),
    "detector": (Detector, lambda: torch.randn(2, 3, 64, 64)),
    "products": (Products, lambda: torch.randn(6, 8)),
    "computed": (Computed, lambda: torch.randn(6, 16)),
    "looping": (Looping, lambda: torch.randn(6, 16)),
    "upwards": (Upwards, lambda: torch.randn(2, 3, 9, 9)),
    "attention": (Pairwise, lambda: torch.randn(6, 8)),
}
ON_VALUES = ("computed", "looping")  # forward looks at values: meta inputs have none


def on_meta(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, inputs = NETS[name]
    return build().to("meta"), (inputs().to("meta"),)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_other_networks(name: str, real: bool) -> None:
    """As FlopCounterMode counts on meta; real inputs run other ops and count the same."""
    build, inputs = NETS[name]
    torch.manual_seed(0)
    model, x = build(), inputs()
    if name in ON_VALUES:
        if not real:
            pytest.skip("forward looks at values")
        forward, step = (counted(model, (x,), backward) for backward in (False, True))
    else:
        forward, step = (counted(*on_meta(name), backward) for backward in (False, True))
    gm = swatfx.compile(model, "swat-u:0.9,first_dense=False")
    result = swatfx.report(gm, x if real else x.to("meta"), accounting="torch")
    assert dense_macs(result) == (forward, step)


# ---- Rows ----------------------------------------------------------------------------------------


def _rows(model: nn.Module, *inputs: Any, policy: str = "swat-u:0.9,first_dense=False") -> Any:
    result = swatfx.report(swatfx.compile(model, policy), inputs, accounting="torch")
    return result, {x.name: (x.kind, x.dense_forward_macs, x.skipped) for x in result.layers}


OUTSIDE = "weight used outside conv and linear calls"
OF_ACTIVATIONS = "matrix product of activations"


class Fault(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.w = nn.Parameter(torch.randn(64, 512))
        self.v = nn.Parameter(torch.randn(512, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) + torch.relu(x @ self.w) @ self.v)


@pytest.mark.parametrize("accounting", ["paper", "torch", "exact"])
def test_a_row_each_in_every_format(accounting: str) -> None:
    """8 of 72 thousand MACs an item are sparse, and so are 8 of 72 thousand weights."""
    gm = swatfx.compile(Fault(), "swat-u:0.9,first_dense=False")
    x = torch.empty(8, 64, device="meta")
    result = swatfx.report(gm, x, accounting=accounting)
    t, layers = result.totals, {layer.name: layer for layer in result.layers}
    assert list(layers) == ["a", "w", "v", "b"]
    for name, size in (("w", 64 * 512), ("v", 512 * 64)):
        row = layers[name]
        assert (row.kind, row.skipped, row.kernels) == ("matmul", OUTSIDE, "")
        assert row.dense_forward_macs == row.sparse_forward_macs == row.inference_macs == 8 * size
        assert (row.parameters, math.prod(row.weight_shape)) == (size, size)
        assert (row.weight_density, row.activation_density) == (1.0, 1.0)
    assert layers["w"].dense_input_gradient_macs == 0  # of the model's input, none is wanted
    assert layers["v"].dense_input_gradient_macs == layers["v"].dense_weight_gradient_macs
    assert t["inference_mac_reduction"] == pytest.approx(0.9 * 8192 / (8192 + 65536), abs=1e-3)
    assert t["weight_sparsity"] == pytest.approx(0.9 * 8192 / (8192 + 65536), abs=1e-3)
    assert t["training_mac_reduction"] < 0.2
    assert {r["name"] for r in csv.DictReader(io.StringIO(result.to_csv()))} == set(layers)
    assert [r["skipped"] for r in json.loads(result.to_json())["layers"]][1:3] == [OUTSIDE] * 2
    for text in (result.to_text(), result.to_markdown()):
        assert text.count(OUTSIDE) == 2
    kept = (*result.layers, *result.others)
    assert sum(r.sparse_saved_bytes for r in kept) == t["saved_bytes"]
    assert sum(r.dense_saved_bytes for r in kept) == t["dense_saved_bytes"]


def test_names_kinds_and_reasons() -> None:
    _, rows = _rows(Recurrent(), torch.randint(50, (3, 7)))
    lstm = {name: row for name, row in rows.items() if name.startswith("rnn.")}
    assert len(lstm) == 8 and {(kind, why) for kind, _, why in lstm.values()} == {("lstm", OUTSIDE)}
    assert rows["rnn.weight_ih_l0"][1] == 3 * 7 * 4 * 32 * 16
    _, rows = _rows(Pairwise(), torch.randn(6, 8))
    assert rows["scaled_dot_product_attention"] == (
        "scaled_dot_product_attention",
        2 * 6 * 6 * 8,
        OF_ACTIVATIONS,
    )
    _, rows = _rows(Looping(), torch.randn(6, 16))
    assert rows["w"] == ("matmul", 6 * 256, OUTSIDE)
    assert rows["conv"] == ("conv1d", 3 * 6 * 256, OUTSIDE)
    assert rows["the root module"] == ("matmul", 2 * 6 * 6 * 16, OF_ACTIVATIONS)
    # Of one weight, a layer's calls are the layer's and any other use is a row of its own.
    assert rows["fc"] == ("linear", 6 * 256, None)
    assert rows["the root module_1"] == ("matmul", 6 * 256, OUTSIDE)


class OwnForward(nn.Linear):
    """A low-rank addition in a layer's own forward."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class Unused(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum()


class Dynamic(nn.Module):
    """Its weight comes from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.last = nn.Linear(8, 64), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.make(x)[0].view(8, 8)))


def test_a_layer_counts_what_it_computes() -> None:
    result, rows = _rows(
        nn.Sequential(nn.Linear(16, 16), OwnForward(), Unused(16, 16)), torch.ones(4, 16)
    )
    assert rows["1"][:2] == ("linear", 4 * 256) and rows["2"][1] == 0
    assert rows["1.down"][1] == rows["1.up"][1] == 4 * 32
    assert dense_macs(result)[0] == 4 * (2 * 256 + 64)
    _, rows = _rows(Dynamic(), torch.ones(4, 8))
    assert sum(macs for _, macs, _ in rows.values()) == 4 * (512 + 64 + 64)


def test_hooks_count() -> None:
    """What a hook multiplies is on nobody else's account."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].register_forward_hook(lambda m, args, out: out @ out.t() @ out)
    result, rows = _rows(net, torch.ones(4, 8))
    assert dense_macs(result)[0] == 2 * 4 * 64 + 2 * 4 * 4 * 8
    assert OF_ACTIVATIONS in [why for _, _, why in rows.values()]


class Lambda(nn.Module):
    def __init__(self, run: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.run, self.p, self.a = run, nn.Parameter(torch.rand(*shape)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.a(x), self.p)


INDICES = torch.arange(6).view(2, 3)
UNCOUNTED_BY_TORCH: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], int]] = {
    "bilinear": (lambda x, p: F.bilinear(x, x, p), (5, 8, 8), 4 * 5 * 8 * 8 + 4 * 5 * 8),
    "vector": (lambda x, p: x @ p, (8,), 4 * 8),
    "dot": (lambda x, p: x[0] @ p, (8,), 8),
    "addmv": (lambda x, p: torch.addmv(x.sum(1), x, p), (8,), 4 * 8),
    "addbmm": (lambda x, p: torch.addbmm(x, x[None], p[None]), (8, 8), 4 * 64),
    "cdist": (lambda x, p: torch.cdist(x, p), (40, 8), 4 * 40 * 10),
    "bag": (
        lambda x, p: F.embedding_bag(INDICES, p, mode="sum", per_sample_weights=x[:2, :3]),
        (6, 5),
        6 * 5,
    ),
    "bag without weights": (
        lambda x, p: F.embedding_bag(INDICES, p, mode="sum") + x.sum(),
        (6, 5),
        0,
    ),
    "time first": (lambda x, p: torch.conv_tbc(x[:, None], p, p[0, 0]), (3, 8, 8), 2 * 3 * 64),
    "deformable": (
        lambda x, p: torchvision.ops.deform_conv2d(x.view(1, 2, 4, 4), x.new_zeros(1, 8, 3, 3), p),
        (5, 2, 2, 2),
        9 * 5 * 2 * 4,
    ),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", UNCOUNTED_BY_TORCH)
def test_products_that_torch_has_no_formula_for(name: str) -> None:
    run, shape, macs = UNCOUNTED_BY_TORCH[name]
    _, rows = _rows(Lambda(run, *shape), torch.randn(4, 8))
    assert sum(n for _, n, _ in rows.values()) == 4 * 64 + macs, rows


def test_frozen_weights_cost_no_gradient() -> None:
    model = Fault()
    model.v.requires_grad_(False)
    model.b.weight.requires_grad_(False)
    result, _ = _rows(model, torch.empty(8, 64, device="meta"))
    with torch.device("meta"):
        twin = Fault()
    twin.v.requires_grad_(False)
    twin.b.weight.requires_grad_(False)
    inputs = (torch.empty(8, 64, device="meta"),)
    assert dense_macs(result) == (counted(twin, inputs, False), counted(twin, inputs, True))


def test_products_without_gradients() -> None:
    def frozen(x: Tensor, p: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ p

    result, rows = _rows(Lambda(frozen, 8, 8), torch.randn(4, 8))
    row = next(layer for layer in result.layers if layer.name == "p")
    assert (row.dense_input_gradient_macs, row.dense_weight_gradient_macs) == (0, 0)
    assert rows["p"][1] == 4 * 64


class Checkpointed(nn.Module):
    """Products inside an autograd function have no gradient while it runs, and have one after."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.a = reentrant, nn.Linear(8, 8)
        self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return checkpoint(lambda y: y @ self.w @ self.v, y, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_products_have_gradients(reentrant: bool) -> None:
    result, rows = _rows(Checkpointed(reentrant), torch.randn(4, 8))
    assert {"w", "v"} < set(rows)
    for layer in result.layers:
        if layer.name in ("w", "v"):
            assert layer.dense_input_gradient_macs == layer.dense_weight_gradient_macs == 256


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_products_inside_torchscript() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.w) @ self.w.t()

    inner = torch.jit.trace(Inner(), torch.randn(4, 8))
    result, _ = _rows(nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8)), torch.randn(4, 8))
    assert dense_macs(result)[0] == 4 * 4 * 64


# ---- Norms ---------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.eager_ = eager
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.eager_ and x.sum() > -1e9:
            x = x * 1.0
        x = self.norm(self.a(x))
        return F.batch_norm(self.b(torch.relu(x)), None, None, training=True)


def test_norms_inside_eager_parts_count() -> None:
    """As they do in a graph: a module, and a function."""
    x = torch.randn(2, 3, 9, 9)
    found = [
        swatfx.report(swatfx.compile(Normed(eager), "swat-u:0.8,first_dense=False"), x)
        for eager in (False, True)
    ]
    assert found[1].eager
    norms = 2 * 8 * (7 * 7 + 5 * 5)
    for result in found:
        assert result.totals["norm_input_elements"] == norms
    keys = ("activation_reduction", "activation_sparsity", "conv_input_elements")
    for key in keys:
        assert found[0].totals[key] == found[1].totals[key]
    rows = {record.name: record.kind for record in found[1].others}
    assert rows["norm"] == "batch norm"
    kept = (*found[1].layers, *found[1].others)
    assert sum(r.dense_saved_bytes for r in kept) == found[1].totals["dense_saved_bytes"]


# ---- Transformers of the zoo ---------------------------------------------------------------------


def _bert() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=60, intermediate_size=64, hidden_dropout_prob=0.0, **sizes)
    return BertForSequenceClassification(config), torch.randint(60, (2, 9))


def _gpt2() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config), torch.randint(60, (2, 9))


def _mixtral() -> tuple[nn.Module, Tensor]:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_key_value_heads": 1, "intermediate_size": 64}
    return MixtralForCausalLM(MixtralConfig(vocab_size=60, **sizes, **experts)), torch.randint(
        60, (2, 9)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [_bert, _gpt2, _mixtral])
def test_transformers(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, ids = build()
    model.train()
    dense = counted(model, (ids,), False)
    # All of GPT-2's layers are Conv1D, products that are no layer's, but the last.
    gm = swatfx.compile(model, "swat-u:0.9,first_dense=False", example_inputs=(ids,))
    result = swatfx.report(gm, ids, accounting="torch")
    assert dense_macs(result)[0] == pytest.approx(dense, rel=0.01)
