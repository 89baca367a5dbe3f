"""MACs and saved bytes: worked by hand, counted by brute force, and seen by autograd itself."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx import models
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.costs.records import LayerRecord
from tests.nets.saving_nets import kept_by
from tests.nets.small_nets import (
    EagerMiddle,
    EagerRoot,
    Residual,
    Tied,
    TwoInputs,
    assert_same,
    batches,
    pads,
    plain,
    sgd,
    snapshot,
    train,
)

PASSES = ("forward", "input_gradient", "weight_gradient")


def _macs(record: LayerRecord, which: str) -> tuple[int, ...]:
    return tuple(getattr(record, f"{which}_{p}_macs") for p in PASSES)


def _layers(gm: SwatModule, inputs: Any, **options: Any) -> dict[str, LayerRecord]:
    return {x.name: x for x in swatfx.report(gm, inputs, **options).layers}


def _tiny() -> nn.Sequential:
    """On (2, 1, 4, 4): 3x3 with borders, 3x3 with stride 2, 2x2 in groups, then linear."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 2, padding=1, dilation=2, groups=2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def test_paper_accounting_by_hand() -> None:
    """F*C*R*S * N*H*W forward, and X*Y for the input gradient; the first layer's is counted."""
    gm = swatfx.compile(_tiny(), "swat-u:0.75")
    layers = _layers(gm, torch.empty(2, 1, 4, 4, device="meta"))
    assert _macs(layers["0"], "dense") == (2 * 9 * 2 * 16,) * 3 == (576,) * 3
    assert _macs(layers["0"], "sparse") == (576,) * 3
    dense = (8 * 9 * 2 * 4, 8 * 9 * 2 * 16, 8 * 9 * 2 * 4)
    assert _macs(layers["1"], "dense") == dense == (576, 2304, 576)
    assert _macs(layers["1"], "sparse") == (144, 576, 144)
    # 2x2 with dilation 2 and padding 1 on 2x2: 2x2 again; two groups of 2 channels.
    assert _macs(layers["2"], "dense") == (8 * 4 * 2 * 4,) * 3 == (256,) * 3
    assert _macs(layers["2"], "sparse") == (64,) * 3
    assert _macs(layers["4"], "dense") == (80 * 2,) * 3
    assert _macs(layers["4"], "sparse") == (40,) * 3
    totals = swatfx.report(gm, torch.empty(2, 1, 4, 4, device="meta")).totals
    dense_sum, sparse_sum = 3 * 576 + 3456 + 768 + 480, 3 * 576 + 864 + 192 + 120
    assert totals["training_mac_reduction"] == 1 - sparse_sum / dense_sum
    assert totals["inference_mac_reduction"] == 1 - (576 + 144 + 64 + 40) / (576 + 576 + 256 + 160)
    # conv inputs 2 * (16 + 32 + 16), all counted as 75% sparse, no batch norm
    assert totals["activation_reduction"] == 0.75


def test_exact_accounting_by_hand() -> None:
    """Borders: a 3-tap row with padding 1 meets 3 + 4 + 3 inputs of four, 10 of 12."""
    gm = swatfx.compile(_tiny(), "swat-u:0.75")
    with torch.no_grad():  # which weights and activations are kept is in our hands
        weight = gm.get_parameter("1.weight")
        weight.fill_(0.1)
        weight[:, :, 1, 1] = 1.0  # the centre: 8 of 72, and 10 corners with it make a quarter
        weight[:, 0, 0, 0] = 2.0
        weight[:, 1, 0, 0] = 2.0
        weight[0, :, 2, 2] = 3.0
        gm.get_parameter("0.weight").fill_(0.0)
        gm.get_parameter("0.bias").copy_(torch.tensor([1.0, 0.0]))
    swatfx.refresh(gm)
    x = torch.randn(2, 1, 4, 4)
    layers = _layers(gm, x, accounting="exact")
    # Layer 0, dense: 10 * 10 (tap, output) pairs, two filters, two samples; no input gradient.
    assert _macs(layers["0"], "dense") == (2 * 100 * 2, 0, 2 * 100 * 2)
    assert _macs(layers["0"], "sparse") == (400, 0, 400)
    # Layer 1: outputs at 0 and 2; tap 0 meets one input (at 1), tap 1 two, tap 2 two: 5 * 5.
    assert _macs(layers["1"], "dense") == (8 * 25 * 2,) * 3
    # Kept, 18 of 72: 8 corners (1 output each), 8 centres (4), 2 far corners (4).
    assert int(sum(x.keep().sum() for x in sparse_layers(gm) if x.plan.name == "1")) == 18
    kept = (8 * 1 + 8 * 4 + 2 * 4) * 2
    # Channel 0 is all ones (ties: all 32 kept), channel 1 all zeros (never stored); each input
    # meets (1 + 2 + 1 + 1) ** 2 = 25 (tap, output) pairs over the image, and four filters.
    assert _macs(layers["1"], "sparse") == (kept, kept, 25 * 4 * 2)
    assert layers["1"].realised_activation_density == 0.5
    assert layers["1"].realised_weight_density == 0.25


