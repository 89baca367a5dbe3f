"""Learned thresholds in the ops: the mask in forward, straight-through gradients in backward.

The gradients are compared with autograd's of a second formulation: the step function in forward is
replaced, for backward only, by the integral of the paper's derivative.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swatfx
from swatfx import selectors
from swatfx.density import Density
from swatfx.errors import PolicyError, SwatError
from swatfx.ops.learned import is_learned
from swatfx.selectors import Axes
from tests.nets.saving_ops import saved_by

torch.set_num_threads(1)
OPS = torch.ops.swatfx
CONV = ([1, 1], [1, 1], [1, 1], 1)
HOW = {"sparse": "w/w", "weight_selector": "learned"}
SHAPES = {
    "linear": (6, 8),
    "conv1d": (6, 4, 3),
    "conv2d": (6, 4, 3, 3),
    "depthwise": (6, 1, 3, 3),
    "one filter": (1, 4, 1, 1),
    "no filter": (0, 4, 3, 3),
}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def thresholds(weight: Tensor) -> Tensor:
    """Some below zero, some that keep little."""
    shape = (weight.shape[0], *[1] * (weight.dim() - 1))
    return torch.linspace(-0.5, 1.5, weight.shape[0], dtype=weight.dtype).view(shape)


def integral(q: Tensor) -> Tensor:
    """Of 2 - 4|q| up to 0.4, 0.4 up to 1, 0 from there on; zero at zero."""
    size = q.abs()
    near = size.clamp(max=0.4)
    return q.sign() * (2 * near - 2 * near**2 + 0.4 * (size.clamp(0.4, 1) - 0.4))


def masked(weight: Tensor, threshold: Tensor) -> Tensor:
    """`weight` times a step whose derivative is the estimate."""
    q = weight.abs() - threshold
    soft = integral(q)
    return weight * (soft - soft.detach() + (q >= 0).to(weight.dtype))


def layer(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(input, bias) for a weight of two or four dimensions."""
    shape = (5, weight.shape[1]) if weight.dim() == 2 else (2, weight.shape[1], 5, 5)
    return draw(*shape, dtype=weight.dtype, seed=1), draw(weight.shape[0], seed=2).to(weight)


