"""What the methods cost: the paper's accounting of its baselines, and exact counts of products."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import models
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.costs.records import LayerRecord
from tests.nets.held_masks import POLICIES, TOTAL, UPDATES, attached
from tests.nets.small_nets import Residual, batches, plain, train

W, A = "weight", "activation"
# What scales forward, input gradient, weight gradient and inference; numbers are themselves.
FACTORS: dict[str, tuple[float | str, ...]] = {
    **dict.fromkeys(UPDATES, (W, W, 0.5, W)),
    "soft-filter": (1, 1, 0.5, W),  # zeroed filters, but only after the last epoch for good
    "swat-frozen": (W, W, A, W),
    "swat-frozen-active": (W, W, A, W),
    "swat-active-update": (W, W, A, W),
    "swat-u": (W, W, A, W),
    "swat-erk": (W, W, A, W),
    "swat-m": (W, W, A, W),
    "saw": (1, W, A, 1),
    "forward-weights": (W, 1, 1, W),
    "forward-activations": (A, 1, 1, 1),
    "meprop": (1, 0.2, 0.2, 1),
}


def _records(gm: SwatModule, x: Tensor, accounting: str = "paper") -> dict[str, LayerRecord]:
    return {r.name: r for r in swatfx.report(gm, x, accounting=accounting).layers}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_paper_accounting(name: str, trained: bool) -> None:
    """Densities are those of the moment: after training, those that a ramp or shares led to."""
    gm, optimizer = attached(POLICIES[name], Residual)
    if trained:
        train(gm, optimizer, batches(TOTAL))
    density = {layer.plan.name: layer.weight_density.value for layer in sparse_layers(gm)}
    if name == "gradual-magnitude":
        assert set(density.values()) == {0.2 if trained else 1.0}
    records = _records(gm, batches(1)[0])
    for layer in sparse_layers(gm):
        record = records[layer.plan.name]
        factors = {W: density[layer.plan.name], A: record.activation_density}
        scales = [factors[f] if isinstance(f, str) else f for f in FACTORS[name]]
        dense = record.dense_forward_macs, record.dense_input_gradient_macs
        expected = [
            record.dense_forward_macs * scales[0],
            record.dense_input_gradient_macs * scales[1],
            record.dense_weight_gradient_macs * scales[2],
            record.dense_forward_macs * scales[3],
        ]
        found = [
            record.sparse_forward_macs,
            record.sparse_input_gradient_macs,
            record.sparse_weight_gradient_macs,
            record.inference_macs,
        ]
        assert all(dense) and found == pytest.approx(expected, abs=1), layer.plan.name


def test_the_assumed_density_is_a_field() -> None:
    x = batches(1)[0]
    for assumed, factor in ((None, 1.0), (0.5, 0.5), (0.25, 0.25)):
        policy = replace(POLICIES["static"], assumed_activation_density=assumed)
        record = _records(swatfx.compile(plain(), policy), x)["2"]
        assert record.sparse_weight_gradient_macs == factor * record.dense_weight_gradient_macs


def test_reports_of_baselines_add_up() -> None:
    x = batches(1)[0]
    report = swatfx.report(swatfx.compile(plain(), "static:0.8,distribution=uniform"), x)
    # All three layers at density 0.2: two passes at that, and one at a half.
    dense = [
        (r.dense_forward_macs, r.dense_input_gradient_macs, r.dense_weight_gradient_macs)
        for r in report.layers
    ]
    total = sum(map(sum, dense))
    sparse = sum(0.2 * f + 0.2 * i + 0.5 * w for f, i, w in dense)
    assert report.totals["training_mac_reduction"] == pytest.approx(1 - sparse / total, abs=1e-3)
    assert report.totals["inference_mac_reduction"] == pytest.approx(0.8, abs=1e-3)
    assert report.totals["weight_sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert report.totals["activation_sparsity"] == 0  # none that the method makes


@pytest.mark.parametrize(("sparsity", "expected"), [(0.8, 77.7), (0.9, 87.4)])
def test_rigl_on_resnet50_as_the_paper_counts_it(sparsity: float, expected: float) -> None:
    """Table 3: uniform densities and a dense first layer, as SWAT-U's forward."""
    with torch.device("meta"):
        model = models.create("resnet50")
    gm = swatfx.compile(model, swatfx.rigl(sparsity))
    totals = swatfx.report(gm, torch.empty(1, 3, 224, 224, device="meta")).totals
    assert 100 * totals["inference_mac_reduction"] == pytest.approx(expected, abs=0.05)


def _conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(3, 4, 3))


def _products(keep: Tensor, size: int, stride: int, padding: int) -> int:
    """(active weight, output) pairs whose input is no padding, of one square sample."""
    out = (size + 2 * padding - keep.shape[-1]) // stride + 1
    count = 0
    for tap in itertools.product(range(keep.shape[2]), range(keep.shape[3])):
        active = int(keep[:, :, tap[0], tap[1]].sum())
        inside = [sum(0 <= o * stride + t - padding < size for o in range(out)) for t in tap]
        count += active * inside[0] * inside[1]
    return count


@pytest.mark.parametrize("name", ["static", "rigl", "snfs"])
def test_exact_accounting_counts_what_masked_updates_compute(name: str) -> None:
    """Of the weight gradient, the products of active weights alone; SNFS computes all of it."""
    gm, _ = attached(POLICIES[name], _conv)
    x = torch.randn(5, 2, 7, 7)
    records = _records(gm, x, "exact")
    shapes = {"0": (7, 2, 1), "2": (4, 1, 0)}
    for layer in sparse_layers(gm):
        keep, (size, stride, padding) = layer.keep(), shapes[layer.plan.name]
        masked = 5 * _products(keep, size, stride, padding)
        full = 5 * _products(torch.ones_like(keep), size, stride, padding)
        record = records[layer.plan.name]
        assert record.dense_forward_macs == full and record.sparse_forward_macs == masked
        gradient = full if name == "snfs" else masked
        assert record.sparse_weight_gradient_macs == gradient, layer.plan.name
        assert record.sparse_input_gradient_macs == (masked if layer.plan.name == "2" else 0)