def _shapes(seed: int) -> tuple[nn.Sequential, Tensor, int]:
    rng = random.Random(seed)
    dims = rng.choice([1, 2, 3])
    groups = rng.choice([1, 2])
    kernel = tuple(rng.choice([1, 2, 3]) for _ in range(dims))
    mode = rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    if dims == 3 and mode == "reflect":
        mode = "circular"
    layer = conv(
        4,
        6,
        kernel,
        stride=rng.choice([1, 2]),
        padding=tuple(rng.choice([0, 1, 2]) for _ in kernel),
        dilation=rng.choice([1, 2]),
        groups=groups,
        padding_mode=mode,
    )
    x = torch.randn(2, 4, *[rng.choice([5, 6]) for _ in kernel])
    return nn.Sequential(conv(4, 4, 1), nn.ReLU(), layer), x, dims


@pytest.mark.parametrize("seed", range(24))
def test_exact_accounting_against_brute_force(seed: int) -> None:
    """A convolution of ones with a mask counts the products."""
    torch.manual_seed(seed)
    net, x, dims = _shapes(seed)
    gm = swatfx.compile(net, "swat-u:0.7")
    with swatfx.observe(copy.deepcopy(gm)):
        record = _layers(gm, x, accounting="exact")["2"]
    layer = net[2]
    call = [F.conv1d, F.conv2d, F.conv3d][dims - 1]
    weight_keep = next(iter(sparse_layers(gm))).keep().double()
    a = net[1](net[0](x)).detach()
    elements = a.numel()
    k = elements - int(0.7 * elements + 1e-9)
    threshold = a.abs().flatten().topk(k).values[-1]
    kept = ((a.abs() >= threshold) & (a != 0)).double()

    def products(activation: Tensor, weight: Tensor) -> int:
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            both = layer._reversed_padding_repeated_twice
            activation = F.pad(activation, both, mode=layer.padding_mode)
            padding = 0
        result = call(activation, weight, None, layer.stride, padding, layer.dilation, layer.groups)
        return int(result.sum().round().item())

    ones = torch.ones_like(a, dtype=torch.double)
    full = torch.ones_like(weight_keep)
    assert _macs(record, "dense") == (products(ones, full),) * 3
    masked = products(ones, weight_keep)
    assert _macs(record, "sparse") == (masked, masked, products(kept, full))


def test_shared_weights_are_one_record() -> None:
    gm = swatfx.compile(Tied(), "swat-u:0.5,first_dense=False")
    layers = _layers(gm, torch.empty(3, 6, device="meta"))
    assert list(layers) == ["first", "again"]
    assert _macs(layers["first"], "dense") == (2 * 36 * 3,) * 3
    assert _macs(layers["again"], "sparse") == (36 * 3,) * 3
    assert swatfx.report(gm, torch.empty(3, 6, device="meta")).totals["parameters"] == 72


