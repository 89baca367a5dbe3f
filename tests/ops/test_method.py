"""The method of swatfx/ops/README.md, against a second formulation: `tests.nets.second_method`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx import Policy
from swatfx.compiled.layers import sparse_layers
from swatfx.tensors import bits
from tests.nets.second_method import (
    LAYERS,
    Shape,
    activation_mask,
    as_double,
    assert_close,
    forward,
    input_gradient,
    packs,
    top,
    weight_gradient,
    weight_mask,
)

torch.set_num_threads(1)
S = 0.75

# ---- The comparison ------------------------------------------------------------------------------

WHOLE = ["nchw", "chw", "hw", "random", "2:4"]
WEIGHT_SELECTORS = [*WHOLE, "channel", "channel-per-filter", "filter", "input-channel"]


def check(name: str, policy: Policy) -> None:
    """One training step of a compiled layer against the formulation."""
    layer, x, call = as_double(name)
    w, b = layer.get_parameter("weight"), dict(layer.named_parameters()).get("bias")
    gm = swatfx.compile(nn.Sequential(layer), policy)
    with packs(gm) as packed:
        y = gm(x)
    g = torch.randn_like(y)
    y.backward(g)

    with torch.no_grad():
        a, spatial, s = x.detach(), w.dim() - 2, policy.sparsity
        if policy.weight_selector == "random":
            (sparse,) = sparse_layers(gm)
            keep_w = sparse.keep()
            assert 0 < keep_w.double().mean() < 2 * (1 - s)
        else:
            keep_w = weight_mask(policy.weight_selector, w, s)
        if policy.activation_selector == "random":
            (kept,) = packed
            assert kept is not None
            keep_a = bits.bits_to_mask(kept, a.numel()).view(a.shape)
            assert 0 < keep_a.double().mean() < 2 * (1 - s)
        else:
            keep_a = activation_mask(policy.activation_selector, a, s, spatial)
        keep_g = torch.ones_like(g, dtype=torch.bool)
        if policy.gradient_sparsity:
            keep_g = activation_mask(policy.gradient_selector, g, policy.gradient_sparsity, spatial)
        w_s, a_s, g_s = w * keep_w, a * keep_a, g * keep_g
        assert_close(
            y,
            forward(
                a_s if policy.forward_activation else a,
                w_s if policy.forward_weight else w,
                b,
                call,
            ),
        )
        assert_close(x.grad, input_gradient(g_s, w_s if policy.backward_weight else w, a, call))
        expected = weight_gradient(g_s, a_s if policy.backward_activation else a, w, call)
        # Where no pass sees sparse weights, none is inactive.
        sees_weight = policy.forward_weight or policy.backward_weight
        active_only = policy.update == "active" and sees_weight
        assert_close(w.grad, expected * keep_w if active_only else expected)
        if b is not None:
            features = g.dim() - 1 if spatial == 0 else 1
            assert_close(b.grad, g.sum([d for d in range(g.dim()) if d != features]))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("selector", WEIGHT_SELECTORS)
def test_weight_selectors(name: str, selector: str) -> None:
    sparsity = 0.5 if selector == "2:4" else S
    check(name, swatfx.swat_u(sparsity, first_dense=False, weight_selector=selector))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("selector", ["nchw", "chw", "hw", "random"])
@pytest.mark.parametrize("in_forward", [False, True])
def test_activation_selectors(name: str, selector: str, in_forward: bool) -> None:
    options: dict[str, Any] = {"activation_selector": selector, "forward_activation": in_forward}
    check(name, swatfx.swat_u(S, first_dense=False, **options))


VARIANTS = {
    "swat": swatfx.swat_u(S, first_dense=False),
    "saw": swatfx.saw(S, first_dense=False),
    "meprop": swatfx.meprop(S),
    "meprop-chw": swatfx.meprop(S, gradient_selector="chw"),
    "figure 1, weights": Policy("w", S, backward_weight=False, backward_activation=False),
    "figure 1, activations": Policy(
        "a",
        S,
        forward_weight=False,
        forward_activation=True,
        backward_weight=False,
        backward_activation=False,
    ),
    "figure 2, W+A": Policy("w+a", S, forward_weight=False),
    "figure 7": swatfx.swat_u(S, first_dense=False, update="active"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_paper(name: str, variant: str) -> None:
    check(name, VARIANTS[variant])


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("gradient", [0.0, 0.5])
@pytest.mark.parametrize("update", ["all", "active"])
def test_every_combination_of_fields(flags: tuple[bool, ...], gradient: float, update: str) -> None:
    fw, fa, bw, ba = flags
    policy = Policy(
        "any",
        S,
        forward_weight=fw,
        forward_activation=fa,
        backward_weight=bw,
        backward_activation=ba,
        gradient_sparsity=gradient,
        update=update,
    )
    check("conv2d", policy)
    check("linear", policy)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("selector", ["nchw", "hw", "random"])
@pytest.mark.parametrize("in_forward", [False, True])
def test_padding_is_applied_after_the_mask(mode: str, selector: str, in_forward: bool) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode=mode).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"activation_selector": selector, "forward_activation": in_forward}
    gm = swatfx.compile(nn.Sequential(layer), swatfx.swat_u(S, first_dense=False, **options))
    with packs(gm) as packed:
        y = gm(x)
    g = torch.randn_like(y)
    y.backward(g)
    (kept,) = packed
    assert kept is not None
    a_s = bits.unpack(kept, x.numel(), x.dtype).view(x.shape)
    padding = (1, 1, 2, 2)
    seen = F.pad(a_s, padding, mode=mode)
    w = layer.weight.detach()
    w_s = w * top(w.abs(), S)
    assert_close(layer.weight.grad, weight_gradient(g, seen, w, Shape()))
    a = x.detach().requires_grad_()
    padded = F.pad(a, padding, mode=mode)
    assert layer.bias is not None
    used = seen if in_forward else padded.detach()
    assert_close(y, forward(used, w_s, layer.bias.detach(), Shape()))
    padded.backward(input_gradient(g, w_s, padded, Shape()))
    assert a.grad is not None
    assert_close(x.grad, a.grad)


# ---- What is saved -------------------------------------------------------------------------------


def saved_by(gm: nn.Module, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        gm(x)
    return seen


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("zeros", [0.0, 0.6, 0.95])
def test_saved_is_the_weight_itself_a_threshold_and_packed_bytes(name: str, zeros: float) -> None:
    layer, x, _ = as_double(name)
    with torch.no_grad():
        x *= torch.rand(x.shape) >= zeros
    gm = swatfx.compile(nn.Sequential(layer), swatfx.swat_u(0.5, first_dense=False))
    saved = saved_by(gm, x)
    weight = layer.get_parameter("weight")
    floats = [t for t in saved if t.dtype != torch.uint8]
    assert sorted(t.numel() for t in floats) == [1, weight.numel()]
    assert max(floats, key=Tensor.numel).data_ptr() == weight.data_ptr()  # no copy of it
    (kept,) = (t for t in saved if t.dtype == torch.uint8)
    n, nonzero = x.numel(), int(x.count_nonzero())
    stored = min(nonzero, n - n // 2)  # zeros are never stored, even where the mask keeps them
    assert kept.numel() == (n + 63) // 64 * 8 + 8 * stored


def test_saved_in_half_precision_under_autocast() -> None:
    layer = nn.Linear(64, 8)
    gm = swatfx.compile(nn.Sequential(layer), swatfx.swat_u(0.75, first_dense=False))
    x = torch.randn(32, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (kept,) = (t for t in saved_by(gm, x) if t.dtype == torch.uint8)
    assert kept.numel() == 32 * 64 // 8 + 2 * 512