def run(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
    if w.dim() == 2:
        out: Tensor = OPS.linear(x, w, b, t, None, **HOW)
    else:
        out = OPS.conv(x, w, b, t, None, *CONV, **HOW)
    return out


def composed(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
    used = masked(w, t)
    return F.linear(x, used, b) if w.dim() == 2 else F.conv2d(x, used, b, padding=1)


def gradients(function: Any, *leaves: Tensor) -> list[Tensor | None]:
    """Of a sum with fixed factors, for those of `leaves` that want one."""
    fresh = [v.detach().clone().requires_grad_(v.requires_grad) for v in leaves]
    out = function(*fresh)
    out.backward(draw(*out.shape, seed=3).to(out))
    return [v.grad for v in fresh]


# ---- The mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_forward_sees_exact_zeros(name: str) -> None:
    w = draw(*SHAPES[name])
    t = thresholds(w)
    x, b = layer(w)
    used = torch.where(w.abs() >= t, w, 0)
    assert 0.2 < float((used == 0).double().mean()) < 0.8
    dense = F.linear(x, used, b) if name == "linear" else F.conv2d(x, used, b, padding=1)
    assert torch.equal(run(x, w, b, t), dense)


def test_ties_and_nan_stay_and_nothing_is_below_a_negative_threshold() -> None:
    w = torch.tensor([[0.5, -0.5, 0.25, float("nan")], [0.0, -0.0, 0.1, -0.1]])
    t = torch.tensor([[0.5], [-0.1]])
    keep = selectors.get("learned").keep(w, t, Axes(0, 1))
    assert keep.tolist() == [[True, True, False, True], [True] * 4]
    assert selectors.get("learned").keep(w, torch.zeros(2, 1), Axes(0, 1)).all()


def test_only_this_selector_is_learned() -> None:
    names = [*selectors.SELECTORS, "2:4", "held:nchw"]
    assert [name for name in names if is_learned(name)] == ["learned"]


def test_a_density_cannot_be_asked_for() -> None:
    selectors.get("learned").check(Density(1.0), "conv1")
    with pytest.raises(PolicyError, match=r"layer 'weight'.*sparsity 0\.5.*penalty"):
        swatfx.compile(torch.nn.Linear(4, 4), swatfx.Policy("x", 0.5, weight_selector="learned"))
    with pytest.raises(PolicyError, match="activation_selector selects weights only"):
        swatfx.compile(torch.nn.Linear(4, 4), swatfx.Policy("x", activation_selector="learned"))


# ---- Gradients -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    w = draw(*SHAPES[name], dtype=dtype)
    torch.library.opcheck(OPS.learned_gradient, (torch.randn_like(w), w, thresholds(w)))


@pytest.mark.parametrize("last", [(True, False), (False, True), (True, True)])
def test_opcheck_channels_last(last: tuple[bool, bool]) -> None:
    formats = [torch.channels_last if is_last else torch.contiguous_format for is_last in last]
    grad, w = (draw(6, 4, 3, 3, seed=i).contiguous(memory_format=f) for i, f in enumerate(formats))
    torch.library.opcheck(OPS.learned_gradient, (grad, w, thresholds(w)))
    plain = OPS.learned_gradient(grad.contiguous(), w.contiguous(), thresholds(w))
    found = OPS.learned_gradient(grad, w, thresholds(w))
    assert found[0].stride() == grad.stride() and torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[1], plain[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_opcheck_of_the_layers(name: str) -> None:
    w = draw(*SHAPES[name], dtype=torch.float32)
    tensors = [v.detach().clone().requires_grad_() for v in (*layer(w), w, thresholds(w))]
    x, b, w, t = tensors
    tail = () if name == "linear" else CONV
    op = OPS.linear if name == "linear" else OPS.conv
    torch.library.opcheck(op, (x, w, b, t, None, *tail), HOW)


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "no filter"])
def test_gradient_is_that_of_the_composed_formula(name: str) -> None:
    w = draw(*SHAPES[name]).requires_grad_()
    t = thresholds(w.detach()).requires_grad_()
    grad = draw(*SHAPES[name], seed=4)
    expected = torch.autograd.grad(masked(w, t), (w, t), grad)
    found = OPS.learned_gradient(grad, w.detach(), t.detach())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradient_by_hand() -> None:
    """One filter at t = 1, gradients of 1: q is -1.5, -0.7, -0.2, 0.3, 0.7 and 1.5."""
    w = torch.tensor([[-0.3, 0.8, -1.3, 1.7, 2.5, 0.0]], dtype=torch.float64)
    t = torch.ones(1, 1, dtype=torch.float64)
    weight_grad, threshold_grad = OPS.learned_gradient(torch.ones_like(w), w, t)
    slope = [0.4, 1.2, 0.8, 0.4, 0.0, 0.4]  # at q = -0.7, -0.2, 0.3, 0.7, 1.5, -1
    keep = [0, 0, 1, 1, 1, 0]
    sizes = [0.3, 0.8, 1.3, 1.7, 2.5, 0.0]
    expected = [k + s * h for k, s, h in zip(keep, sizes, slope, strict=True)]
    torch.testing.assert_close(weight_grad, torch.tensor([expected], dtype=torch.float64))
    through = -0.3 * 0.4 + 0.8 * 1.2 - 1.3 * 0.8 + 1.7 * 0.4
    torch.testing.assert_close(threshold_grad, torch.tensor([[-through]], dtype=torch.float64))


@pytest.mark.parametrize("frozen", ["", "w", "t", "x", "xb", "wb", "wt"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_layers_pass_it_on(name: str, frozen: str) -> None:
    w = draw(*SHAPES[name])
    x, b = layer(w)
    leaves = {"x": x, "w": w, "b": b, "t": thresholds(w)}
    tensors = [v.requires_grad_(key not in frozen) for key, v in leaves.items()]
    found, expected = gradients(run, *tensors), gradients(composed, *tensors)
    for key, one, other in zip(leaves, found, expected, strict=True):
        assert (one is None) == (other is None) == (key in frozen), key
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("frozen", "keeps"), [("w", True), ("t", True), ("wt", False)])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_the_input_is_kept_if_weight_or_threshold_trains(
    name: str, frozen: str, keeps: bool
) -> None:
    w = draw(*SHAPES[name])
    x, b = layer(w)
    t = thresholds(w)
    for key, v in {"x": x, "w": w, "b": b, "t": t}.items():
        v.requires_grad_(key not in frozen)
    saved = saved_by(lambda: run(x, w, b, t), w, t)
    assert [v.shape for v in saved] == [x.shape] * keeps


def test_an_infinite_weight_does_not_spoil_its_filter() -> None:
    w = torch.tensor([[float("inf"), 0.5, 0.1]])
    weight_grad, threshold_grad = OPS.learned_gradient(
        torch.ones_like(w), w, torch.full((1, 1), 0.2)
    )
    assert torch.isfinite(weight_grad).all() and torch.isfinite(threshold_grad).all()


def test_double_backward_says_no() -> None:
    w = draw(6, 8).requires_grad_()
    t = thresholds(w.detach()).requires_grad_()
    x, b = layer(w.detach())
    (grad,) = torch.autograd.grad(run(x, w, b, t).pow(2).sum(), t, create_graph=True)
    with pytest.raises(SwatError, match="policy 'dense'"):
        grad.pow(2).sum().backward()


# ---- Dtypes and torch.compile --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_autocast_masks_in_the_weights_own_precision(name: str) -> None:
    w = draw(*SHAPES[name], dtype=torch.float32)
    w[0] = 1.0  # and a threshold that bfloat16 would not tell from it
    t = thresholds(w)
    t[0] = 1.001
    x, b = layer(w)
    tensors = [v.requires_grad_() for v in (x, w, b, t)]

    def cast(function: Any) -> Any:
        def call(*args: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = function(*args)
            return out

        return call

    out = cast(run)(*tensors)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, cast(composed)(*tensors))
    first = out.movedim(1, 0)[0]
    assert torch.equal(first, b[0].to(torch.bfloat16).expand_as(first))
    found, expected = gradients(cast(run), *tensors), gradients(cast(composed), *tensors)
    for one, other in zip(found, expected, strict=True):
        assert one is not None and other is not None and one.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_bfloat16(name: str) -> None:
    w = draw(*SHAPES[name], dtype=torch.bfloat16)
    x, b = layer(w)
    tensors = [v.requires_grad_() for v in (x, w, b, thresholds(w))]
    found = gradients(run, *tensors)
    wide = [v.detach().double().requires_grad_() for v in tensors]
    for one, other in zip(found, gradients(composed, *wide), strict=True):
        assert one is not None and other is not None and one.dtype is torch.bfloat16
        error = (one.double() - other).norm() / other.norm()
        assert float(error) < 0.03  # of sums with cancellation; bfloat16 rounds at 0.004


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_fullgraph_is_bit_for_bit(name: str, last: bool) -> None:
    torch._dynamo.reset()
    w = draw(*SHAPES[name], dtype=torch.float32)
    x, b = layer(w)
    if last and name == "conv2d":
        x, w = (v.contiguous(memory_format=torch.channels_last) for v in (x, w))
    tensors = [v.requires_grad_() for v in (x, w, b, thresholds(w))]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for one, other in zip(gradients(compiled, *tensors), gradients(run, *tensors), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