def test_what_is_sparse_where_scales_its_pass_only() -> None:
    x = torch.empty(2, 1, 4, 4, device="meta")
    figures = {"forward_weight": False, "backward_weight": False, "backward_activation": False}
    for policy, expected in {
        swatfx.saw(0.75): (576, 576, 144),
        swatfx.meprop(0.75): (576, 576, 144),
        swatfx.Policy("figure 1 w", 0.75, **(figures | {"forward_weight": True})): (144, 2304, 576),
        swatfx.Policy("figure 1 a", 0.75, forward_activation=True, **figures): (144, 2304, 576),
        swatfx.swat_u(0.75, activation_sparsity=0.5): (144, 576, 288),
    }.items():
        layer = _layers(swatfx.compile(_tiny(), policy), x)["1"]
        assert _macs(layer, "dense") == (576, 2304, 576)
        assert _macs(layer, "sparse") == expected, policy.name


CASES: list[tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = [
    (plain, (torch.randn(4, 3, 8, 8),), "swat-u:0.8"),
    (Residual, (torch.randn(4, 3, 8, 8),), "swat-u:0.9"),
    (Residual, (torch.randn(4, 3, 8, 8),), "swat-erk:0.8,activation_selector=chw"),
    (Residual, (torch.randn(4, 3, 8, 8),), "saw:0.8"),
    (Residual, (torch.randn(4, 3, 8, 8),), "meprop:0.8"),
    (pads, (torch.randn(2, 3, 8, 8),), "swat-u:0.8"),
    (TwoInputs, (torch.randn(2, 3, 8, 8), torch.randn(2, 5)), "swat-u:0.8"),
    (Tied, (torch.randn(8, 6),), "swat-u:0.5,first_dense=False"),
    (EagerMiddle, (torch.randn(2, 3, 8, 8),), "swat-u:0.8"),
    (EagerRoot, (torch.randn(5, 12),), "swat-u:0.5"),
    (lambda: models.create("digits/cnn"), (torch.randn(8, 1, 8, 8),), "swat-u:0.9"),
    (lambda: models.create("cifar/resnet20"), (torch.randn(2, 3, 32, 32),), "swat-u:0.9"),
]
CASE_IDS = [f"{getattr(b, '__name__', 'net')}-{p}-{i}" for i, (b, _, p) in enumerate(CASES)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("build", "inputs", "policy"), CASES, ids=CASE_IDS)
def test_saved_bytes_are_what_autograd_keeps(
    build: Callable[[], nn.Module], inputs: tuple[Tensor, ...], policy: str
) -> None:
    torch.manual_seed(0)
    model = build()
    gm = swatfx.compile(model, policy)
    result = swatfx.report(gm, inputs)
    twin = copy.deepcopy(gm)
    assert result.totals["saved_bytes"] == kept_by(lambda: twin(*inputs), twin)
    plain_twin = copy.deepcopy(model)
    dense = kept_by(lambda: plain_twin(*inputs), plain_twin)
    assert result.totals["dense_saved_bytes"] == dense
    rows = (*result.layers, *result.others)
    assert sum(row.sparse_saved_bytes for row in rows) == result.totals["saved_bytes"]
    assert sum(row.dense_saved_bytes for row in rows) == dense
    for layer in result.layers:
        if layer.skipped is None and layer.realised_activation_density is not None:
            # An input that an earlier layer keeps as well is on that one's account.
            whole = layer.dense_saved_bytes or 4 * math.prod(layer.input_shape)
            assert layer.sparse_saved_bytes < whole or layer.parameters < 80


@pytest.mark.parametrize(("build", "inputs", "policy"), CASES, ids=CASE_IDS)
def test_reports_change_nothing(
    build: Callable[[], nn.Module], inputs: tuple[Tensor, ...], policy: str
) -> None:
    gm = swatfx.compile(build(), policy + ",period=2")
    optimizer = sgd(gm)
    for _ in range(3):
        gm(*inputs).sum().backward()
        optimizer.step()
    before, code, given = snapshot(gm), gm.code, [x.clone() for x in inputs]
    grads = [p.grad.clone() for p in gm.parameters() if p.grad is not None]
    rng = (torch.get_rng_state(), random.getstate())
    values = build not in (EagerMiddle, EagerRoot)
    metas = tuple(x.to("meta") for x in inputs)
    for example in (inputs, metas) if values else (inputs,):
        for accounting in ("paper", "exact"):
            swatfx.report(gm, example, accounting=accounting)
    assert torch.equal(torch.get_rng_state(), rng[0]) and random.getstate() == rng[1]
    assert_same(snapshot(gm), before)
    assert gm.training and gm.code == code
    assert all(torch.equal(a, b) for a, b in zip(inputs, given, strict=True))
    after = [p.grad for p in gm.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, grads, strict=True))


def test_random_state_survives_a_real_batch() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            if random.random() < 2 and bool((x == x).all()):
                x = self.drop(self.a(x)) + torch.rand(4)
            return self.b(x)

    gm = swatfx.compile(Noisy(), "swat-u:0.5,first_dense=False")
    rng = (torch.get_rng_state(), random.getstate())
    swatfx.report(gm, torch.randn(3, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), rng[0]) and random.getstate() == rng[1]


def test_meta_inputs_allocate_nothing() -> None:
    """A batch of 2**30 images: its activations would be a hundred terabytes."""
    gm = swatfx.compile(Residual(dropout=0.5), "swat-u:0.9")
    gm.eval()
    result = swatfx.report(gm, torch.empty(2**30, 3, 8, 8, device="meta"))
    assert result.totals["saved_bytes"] > 2**40
    small = swatfx.report(gm, torch.empty(2, 3, 8, 8, device="meta"))
    ratio = result.totals["dense_forward_macs"] / small.totals["dense_forward_macs"]
    assert ratio == 2**29


def test_planned_bytes_at_the_target_density() -> None:
    """On meta tensors: a bit an element, in eights of bytes, and the kept values."""
    gm = swatfx.compile(plain(), "swat-u:0.9")
    layer = _layers(gm, torch.empty(4, 3, 8, 8, device="meta"))["2"]
    elements = 4 * 8 * 8 * 8
    kept = elements - elements * 9 // 10
    state = 4  # the weight threshold that backward compares with
    assert layer.sparse_saved_bytes == elements // 8 + 4 * kept + state
    assert layer.dense_saved_bytes == elements * 4


def test_realised_density_counts_natural_zeros() -> None:
    """ReLU leaves about half: a target of 80% costs what is not zero."""
    torch.manual_seed(0)
    gm = swatfx.compile(plain(), "swat-u:0.2")
    train(gm, sgd(gm), batches(1))
    x = batches(1)[0]
    layer = _layers(gm, x)["2"]
    with swatfx.observe(gm) as observed:
        gm(x)
    seen = observed.activation_density
    assert layer.realised_activation_density == pytest.approx(seen["2"], abs=1e-6)
    assert layer.activation_density == 0.8
    assert 0.3 < seen["2"] < 0.7


def test_formats_say_the_same() -> None:
    result = swatfx.report(swatfx.compile(Residual(), "swat-u:0.9"), _meta_images())
    data = json.loads(result.to_json())
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [r["name"] for r in rows] == [x["name"] for x in data["layers"]]
    assert [int(r["sparse_forward_macs"]) for r in rows] == [
        x["sparse_forward_macs"] for x in data["layers"]
    ]
    assert rows[0]["skipped"] == "first layer" and rows[0]["weight_shape"] == "8x3x3x3"
    for text in (str(result), result.to_markdown()):
        for layer in result.layers:
            assert layer.name in text
        assert f"-{result.totals['training_mac_reduction']:.1%}" in text


def _meta_images() -> Tensor:
    return torch.empty(2, 3, 8, 8, device="meta")


def test_eager_parts_are_told() -> None:
    result = swatfx.report(swatfx.compile(EagerMiddle(), "swat-u:0.8"), torch.randn(2, 3, 8, 8))
    assert result.eager == {"gate": "untraceable: control flow on a tensor"}
    assert "eager: gate: untraceable" in str(result)
    assert {"gate.a", "gate.b"} <= {x.name for x in result.layers}
